"""Orthogonalize matrices with a Zolotarev function of their singular values (Nakatsukasa & Freund 2016).

The rational function f(x) = x (ALPHA + sum of beta / (x^2 + shift)) is applied to the singular values of a matrix that is divided
by its Frobenius norm. No other rational function of this degree brings values in [0.005, 1] as close to 1: it maps them to
1 +- 0.1. Three Newton-Schulz iterations map values in [0.01, 1] to 1 +- 0.27 and need more floating-point operations.

Legend: `N` matrices, each with `R` rows and `C` columns; `n` is the smaller of the two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from tinylm.cost.memory import LAPACK_ROWS, ZOLOTAREV_BATCH

LOWER_BOUND = 0.005
"""The smallest singular value, relative to the Frobenius norm, that is brought close to 1."""
ALPHA = 0.849001603
TERMS = ((0.0172780144, 7.853246321e-05), (0.2377250614, 0.01920639484))
"""(beta, shift) for each term of f: the partial fractions of equation 3.4 in the paper with r = 2 and l = `LOWER_BOUND`."""

_GRAM_ROWS = 96
"""The smallest number of rows of a Gram matrix that are computed by one matrix product."""


def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalize (R, C) matrices. The results are `U f(S) V^T` for matrices with the singular value decomposition `U S V^T`.

    Each result is `X @ Q` if X has more rows than columns, and `Q @ X` otherwise. Only this product and the Gram matrix of X
    involve the long side of X.
    """
    indices_by_size: dict[int, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        indices_by_size[min(matrix.shape)].append(index)
    results = list(matrices)
    for indices in indices_by_size.values():
        for start in range(0, len(indices), ZOLOTAREV_BATCH):
            batch = indices[start : start + ZOLOTAREV_BATCH]
            transforms = _transform_batch([_wide(matrices[index]) for index in batch])
            for index, transform in zip(batch, transforms, strict=True):
                matrix = matrices[index]
                results[index] = matrix @ transform if _is_tall(matrix) else transform @ matrix
    return results


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if _is_tall(matrix) else matrix


def _transform_batch(matrices: Sequence[Tensor]) -> Tensor:
    """Return Q for matrices X with n rows and at least n columns, (N, n, n).

    Q = (ALPHA I + sum of beta (X X^T / norm^2 + shift I)^-1) / norm, where norm is the Frobenius norm of X.
    """
    n = len(matrices[0])
    shifted = matrices[0].new_empty((len(TERMS), len(matrices), n, n))
    for matrix, gram in zip(matrices, shifted[0], strict=True):
        _write_gram(matrix, gram)
    squared_norms = shifted[0].diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-14)[:, None]  # (N, 1)
    shifted[0] /= squared_norms[:, :, None]
    shifted[1:] = shifted[0]
    for matrix, (_, shift) in zip(shifted, TERMS, strict=True):
        matrix.diagonal(dim1=-2, dim2=-1).add_(shift)
    _invert(shifted.flatten(0, 1))
    norms = squared_norms.sqrt()
    result = shifted[0].mul_(TERMS[0][0] / norms[:, :, None])
    for inverse, (beta, _) in zip(shifted[1:], TERMS[1:], strict=True):
        result.addcmul_(inverse, beta / norms[:, :, None])
    result.diagonal(dim1=-2, dim2=-1).add_(ALPHA / norms)
    return result


def _write_gram(matrix: Tensor, out: Tensor) -> None:
    """Write `matrix @ matrix.mT` to `out`, except for the blocks below the diagonal that `_invert` does not read."""
    start, n = 0, len(matrix)
    while start < n:
        end = start + (n - start) // 2 if n - start >= 2 * _GRAM_ROWS else n
        torch.mm(matrix[start:end], matrix[start:].mT, out=out[start:end, start:])
        start = end


def _invert(matrices: Tensor) -> None:
    """Invert symmetric positive definite matrices, (N, n, n), in place.

    The first half of the rows is read, and of the other half, recursively, the columns on the right. The inverse is computed from
    the Cholesky factor, which is as accurate as the matrix allows. Inverting by blocks with Schur complements would be faster but
    loses twice as many digits, which is too inaccurate for gradients with one dominant singular value.
    """
    _invert_factor(matrices)
    _multiply_by_transpose(matrices)


def _invert_factor(matrices: Tensor) -> None:
    """Replace matrices A = L L^T, (N, n, n), by the lower triangular inverses W of L."""
    n = matrices.shape[-1]
    if n <= LAPACK_ROWS:
        factors = torch.linalg.cholesky_ex(matrices)[0]
        identity = torch.eye(n, dtype=matrices.dtype, device=matrices.device).expand_as(matrices)
        matrices.copy_(torch.linalg.solve_triangular(factors, identity, upper=False))
        return
    first, upper, lower, last = _quarters(matrices)
    _invert_factor(first)
    product = first @ upper
    upper.zero_()
    last.baddbmm_(product.mT, product, alpha=-1)
    _invert_factor(last)
    lower.copy_((last @ product.mT).neg_() @ first)


def _multiply_by_transpose(matrices: Tensor) -> None:
    """Replace lower triangular matrices W, (N, n, n), by W^T W."""
    if matrices.shape[-1] <= LAPACK_ROWS:
        matrices.copy_(matrices.mT @ matrices)
        return
    first, upper, lower, last = _quarters(matrices)
    upper.copy_(lower.mT @ last)
    _multiply_by_transpose(first)
    first.baddbmm_(lower.mT, lower)
    _multiply_by_transpose(last)
    lower.copy_(upper.mT)


def _quarters(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the upper left, upper right, lower left and lower right blocks of matrices (N, n, n)."""
    half = matrices.shape[-1] // 2
    upper, lower = matrices[:, :half], matrices[:, half:]
    return upper[:, :, :half], upper[:, :, half:], lower[:, :, :half], lower[:, :, half:]
