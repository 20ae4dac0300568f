"""Two models on one text: is the difference real?

Both models' losses are summed over the same pieces of text, documents where there are many, else stretches of equally many bytes;
what the models find hard about a piece is then the same for both and cancels. Tokenizers may differ: a token's loss goes to the
piece that holds its first byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tinylm.errors import InputError
from tinylm.evaluation.details import TokenLosses

_MANY_DOCUMENTS = 50
_PIECES = 200
_DRAWS = 10_000


@dataclass(frozen=True)
class Paired:
    """Bits per byte of A and B on the same text; the interval is a 95 % paired bootstrap of their difference, A less B.

    `p_value`: how often swapping A and B at random on each piece gives a difference as large (a two-sided permutation test).
    """

    a: float
    b: float
    difference: float
    ci95: tuple[float, float]
    p_value: float
    pieces: int
    kind: str


def compare(a: TokenLosses, a_lengths: np.ndarray, b: TokenLosses, b_lengths: np.ndarray) -> Paired:
    """Raises `InputError` when the two did not score the same text, or it is too short to tell."""
    if [*_document_bytes(a, a_lengths)] != [*_document_bytes(b, b_lengths)]:
        raise InputError("the two runs hold out different texts", hint="name a text to measure both on with --on")
    sizes = np.array(_document_bytes(a, a_lengths))
    if len(sizes) >= _MANY_DOCUMENTS:
        kind, borders = "documents", np.cumsum(sizes)
    else:
        kind, borders = "stretches of text", np.linspace(0, sizes.sum(), min(_PIECES, max(int(sizes.sum()) // 200, 1)) + 1)[1:]
    if len(borders) < 5:
        raise InputError("too short a text to compare on", hint="a thousand bytes at least")
    ours, theirs = (_pieces(losses, lengths, borders) for losses, lengths in ((a, a_lengths), (b, b_lengths)))
    weights = np.diff(borders, prepend=0)
    total = float(weights.sum())
    differences = (ours - theirs) / math.log(2)
    generator = np.random.default_rng(0)
    chosen = generator.integers(0, len(differences), (_DRAWS, len(differences)))
    resampled = differences[chosen].sum(1) / weights[chosen].sum(1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    signs = generator.choice((-1.0, 1.0), (_DRAWS, len(differences)))
    swapped = np.abs((signs * differences).sum(1)) >= abs(differences.sum()) * (1 - 1e-12)
    return Paired(
        a=float(ours.sum()) / math.log(2) / total,
        b=float(theirs.sum()) / math.log(2) / total,
        difference=float(differences.sum()) / total,
        ci95=(float(low), float(high)),
        p_value=float((swapped.sum() + 1) / (_DRAWS + 1)),
        pieces=len(differences),
        kind=kind,
    )


def _document_bytes(losses: TokenLosses, lengths: np.ndarray) -> list[int]:
    return [int(lengths[losses.shard.tokens[start:end]].sum()) for start, end in losses.shard.documents()]


def _pieces(losses: TokenLosses, lengths: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """Nats of each piece; `borders` are where pieces end, in bytes."""
    places = losses.places
    sizes = lengths[losses.shard.tokens[places]]
    begins = np.cumsum(sizes) - sizes
    return np.bincount(
        np.searchsorted(borders, begins, side="right").clip(max=len(borders) - 1),
        weights=losses.nats[places],
        minlength=len(borders),
    )
