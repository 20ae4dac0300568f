"""Perplexity one can compare: every token of a text scored exactly once, each document by itself.

A document is read in windows of `context` tokens that advance by `stride`; a window scores the tokens that no window
before it has scored, so that each has at least context - stride tokens before it, or all there are. The first token of a
document is predicted from the end-of-text token. Logits, and what the last block does for one position alone, are computed only
where a token is scored. Arithmetic is float32 inside the model and float64 in every sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.data.shards import Shard
from tinylm.errors import InputError
from tinylm.model.transformer import Transformer

BATCH_TOKENS = 8192
BATCH_LOGITS = 1 << 25
"""128 MiB of logits in float32: what bounds the batch when the vocabulary is large."""
_RESAMPLES = 1000
_MANY_DOCUMENTS = 50
_FEWEST_WINDOWS = 5


@dataclass(frozen=True)
class Scored:
    """Tokens of one batch that were scored, in no order: where they stand in the shard, how many tokens they were predicted from,
    their nats, and the logits (scored, V).
    """

    places: np.ndarray
    contexts: np.ndarray
    nats: np.ndarray
    logits: Tensor


Observe = Callable[[Scored], None]


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
    network: Transformer,
    shard: Shard,
    token_byte_lengths: np.ndarray,
    *,
    context: int,
    stride: int | None = None,
    max_tokens: int | None = None,
    across_documents: bool = False,
    device: torch.device,
    bootstrap: bool = True,
    share: Share | None = None,
    advance: Callable[[int], None] = lambda done: None,
    observe: Observe | None = None,
) -> Perplexity:
    """Score a text. `context` is at most what the model was built for; `stride` defaults to it.

    `max_tokens` scores only the first so many. `across_documents` lets windows reach back over the end of a document; the
    end-of-text tokens between documents are read and not scored. Without `bootstrap` the interval's bounds are NaN. With `share`
    several processes score the text together, each every so manieth batch, and all get the same answer to the bit, that of one
    process. `advance` is told the tokens scored so far, after every batch and equally often in each process, and may raise to stop;
    `observe` is shown every batch that this process scored.
    The network's training mode is left as it was. Raises `InputError` for an empty text or a stride out of range.
    """
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise InputError(f"a stride of {stride} does not fit windows of {context} tokens", where="--stride", hint=f"1 to {context}")
    documents = _first(shard.documents(), max_tokens)
    spans = [(documents[0][0], documents[-1][1])] if across_documents and documents else documents
    windows = sorted(windows_of(spans, context, stride), key=lambda window: (-window.length, window.start))
    if not windows:
        raise InputError("the text is empty")
    nats, (sizes, counts) = np.zeros(len(windows)), np.zeros((2, len(windows)), dtype=np.int64)
    was_training = network.training
    network.eval()
    try:
        batches = list(_batched(windows, min(BATCH_TOKENS, BATCH_LOGITS // len(token_byte_lengths))))
        starts = np.cumsum([0, *(len(batch) for batch in batches)])
        scored = np.cumsum([0, *(window.scored for window in windows)])
        rank, together = (share.rank, share.count) if share is not None else (0, 1)
        for turn in range(0, len(batches), together):
            number = min(turn + rank, len(batches) - 1)
            found = _score(network, shard, batches[number], device)
            if number == turn + rank:  # a spread model needs all processes for every pass: at the end some score one twice
                here = slice(starts[number], starts[number + 1])
                rows = np.repeat(np.arange(starts[number], starts[number + 1]), [window.scored for window in windows[here]])
                targets = shard.tokens[found.places]
                np.add.at(nats, rows, found.nats)
                np.add.at(sizes, rows, token_byte_lengths[targets])
                np.add.at(counts, rows, targets != shard.end_of_text)
                if observe is not None:
                    observe(found)
            del found  # its logits, before there are the next
            advance(int(scored[starts[min(turn + together, len(batches))]]))
    finally:
        network.train(was_training)
    if share is not None:
        nats, sizes, counts = share.total(nats), share.total(sizes), share.total(counts)
    whole = max_tokens is None or max_tokens >= shard.counts.tokens
    owners = np.array([window.document for window in windows])
    return Perplexity(
        documents=len(documents),
        tokens=int(counts.sum()),
        bytes=shard.counts.bytes if whole else int(sizes.sum()),
        characters=shard.counts.characters if whole else None,
        nats=float(nats.sum()),
        bits_per_byte_ci95=interval(nats, sizes, owners, len(spans)) if bootstrap else (math.nan, math.nan),
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


def _score(network: Transformer, shard: Shard, batch: list[Window], device: torch.device) -> Scored:
    """The scored tokens of some windows, window after window; end-of-text tokens cost nothing."""
    inputs = np.zeros((len(batch), batch[0].length), dtype=np.int64)
    rows, columns, places, contexts = [], [], [], []
    for row, window in enumerate(batch):
        inputs[row, : window.length] = shard.tokens[window.start : window.start + window.length]
        column = np.arange(window.length - window.scored, window.length)
        rows.append(np.full(window.scored, row))
        columns.append(column)
        places.append(window.start + 1 + column)
        contexts.append(column + 1)
    where, targets = np.concatenate(places), shard.tokens[np.concatenate(places)].astype(np.int64)
    left_out = int(np.concatenate(columns).min())  # no window of this batch scores a position before
    hidden = network.hidden(torch.from_numpy(inputs).to(device), last=inputs.shape[1] - left_out if left_out else None)
    at = torch.from_numpy(np.concatenate(columns) - left_out).to(device)
    scored = hidden[torch.from_numpy(np.concatenate(rows)).to(device), at]
    logits = network.logits(scored)
    precise = logits.float() if logits.itemsize < 4 else logits
    losses = F.cross_entropy(precise, torch.from_numpy(targets).to(device), reduction="none")
    nats = losses.cpu().double().numpy() * (targets != shard.end_of_text)
    return Scored(where, np.concatenate(contexts), nats, logits)


def interval(nats: np.ndarray, sizes: np.ndarray, owners: np.ndarray, documents: int) -> tuple[float, float]:
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
