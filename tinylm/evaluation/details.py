"""Where a model is good and where it is not: its losses token by token, and tables made of them.

Nothing here computes a loss; `TokenLosses` listens to `evaluate`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tinylm.data.shards import Shard
from tinylm.evaluation.perplexity import Scored
from tinylm.tokenizer import Tokenizer

ALTERNATIVES = 5
RUN_LENGTH = 13
"""Tokens that two texts must share in a row for it to count as overlap (Brown et al. 2020, appendix C, count words so)."""
_FREQUENCIES = (0, 1, 10, 100, 1_000, 10_000)


class TokenLosses:
    """Losses by place in the shard, to be passed to `evaluate` as `observe`.

    `alternatives` tokens from the shard's beginning keep what the model would rather have said: (places, 5) ids and
    probabilities.
    """

    def __init__(self, shard: Shard, alternatives: int = 0) -> None:
        self.shard = shard
        self.nats = np.full(len(shard), np.nan)
        self.contexts = np.zeros(len(shard), dtype=np.int64)
        self.detailed = min(alternatives, len(shard))
        self.alternatives = np.zeros((self.detailed, ALTERNATIVES), dtype=np.int64)
        self.probabilities = np.zeros((self.detailed, ALTERNATIVES), dtype=np.float32)

    def __call__(self, scored: Scored) -> None:
        counted = self.shard.tokens[scored.places] != self.shard.end_of_text
        self.nats[scored.places[counted]] = scored.nats[counted]
        self.contexts[scored.places] = scored.contexts
        wanted = np.flatnonzero(scored.places < self.detailed)
        if len(wanted):
            top = scored.logits[wanted.tolist()].float().softmax(-1).topk(min(ALTERNATIVES, scored.logits.shape[-1]))
            places = scored.places[wanted]
            self.alternatives[places, : top.indices.shape[1]] = top.indices.cpu().numpy()
            self.probabilities[places, : top.values.shape[1]] = top.values.cpu().numpy()

    @property
    def places(self) -> np.ndarray:
        """Where the scored tokens stand."""
        return np.flatnonzero(~np.isnan(self.nats))


@dataclass(frozen=True)
class Row:
    """A line of a table. `share` is that of all scored tokens, `loss` nats per token."""

    name: str
    tokens: int
    share: float
    loss: float
    bits_per_byte: float


def _row(name: str, losses: TokenLosses, places: np.ndarray, lengths: np.ndarray) -> Row:
    nats, size = float(losses.nats[places].sum()), int(lengths[losses.shard.tokens[places]].sum())
    total = max(len(losses.places), 1)
    return Row(name, len(places), len(places) / total, nats / max(len(places), 1), nats / math.log(2) / max(size, 1))


def by_document(losses: TokenLosses, lengths: np.ndarray) -> list[Row]:
    """A row per document, in their order, named by its number."""
    rows = []
    for number, (start, end) in enumerate(losses.shard.documents(), 1):
        places = np.arange(start, end)
        places = places[~np.isnan(losses.nats[places])]
        if len(places):
            rows.append(_row(str(number), losses, places, lengths))
    return rows


def by_position(losses: TokenLosses, lengths: np.ndarray) -> list[Row]:
    """A row per doubling of the number of tokens that a token was predicted from."""
    places = losses.places
    doublings = np.ceil(np.log2(np.maximum(losses.contexts[places], 1))).astype(int)
    rows = []
    for doubling in np.unique(doublings):
        low, high = 2 ** (doubling - 1) + 1 if doubling else 1, 2**doubling
        rows.append(_row(f"{low}" if low == high else f"{low}-{high}", losses, places[doublings == doubling], lengths))
    return rows


def by_frequency(losses: TokenLosses, lengths: np.ndarray, train: Shard) -> list[Row]:
    """A row per power of ten of how often the training text holds a token."""
    counts = np.bincount(np.asarray(train.tokens), minlength=len(lengths))
    places = losses.places
    often = counts[losses.shard.tokens[places]]
    bands = np.digitize(often, _FREQUENCIES) - 1
    rows = []
    for band in np.unique(bands):
        low = _FREQUENCIES[band]
        name = "never" if not low else f"{low:,}-{10 * low - 1:,}" if band < len(_FREQUENCIES) - 1 else f"{low:,} or more"
        rows.append(_row(name, losses, places[bands == band], lengths))
    return rows


@dataclass(frozen=True)
class Hard:
    """A token the model did not expect, and the text before it."""

    token: str
    nats: float
    before: str


def hardest(losses: TokenLosses, tokenizer: Tokenizer, count: int) -> list[Hard]:
    """The `count` tokens with the largest losses, hardest first."""
    places = losses.places
    order = places[np.argsort(-losses.nats[places], kind="stable")][:count]
    tokens, end = losses.shard.tokens, losses.shard.end_of_text
    found = []
    for place in order.tolist():
        before = np.asarray(tokens[max(0, place - 12) : place]).tolist()
        opened = max((at + 1 for at, id in enumerate(before) if id == end), default=0)
        found.append(Hard(tokenizer.decode([int(tokens[place])]), float(losses.nats[place]), tokenizer.decode(before[opened:])))
    return found


def overlap(heldout: Shard, train: Shard) -> float:
    """Share of the held-out tokens that stand in a run of 13 which the training text holds too."""
    ours, theirs = _runs(np.asarray(heldout.tokens), heldout.end_of_text), _runs(np.asarray(train.tokens), train.end_of_text)
    known = np.isin(ours[0], theirs[0])
    marked = np.zeros(len(heldout), dtype=bool)
    for back in range(RUN_LENGTH):
        marked[ours[1][known] + back] = True
    return float(marked.sum() / max(heldout.counts.tokens, 1))


def _runs(tokens: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes and places of all runs of 13 tokens inside a document."""
    size = len(tokens) - RUN_LENGTH + 1
    if size <= 0:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    key, inside = np.zeros(size, dtype=np.uint64), np.ones(size, dtype=bool)
    for back in range(RUN_LENGTH):
        part = tokens[back : back + size]
        inside &= part != end
        key = (key + part.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    places = np.flatnonzero(inside)
    return key[places], places
