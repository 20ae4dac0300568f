"""Perplexity one can compare: every token of a text scored exactly once, each document by itself.

A document is read in windows of `context` tokens that advance by `stride`; a window scores the tokens that no window
before it has scored. The first token of a document is predicted from the end-of-text token. Arithmetic is float32 inside
the model and float64 in every sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from tinylm.data.shards import Shard
from tinylm.errors import InputError
from tinylm.model.objective import IGNORED, CausalObjective

BATCH_TOKENS = 8192
BATCH_LOGITS = 1 << 25
"""128 MiB of logits in float32: what bounds the batch when the vocabulary is large."""
_RESAMPLES = 1000
_MANY_DOCUMENTS = 50
_FEWEST_WINDOWS = 5


@dataclass(frozen=True)
class Perplexity:
    """Sums over every scored token. `loss` is in nats per token, the interval a 95 % bootstrap over documents or windows."""

    documents: int
    tokens: int
    bytes: int
    characters: int | None
    nats: float
    bits_per_byte_ci95: tuple[float, float]
    context: int
    stride: int

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)

    @property
    def bits_per_character(self) -> float | None:
        return self.nats / math.log(2) / self.characters if self.characters else None


class Share(Protocol):
    """This process among those that score a text together; `total` sums arrays over them."""

    @property
    def rank(self) -> int: ...

    @property
    def count(self) -> int: ...

    def total(self, array: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Window:
    """`length` inputs from `start` in the shard's tokens; the last `scored` of their targets count, for `document`."""

    start: int
    length: int
    scored: int
    document: int


def windows_of(documents: list[tuple[int, int]], context: int, stride: int) -> Iterator[Window]:
    """The windows over documents given as (start, end) in a shard."""
    for number, (start, end) in enumerate(documents):
        targets, begin, scored = end - start, 0, 0
        while scored < targets:
            length = min(context, targets - begin)
            yield Window(start - 1 + begin, length, begin + length - scored, number)
            scored = begin + length
            begin += stride


@torch.no_grad()
def evaluate(
    network: nn.Module,
    shard: Shard,
    token_byte_lengths: np.ndarray,
    *,
    context: int,
    stride: int | None = None,
    max_tokens: int | None = None,
    device: torch.device,
    interval: bool = True,
    share: Share | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Perplexity:
    """Score a text. `context` is at most what the model was built for; `stride` defaults to it.

    `max_tokens` scores only the first so many. Without `interval` the bootstrap is left out, and its bounds are NaN. With `share`
    several processes score the text together, each every so manieth batch, and all get the same answer to the bit, that of one
    process. `advance` is told the tokens scored so far, after every batch and equally often in each process, and may raise to stop.
    The network's training mode is left as it was. Raises `InputError` for an empty text or a stride out of range.
    """
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise InputError(f"a stride of {stride} does not fit windows of {context} tokens", where="--stride", hint=f"1 to {context}")
    documents = _first(shard.documents(), max_tokens)
    windows = sorted(windows_of(documents, context, stride), key=lambda window: (-window.length, window.start))
    if not windows:
        raise InputError("the text is empty")
    nats, sizes = np.zeros(len(windows)), np.zeros(len(windows), dtype=np.int64)
    was_training = network.training
    network.eval()
    try:
        batches = list(_batched(windows, min(BATCH_TOKENS, BATCH_LOGITS // len(token_byte_lengths))))
        starts = np.cumsum([0, *(len(batch) for batch in batches)])
        scored = np.cumsum([0, *(window.scored for window in windows)])
        rank, count = (share.rank, share.count) if share is not None else (0, 1)
        for turn in range(0, len(batches), count):
            mine = turn + rank
            number = min(mine, len(batches) - 1)  # a spread model needs all processes for every pass: some score one twice
            losses, targets = _losses(network, shard, batches[number], device)
            for row, window in enumerate(batches[number] if mine == number else ()):
                counted = slice(window.length - window.scored, window.length)
                nats[starts[number] + row] = losses[row, counted].sum()
                sizes[starts[number] + row] = token_byte_lengths[targets[row, counted]].sum()
            advance(int(scored[starts[min(turn + count, len(batches))]]))
    finally:
        network.train(was_training)
    if share is not None:
        nats, sizes = share.total(nats), share.total(sizes)
    whole = max_tokens is None or max_tokens >= shard.counts.tokens
    owners = np.array([window.document for window in windows])
    return Perplexity(
        documents=len(documents),
        tokens=sum(window.scored for window in windows),
        bytes=shard.counts.bytes if whole else int(sizes.sum()),
        characters=shard.counts.characters if whole else None,
        nats=float(nats.sum()),
        bits_per_byte_ci95=_interval(nats, sizes, owners, len(documents)) if interval else (math.nan, math.nan),
        context=context,
        stride=stride,
    )


def _first(documents: list[tuple[int, int]], max_tokens: int | None) -> list[tuple[int, int]]:
    if max_tokens is None:
        return documents
    kept, left = [], max_tokens
    for start, end in documents:
        if left <= 0:
            break
        kept.append((start, min(end, start + left)))
        left -= end - start
    return kept


def _batched(windows: list[Window], most_tokens: int) -> Iterator[list[Window]]:
    """Groups of windows, given longest first, whose padded size is at most `most_tokens`; one window at least."""
    start = 0
    while start < len(windows):
        size = max(1, most_tokens // windows[start].length)
        yield windows[start : start + size]
        start += size


def _losses(network: nn.Module, shard: Shard, batch: list[Window], device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Nats (windows, longest) in float64 and the targets' ids, padding at the end of the shorter ones."""
    tokens = np.full((len(batch), batch[0].length + 1), IGNORED, dtype=np.int64)
    for row, window in enumerate(batch):
        tokens[row, : window.length + 1] = shard.tokens[window.start : window.start + window.length + 1]
    objective = CausalObjective()
    losses = objective.losses(network, objective.example(torch.from_numpy(tokens).to(device)))
    return losses.cpu().double().numpy(), tokens[:, 1:]


def _interval(nats: np.ndarray, sizes: np.ndarray, owners: np.ndarray, documents: int) -> tuple[float, float]:
    """95 % bootstrap interval of bits per byte, resampling documents when there are many, else windows; NaN for a few windows."""
    if documents >= _MANY_DOCUMENTS:
        nats = np.bincount(owners, weights=nats, minlength=documents)
        sizes = np.bincount(owners, weights=sizes, minlength=documents)
    if len(nats) < _FEWEST_WINDOWS:
        return math.nan, math.nan
    generator = np.random.default_rng(0)
    estimates = np.empty(_RESAMPLES)
    for index in range(_RESAMPLES):
        chosen = generator.integers(0, len(nats), len(nats))
        estimates[index] = nats[chosen].sum() / max(float(sizes[chosen].sum()), 1.0)
    low, high = np.quantile(estimates / math.log(2), (0.025, 0.975))
    return float(low), float(high)
