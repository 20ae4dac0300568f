"""Collect per-token losses during an evaluation, and tabulate the loss by document, position and frequency.

`TokenLosses` collects the losses while `evaluate` runs. The functions in this module summarize them without running a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinylm.data.shards import Shard
from tinylm.data.source_spans import Span
from tinylm.evaluation.perplexity import ScoredBatch
from tinylm.evaluation.scoring import top_logprobs
from tinylm.tokenizer import Tokenizer

ALTERNATIVES = 5
_HARDEST_CONTEXT = 12
_FREQUENCY_BANDS = (0, 1, 10, 100, 1_000, 10_000)


class TokenLosses:
    """Losses in nats by position in the shard; NaN marks tokens that were not scored. Pass an instance to `evaluate` as `on_batch`.

    `alternatives` and `probabilities`, both `(detailed, 5)`, contain the ids and probabilities of the five tokens that the model
    considered most likely. `detailed` is the number of tokens from the beginning of the shard for which they are recorded.
    """

    def __init__(self, shard: Shard, detailed: int = 0) -> None:
        self.shard = shard
        self.nats = np.full(len(shard), np.nan)
        self.context_lengths = np.zeros(len(shard), dtype=np.int64)
        self.detailed = min(detailed, len(shard))
        self.alternatives = np.zeros((self.detailed, ALTERNATIVES), dtype=np.int64)
        self.probabilities = np.zeros((self.detailed, ALTERNATIVES), dtype=np.float32)

    def __call__(self, batch: ScoredBatch) -> None:
        is_text = self.shard.tokens[batch.positions] != self.shard.end_of_text
        self.nats[batch.positions[is_text]] = batch.nats[is_text]
        self.context_lengths[batch.positions] = batch.context_lengths
        detailed = np.flatnonzero(batch.positions < self.detailed)
        if len(detailed):
            ids, logprobs = top_logprobs(batch.logits[detailed.tolist()], ALTERNATIVES)
            positions = batch.positions[detailed]
            self.alternatives[positions, : ids.shape[1]] = ids.cpu().numpy()
            self.probabilities[positions, : ids.shape[1]] = logprobs.exp().cpu().numpy()

    @property
    def positions(self) -> np.ndarray:
        """The positions of the scored tokens."""
        return np.flatnonzero(~np.isnan(self.nats))


@dataclass(frozen=True)
class Row:
    """A table row. `share` is the fraction of all scored tokens, and `loss` is in nats per token."""

    name: str
    tokens: int
    share: float
    loss: float
    bits_per_byte: float


def _row(name: str, losses: TokenLosses, positions: np.ndarray, token_byte_lengths: np.ndarray) -> Row:
    nats, size = float(losses.nats[positions].sum()), int(token_byte_lengths[losses.shard.tokens[positions]].sum())
    total = max(len(losses.positions), 1)
    return Row(name, len(positions), len(positions) / total, nats / max(len(positions), 1), nats / math.log(2) / max(size, 1))


def by_document(losses: TokenLosses, token_byte_lengths: np.ndarray) -> list[Row]:
    """Return one row per document, in order. The name of a row is the document's number."""
    rows = []
    for number, (start, end) in enumerate(losses.shard.documents(), 1):
        positions = np.arange(start, end)
        positions = positions[~np.isnan(losses.nats[positions])]
        if len(positions):
            rows.append(_row(str(number), losses, positions, token_byte_lengths))
    return rows


def by_source(losses: TokenLosses, token_byte_lengths: np.ndarray, spans: Sequence[Span]) -> list[Row]:
    """Return one row per source of a mixture."""
    rows = []
    for span in spans:
        positions = np.arange(span.start, span.end)
        positions = positions[~np.isnan(losses.nats[positions])]
        rows.append(_row(span.source, losses, positions, token_byte_lengths))
    return rows


def by_position(losses: TokenLosses, token_byte_lengths: np.ndarray) -> list[Row]:
    """Return one row per range of context lengths: 1, 2, 3-4, 5-8, ...

    A token's context length is the number of tokens that it was predicted from.
    """
    positions = losses.positions
    doublings = np.ceil(np.log2(np.maximum(losses.context_lengths[positions], 1))).astype(int)
    rows = []
    for doubling in np.unique(doublings):
        low, high = 2 ** (doubling - 1) + 1 if doubling else 1, 2**doubling
        name = f"{low}" if low == high else f"{low}-{high}"
        rows.append(_row(name, losses, positions[doublings == doubling], token_byte_lengths))
    return rows


def by_frequency(losses: TokenLosses, token_byte_lengths: np.ndarray, train: Shard) -> list[Row]:
    """Return one row per range of token frequencies in the training text: never, 1-9, 10-99, ..."""
    counts = np.bincount(np.asarray(train.tokens), minlength=len(token_byte_lengths))
    positions = losses.positions
    frequencies = counts[losses.shard.tokens[positions]]
    bands = np.digitize(frequencies, _FREQUENCY_BANDS) - 1
    rows = []
    for band in np.unique(bands):
        low = _FREQUENCY_BANDS[band]
        name = "never" if not low else f"{low:,}-{10 * low - 1:,}" if band < len(_FREQUENCY_BANDS) - 1 else f"{low:,} or more"
        rows.append(_row(name, losses, positions[bands == band], token_byte_lengths))
    return rows


@dataclass(frozen=True)
class HardToken:
    """A token with a large loss, and the text before it."""

    token: str
    nats: float
    before: str


def hardest(losses: TokenLosses, tokenizer: Tokenizer, count: int) -> list[HardToken]:
    """Return the `count` tokens with the largest losses, in descending order of loss."""
    positions = losses.positions
    order = positions[np.argsort(-losses.nats[positions], kind="stable")][:count]
    tokens, end_of_text = losses.shard.tokens, losses.shard.end_of_text
    hard_tokens = []
    for position in order.tolist():
        before = np.asarray(tokens[max(0, position - _HARDEST_CONTEXT) : position]).tolist()
        start = max((index + 1 for index, id in enumerate(before) if id == end_of_text), default=0)  # exclude other documents
        token = tokenizer.decode([int(tokens[position])])
        hard_tokens.append(HardToken(token, float(losses.nats[position]), tokenizer.decode(before[start:])))
    return hard_tokens
