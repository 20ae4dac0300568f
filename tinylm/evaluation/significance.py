"""Test whether two models differ significantly on the same text, with a paired bootstrap and a permutation test.

The losses of both models are summed over the same pieces of text: documents if there are many, otherwise pieces of equal size in
bytes. Because the comparison is paired, pieces that are hard for both models do not add to the variance of the difference. The
tokenizers may differ: the loss of a token belongs to the piece that contains the token's first byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tinylm.errors import InputError
from tinylm.evaluation.breakdown import TokenLosses

_MIN_DOCUMENTS_TO_PAIR = 50
_MAX_PIECES = 200
_MIN_PIECE_BYTES = 200
_MIN_PIECES = 5
_RESAMPLES = 10_000


@dataclass(frozen=True)
class PairedComparison:
    """Bits per byte of the models A and B on the same text, and their difference, A minus B.

    `ci95` is a 95 % paired bootstrap interval of the difference. `p_value` is the result of a two-sided permutation test: how often
    randomly swapping A and B in each piece yields a difference at least as large. `pieces` is the number of pieces, and `kind`
    describes them.
    """

    a: float
    b: float
    difference: float
    ci95: tuple[float, float]
    p_value: float
    pieces: int
    kind: str


def different_texts_error() -> InputError:
    return InputError("the runs have different held-out texts", hint="choose a text for the comparison with --on")


def compare_losses(a: TokenLosses, a_byte_lengths: np.ndarray, b: TokenLosses, b_byte_lengths: np.ndarray) -> PairedComparison:
    """Compare two models by their losses. Raises `InputError` if the scored texts differ or the text is too short."""
    sizes = np.array(_document_bytes(a, a_byte_lengths))
    if sizes.tolist() != _document_bytes(b, b_byte_lengths):
        raise different_texts_error()
    if len(sizes) >= _MIN_DOCUMENTS_TO_PAIR:
        kind, ends = "documents", np.cumsum(sizes)
    else:
        count = min(_MAX_PIECES, max(int(sizes.sum()) // _MIN_PIECE_BYTES, 1))
        kind, ends = "stretches of text", np.linspace(0, sizes.sum(), count + 1)[1:]
    if len(ends) < _MIN_PIECES:
        raise InputError("the text is too short for a comparison", hint="use at least 1,000 bytes")
    a_nats, b_nats = (_nats_of_pieces(losses, lengths, ends) for losses, lengths in ((a, a_byte_lengths), (b, b_byte_lengths)))
    weights = np.diff(ends, prepend=0)
    total = float(weights.sum())
    differences = (a_nats - b_nats) / math.log(2)
    generator = np.random.default_rng(0)
    chosen = generator.integers(0, len(differences), (_RESAMPLES, len(differences)))
    resampled = differences[chosen].sum(1) / weights[chosen].sum(1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    signs = generator.choice((-1.0, 1.0), (_RESAMPLES, len(differences)))
    as_large = np.abs((signs * differences).sum(1)) >= abs(differences.sum()) * (1 - 1e-12)
    return PairedComparison(
        a=float(a_nats.sum()) / math.log(2) / total,
        b=float(b_nats.sum()) / math.log(2) / total,
        difference=float(differences.sum()) / total,
        ci95=(float(low), float(high)),
        p_value=float((as_large.sum() + 1) / (_RESAMPLES + 1)),
        pieces=len(differences),
        kind=kind,
    )


def _document_bytes(losses: TokenLosses, byte_lengths: np.ndarray) -> list[int]:
    return [int(byte_lengths[losses.shard.tokens[start:end]].sum()) for start, end in losses.shard.documents()]


def _nats_of_pieces(losses: TokenLosses, byte_lengths: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the nats of each piece; `ends` contains the byte offsets at which the pieces end."""
    positions = losses.positions
    sizes = byte_lengths[losses.shard.tokens[positions]]
    starts = np.cumsum(sizes) - sizes
    return np.bincount(
        np.searchsorted(ends, starts, side="right").clip(max=len(ends) - 1),
        weights=losses.nats[positions],
        minlength=len(ends),
    )
