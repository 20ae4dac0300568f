"""Orthogonalize matrices with a rational function of their singular values.

The function f(x) = x (ALPHA + GAMMA x^2 + BETA / (x^2 + SHIFT)) is applied to the singular values of a matrix X that is divided by
the square root of the Frobenius norm of X X^T. This square root is at least the largest singular value of X and at most the
Frobenius norm of X. No other function of this form brings values in [0.015, 1] as close to 1: it maps them to 1 +- 0.181. A
Zolotarev function with two poles (Nakatsukasa & Freund 2016) needs two inverses. This function needs one inverse and a term in the
Gram matrix.

Legend: `N` matrices, each with `R` rows and `C` columns; `n` is the smaller of the two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tinylm.cost.memory import LAPACK_ROWS, rational_batch

_SMALLEST_NORM = 1e-14
"""Matrices X whose X X^T has a smaller norm are divided by the square root of this number, so that they stay small."""
LOWER_BOUND = 0.015
"""The smallest singular value, relative to the upper bound on the largest, that is brought close to 1."""
ALPHA, BETA, GAMMA, SHIFT = 2.279988, 0.07809701, -1.539035, 1.26776e-3
"""The coefficients of f that minimize the maximum of |f(x) - 1| for x in [LOWER_BOUND, 1], found numerically."""


def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalize (R, C) matrices. The results are `U f(S) V^T` for matrices with the singular value decomposition `U S V^T`."""
    results = list(matrices)
    for index, transform in _transforms(matrices):
        matrix = matrices[index]
        results[index] = matrix @ transform if _is_tall(matrix) else transform @ matrix
    return results


def _transforms(matrices: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield pairs (index, Q) for all matrices X. The result is `X @ Q` if X has more rows than columns, and `Q @ X` otherwise.

    Only this product and the Gram matrix involve the long side of X. Matrices with the same n are processed in batches.
    """
    indices_by_size: dict[int, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        indices_by_size[min(matrix.shape)].append(index)
    for n, indices in indices_by_size.items():
        batch_size = rational_batch(n)
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            yield from zip(batch, _transform_batch([_wide(matrices[index]) for index in batch]), strict=True)


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if _is_tall(matrix) else matrix


def _transform_batch(matrices: Sequence[Tensor]) -> Tensor:
    """Return Q for matrices X with n rows and at least n columns, (N, n, n).

    Q = (ALPHA I + GAMMA G + BETA (G + SHIFT I)^-1) / sqrt(norm), where norm is the Frobenius norm of X X^T and G = X X^T / norm.
    """
    n = len(matrices[0])
    grams = matrices[0].new_empty((len(matrices), n, n))
    for matrix, gram in zip(matrices, grams, strict=True):
        _write_gram(matrix, gram)
    largest = grams.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(_SMALLEST_NORM)[:, None, None]  # (N, 1, 1)
    grams /= largest  # so that squares do not overflow
    norms = grams.flatten(1).norm(dim=1)[:, None, None]
    norms = torch.maximum(norms, _SMALLEST_NORM / largest)
    grams /= norms
    norms *= largest
    result = grams.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(SHIFT)
    _invert(result)
    scales = norms.rsqrt()
    result *= BETA * scales
    result.diagonal(dim1=-2, dim2=-1).add_(ALPHA * scales[:, 0])
    return result.addcmul_(grams, GAMMA * scales)


def _write_gram(matrix: Tensor, out: Tensor) -> None:
    """Write `matrix @ matrix.mT` to `out`."""
    half = len(matrix) // 2
    upper, lower = matrix[:half], matrix[half:]
    torch.mm(upper, matrix.mT, out=out[:half])
    torch.mm(lower, lower.mT, out=out[half:, half:])
    out[half:, :half] = out[:half, half:].mT


def _invert(matrices: Tensor) -> None:
    """Invert symmetric positive definite matrices, (N, n, n), in place, by blocks with Schur complements.

    This loses up to twice as many digits as an inverse from the Cholesky factor. With eigenvalues in [SHIFT, 1 + SHIFT], the result
    of `orthogonalize` is still accurate to three digits.
    """
    if matrices.shape[-1] <= LAPACK_ROWS:
        matrices.copy_(torch.cholesky_inverse(torch.linalg.cholesky_ex(matrices)[0]))
        return
    first, upper, lower, last = _quarters(matrices)
    _invert(first)
    product = first @ upper
    last.baddbmm_(upper.mT, product, alpha=-1)
    _invert(last)
    upper.copy_((product @ last).neg_())
    first.baddbmm_(upper, product.mT, alpha=-1)
    lower.copy_(upper.mT)


def _quarters(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the upper left, upper right, lower left and lower right blocks of matrices (N, n, n)."""
    half = matrices.shape[-1] // 2
    upper, lower = matrices[:, :half], matrices[:, half:]
    return upper[:, :, :half], upper[:, :, half:], lower[:, :, :half], lower[:, :, half:]
