"""Compute a model's perplexity and bits per byte on a text. Every token is scored exactly once.

Documents are scored independently. Each document is split into windows of `context` tokens that advance by `stride` tokens. A
window scores the tokens that no earlier window has scored. Each token is therefore predicted from all preceding tokens in the
document or from at least `context - stride` of them. The first token in a document is predicted from the end-of-text token. A model
with a constant-size state, such as a recurrent network, carries its state from window to window instead and predicts each token
from all preceding tokens. The model computes in float32 unless its weights are packed or the caller enables autocast. All sums are
computed in float64. The losses stay on the device until many tokens have been scored, so that the host does not wait for a GPU.

Legend: `B` windows in a batch, `T` tokens in a window, `C` width, `N` scored tokens, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tinylm.cost.memory import EVALUATION_BATCH_LOGITS, EVALUATION_BATCH_TOKENS, gpu_evaluation_batch
from tinylm.data.shards import Shard
from tinylm.device import free_memory_bytes
from tinylm.errors import InputError
from tinylm.evaluation.metrics import BITS_PER_BYTE, LOSS, Metrics, perplexity_of
from tinylm.evaluation.scoring import token_losses
from tinylm.model.base import Model, evaluation_mode
from tinylm.model.functions import attention_without_cudnn
from tinylm.model.stateful import StatefulModel
from tinylm.processes import SINGLE_PROCESS, Processes
from tinylm.recipe.transformer import TransformerSection

_BOOTSTRAP_SAMPLES = 1000
_MIN_DOCUMENTS_TO_RESAMPLE = 50
_MIN_PIECES_TO_RESAMPLE = 5
_CARRIED_WINDOW = 256
"""Tokens per window if the state is carried from window to window."""
_LOSSES_ON_DEVICE = 1 << 22
"""Number of losses to collect on the device before they are copied to the host."""


@dataclass(frozen=True)
class BatchLimits:
    """The size of evaluation batches. It affects results only through rounding."""

    tokens: int
    """Maximum number of tokens in a batch of windows, including padding."""
    logits: int | None = None
    """Maximum number of logits to compute together, or None for all logits in a batch."""

    @classmethod
    def of(cls, network: Model, vocab_size: int, processes: Processes) -> BatchLimits:
        """Return the limits for a network. A transformer in a single process on a GPU uses part of the free memory."""
        section, device = network.model, network.device
        # A sharded network needs the same number of calls in every process, so its logits are not divided.
        if (
            device.type == "cuda"
            and processes.world_size == 1
            and isinstance(section, TransformerSection)
            and section.attention_softcap is None  # otherwise, all attention scores are stored
        ):
            return cls(*gpu_evaluation_batch(section.n_embd, free_memory_bytes(device)))
        return cls(min(EVALUATION_BATCH_TOKENS, EVALUATION_BATCH_LOGITS // vocab_size))


@dataclass(frozen=True)
class EvaluationOptions:
    """How to split a text into windows, and which tokens to score."""

    context: int | None = None
    """Tokens per window. The default and maximum is the model's context length."""
    stride: int | None = None
    """Number of tokens by which windows advance. By default this is the context, so windows do not overlap.

    If both `context` and `stride` are None, a `StatefulModel` carries its state through each document.
    """
    max_tokens: int | None = None
    """Score only this many tokens from the beginning of the text."""
    across_documents: bool = False
    """Let windows cross document boundaries. The end-of-text tokens at these boundaries serve as context but are not scored."""
    confidence_interval: bool = True
    """Compute a bootstrap interval for bits per byte. If false, the interval bounds are NaN."""

    def window_size(self, context_length: int) -> tuple[int, int]:
        """Return the context and stride for a model with this context length. Raises `InputError` if either is out of range."""
        context = context_length if self.context is None else self.context
        if not 1 <= context <= context_length:
            raise InputError(f"must be 1 to {context_length} (the model's context length), not {context}", where="--context")
        stride = context if self.stride is None else self.stride
        if not 1 <= stride <= context:
            raise InputError(f"must be 1 to {context} (the context), not {stride}", where="--stride")
        return context, stride


@dataclass(frozen=True)
class ScoredBatch:
    """The scored tokens in one batch of windows. They are not sorted by position."""

    positions: np.ndarray
    """`(N,)`: index of each token in the shard."""
    context_lengths: np.ndarray
    """`(N,)`: number of tokens that each token was predicted from."""
    is_text: np.ndarray
    """`(N,)`: false for end-of-text tokens."""
    losses: Tensor
    """`(N,)`: loss of each token in nats, on the device."""
    logits: Tensor
    """`(N, V)`: logits that predict each token, on the device."""

    @cached_property
    def nats(self) -> np.ndarray:
        """`(N,)`: loss of each token; 0 for end-of-text tokens. The first access waits for the device."""
        nats: np.ndarray = _on_host(self.losses) * self.is_text
        return nats


@dataclass(frozen=True)
class Perplexity:
    """The result of an evaluation: sums over all scored tokens.

    `bits_per_byte_ci95` is a 95% bootstrap interval over documents or windows. `characters` is None if only part of the text was
    scored.
    """

    documents: int
    tokens: int
    bytes: int
    characters: int | None
    nats: float
    bits_per_byte_ci95: tuple[float, float]
    context: int | None
    """Tokens per window, or None if each token was predicted from all preceding tokens in its document."""
    stride: int | None
    """Tokens by which windows advanced, or None if the model carried its state from window to window."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)

    @property
    def metrics(self) -> Metrics:
        """The metrics that are logged during training."""
        return Metrics(LOSS.name, {LOSS.name: self.loss, BITS_PER_BYTE.name: self.bits_per_byte})

    @property
    def bits_per_character(self) -> float | None:
        return self.nats / math.log(2) / self.characters if self.characters else None


@dataclass(frozen=True)
class Window:
    """A window of `length` input tokens that begins at `start` in the shard.

    The last `scored` targets are scored and belong to `document`.
    """

    start: int
    length: int
    scored: int
    document: int
    preceding: int = 0
    """Number of tokens in the document before this window that the model has already read."""


def _longest_first(window: Window) -> tuple[int, int]:
    """The key by which windows are sorted into batches."""
    return -window.length, window.start


def sliding_windows(documents: list[tuple[int, int]], context: int, stride: int) -> Iterator[Window]:
    """Split documents into windows that score every token exactly once. Each document is a range (start, end) in a shard."""
    for number, (start, end) in enumerate(documents):
        targets, begin, scored = end - start, 0, 0
        while scored < targets:
            length = min(context, targets - begin)
            yield Window(start - 1 + begin, length, begin + length - scored, number)
            scored = begin + length
            begin += stride


@torch.no_grad()
def evaluate(
    network: Model,
    shard: Shard,
    token_byte_lengths: np.ndarray,
    options: EvaluationOptions = EvaluationOptions(),
    *,
    processes: Processes = SINGLE_PROCESS,
    on_progress: Callable[[int], None] = lambda tokens: None,
    on_batch: Callable[[ScoredBatch], None] = lambda batch: None,
    limits: BatchLimits | None = None,
) -> Perplexity:
    """Score a text in evaluation mode. The network's training mode is restored afterwards.

    With several `processes`, each rank scores every `world_size`-th batch, or every `world_size`-th group of documents if the state
    is carried. All ranks return the same result, which is bit-identical to that of a single process with the same `limits`. After
    every batch, `on_progress` receives the number of tokens scored so far. It is called the same number of times on every rank and
    may raise an exception to stop the evaluation. `on_batch` receives the batches that this rank scored, divided into parts with at
    most `limits.logits` logits. `limits` defaults to `BatchLimits.of`. Raises `InputError` if the text is empty, if the context or
    stride is out of range, or if the model is not causal.
    """
    if not network.is_causal:
        raise InputError(f"a model with the {network.architecture} architecture does not predict the next token")
    context, stride = options.window_size(network.model.context_length)
    carried = isinstance(network, StatefulModel) and options.context is None and options.stride is None
    spans = _spans(shard, options)
    limits = limits or BatchLimits.of(network, len(token_byte_lengths), processes)
    rows = None if limits.logits is None else max(1, limits.logits // len(token_byte_lengths))
    groups = list(_carried_groups(spans, limits.tokens) if carried else _groups(spans, context, stride, limits.tokens))
    if not groups:
        raise InputError("the text is empty")
    sums = _WindowSums(shard, token_byte_lengths, groups)
    tokens = 0
    with evaluation_mode(network), attention_without_cudnn(network.device):
        for first in range(0, len(groups), processes.world_size):
            # A sharded model needs all ranks in every forward pass, so ranks without their own batch repeat their last batch.
            own = min(first + processes.rank, len(groups) - 1)
            group, peers = groups[own], groups[first : first + processes.world_size]
            state = None
            for number in range(max(map(len, peers))):
                index = min(number, len(group) - 1)
                if carried:
                    scored, state = _run_and_carry(network, shard, group[index], state)
                else:
                    scored = _run(network, shard, group[index])
                if own == first + processes.rank and index == number:
                    sums.start(own, index)
                for part in scored.parts(rows):
                    if own == first + processes.rank and index == number:
                        sums.add(part)
                        on_batch(part)
                    del part  # free its logits before the next part
                del scored
                tokens += sum(window.scored for peer in peers if number < len(peer) for window in peer[number])
                on_progress(tokens)
    sums.reduce(processes)
    return _summarize(shard, options, sums.nats, sums.bytes, sums.tokens, sums.documents, None if carried else (context, stride))


def summarize_losses(
    nats: np.ndarray, shard: Shard, token_byte_lengths: np.ndarray, options: EvaluationOptions, window: tuple[int, int] | None
) -> Perplexity:
    """Summarize losses that have already been computed, as `evaluate` does.

    `nats` contains the loss of each token in the shard, or NaN if it was not scored. `window` contains the context and the stride
    of the evaluation, or None if the models carried their state through each document.
    """
    spans = _spans(shard, options)
    windows = sorted(sliding_windows(spans, *(window or (_CARRIED_WINDOW, _CARRIED_WINDOW))), key=_longest_first)
    ends = np.array([each.start + each.length + 1 for each in windows])
    counts = np.array([each.scored for each in windows])
    owners = np.repeat(np.arange(len(windows)), counts)
    positions = np.arange(len(owners)) + np.repeat(ends - np.cumsum(counts), counts)
    scored = nats[positions]
    is_text = ~np.isnan(scored)
    sums = np.zeros(len(windows))
    np.add.at(sums, owners, np.where(is_text, scored, 0.0))
    sizes, tokens = np.zeros((2, len(windows)), dtype=np.int64)
    np.add.at(sizes, owners, token_byte_lengths[shard.tokens[positions]])
    np.add.at(tokens, owners, is_text)
    return _summarize(shard, options, sums, sizes, tokens, np.array([each.document for each in windows]), window)


def _summarize(
    shard: Shard,
    options: EvaluationOptions,
    nats: np.ndarray,
    sizes: np.ndarray,
    tokens: np.ndarray,
    owners: np.ndarray,
    window: tuple[int, int] | None,
) -> Perplexity:
    """Return the result for each window's nats, bytes (`sizes`), tokens and document (`owners`)."""
    complete = options.max_tokens is None or options.max_tokens >= shard.counts.tokens
    interval = (math.nan, math.nan)
    if options.confidence_interval:
        interval = bootstrap_interval(nats, sizes, owners, len(_spans(shard, options)))
    return Perplexity(
        documents=len(_first_tokens(shard.documents(), options.max_tokens)),
        tokens=int(tokens.sum()),
        bytes=shard.counts.bytes if complete else int(sizes.sum()),
        characters=shard.counts.characters if complete else None,
        nats=float(nats.sum()),
        bits_per_byte_ci95=interval,
        context=None if window is None else window[0],
        stride=None if window is None else window[1],
    )


def _spans(shard: Shard, options: EvaluationOptions) -> list[tuple[int, int]]:
    """Return the ranges (start, end) of the shard that windows do not cross: documents, or the whole text."""
    documents = _first_tokens(shard.documents(), options.max_tokens)
    return [(documents[0][0], documents[-1][1])] if options.across_documents and documents else documents


def _first_tokens(documents: list[tuple[int, int]], max_tokens: int | None) -> list[tuple[int, int]]:
    """Return the documents that contain the first `max_tokens` tokens. The last one is truncated."""
    if max_tokens is None:
        return documents
    kept, remaining = [], max_tokens
    for start, end in documents:
        if remaining <= 0:
            break
        kept.append((start, min(end, start + remaining)))
        remaining -= end - start
    return kept


Group = list[list[Window]]
"""Batches that one rank scores in sequence. If the state is carried, each batch continues the documents of the previous one."""


def _groups(spans: list[tuple[int, int]], context: int, stride: int, max_tokens: int) -> Iterator[Group]:
    """Yield groups that contain a single batch of independent windows. The longest windows come first."""
    windows = sorted(sliding_windows(spans, context, stride), key=_longest_first)
    for batch in _batches(windows, max_tokens):
        yield [batch]


def _carried_groups(spans: list[tuple[int, int]], max_tokens: int) -> Iterator[Group]:
    """Yield groups of documents, longest first. Batch i in a group contains window i of each document that is long enough."""
    windows: dict[int, list[Window]] = {}
    for window in sliding_windows(spans, _CARRIED_WINDOW, _CARRIED_WINDOW):
        document = windows.setdefault(window.document, [])
        document.append(replace(window, preceding=_CARRIED_WINDOW * len(document)))
    documents = sorted(windows.values(), key=lambda document: -(_CARRIED_WINDOW * len(document) + document[-1].length))
    rows = max(1, max_tokens // _CARRIED_WINDOW)
    for start in range(0, len(documents), rows):
        group = documents[start : start + rows]
        yield [[document[i] for document in group if i < len(document)] for i in range(len(group[0]))]


def _batches(windows: list[Window], max_tokens: int) -> Iterator[list[Window]]:
    """Group windows, sorted longest first, into batches. A batch has up to `max_tokens` tokens with padding, or a single window."""
    start = 0
    while start < len(windows):
        size = max(1, max_tokens // windows[start].length)
        yield windows[start : start + size]
        start += size


class _WindowSums:
    """Nats, bytes and tokens for each window. They are complete after `reduce`."""

    def __init__(self, shard: Shard, token_byte_lengths: np.ndarray, groups: list[Group]) -> None:
        batches = [batch for group in groups for batch in group]
        windows = [window for batch in batches for window in batch]
        self.documents = np.array([window.document for window in windows])
        self.nats = np.zeros(len(windows))
        self.bytes, self.tokens = np.zeros((2, len(windows)), dtype=np.int64)
        self._shard = shard
        self._token_byte_lengths = token_byte_lengths
        self._scored = np.array([window.scored for window in windows])
        self._starts = np.cumsum([0, *(len(batch) for batch in batches)])
        self._groups = np.cumsum([0, *map(len, groups)])
        self._owners = np.array([], dtype=np.int64)  # the windows of the tokens in the current batch
        self._added: list[tuple[np.ndarray, np.ndarray, Tensor]] = []  # windows, whether tokens are text, and losses on the device

    def start(self, group: int, index: int) -> None:
        """Start batch `index` in group `group`."""
        start, end = self._starts[self._groups[group] + index : self._groups[group] + index + 2]
        self._owners = np.repeat(np.arange(start, end), self._scored[start:end])

    def add(self, part: ScoredBatch) -> None:
        """Add the next scored tokens of the current batch, without waiting for the device."""
        owners, self._owners = np.split(self._owners, [len(part.positions)])
        np.add.at(self.bytes, owners, self._token_byte_lengths[self._shard.tokens[part.positions]])
        np.add.at(self.tokens, owners, part.is_text)
        self._added.append((owners, part.is_text, part.losses))
        if sum(len(added) for added, _, _ in self._added) >= _LOSSES_ON_DEVICE:
            self._add_losses()

    def _add_losses(self) -> None:
        if not self._added:
            return
        owners, is_text, losses = zip(*self._added, strict=True)
        np.add.at(self.nats, np.concatenate(owners), _on_host(torch.cat(losses)) * np.concatenate(is_text))
        self._added.clear()

    def reduce(self, processes: Processes) -> None:
        """Sum over the ranks. Each window was scored by exactly one rank, so the sums are exact."""
        self._add_losses()
        self.nats, self.bytes, self.tokens = processes.sum(self.nats), processes.sum(self.bytes), processes.sum(self.tokens)


def _on_host(losses: Tensor) -> np.ndarray:
    """Copy losses to the host, in float64."""
    on_host: np.ndarray = losses.cpu().double().numpy()  # the device may not support float64
    return on_host


def _on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to the device. On a GPU, the copy is queued."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class _ForwardPass:
    """The result of running the network on a batch of windows, in window order."""

    network: Model
    positions: np.ndarray
    """`(N,)`"""
    context_lengths: np.ndarray
    """`(N,)`"""
    hidden: Tensor
    """`(N, C)`: hidden states that predict each scored token."""
    targets: np.ndarray
    """`(N,)`"""
    is_text: np.ndarray
    """`(N,)`"""

    def parts(self, rows: int | None) -> Iterator[ScoredBatch]:
        """Compute the losses of up to `rows` tokens at a time, or of all tokens if `rows` is None."""
        targets = _on_device(self.targets, self.hidden.device)
        for start in range(0, len(targets), rows or len(targets)):
            part = slice(start, None if rows is None else start + rows)
            logits = self.network.logits(self.hidden[part])  # (rows, V)
            losses = token_losses(logits, targets[part])
            yield ScoredBatch(self.positions[part], self.context_lengths[part], self.is_text[part], losses, logits)
            del logits  # free them before the next part's logits are allocated


def _run(network: Model, shard: Shard, batch: list[Window]) -> _ForwardPass:
    inputs = _inputs(network, shard, batch)
    skipped = min(window.length - window.scored for window in batch)  # no window in this batch scores the columns before this one
    hidden = network.hidden(inputs, n_last=inputs.shape[1] - skipped if skipped else None)
    return _forward_pass(network, shard, batch, hidden, skipped)


def _run_and_carry(network: Model, shard: Shard, batch: list[Window], state: Tensor | None) -> tuple[_ForwardPass, Tensor]:
    """Like `_run`, but start from `state`, or from an empty state at the beginning of documents. Also returns the new state."""
    assert isinstance(network, StatefulModel)
    before = network.empty_state(len(batch)) if state is None else state[: len(batch)]
    hidden, after = network.continue_from(_inputs(network, shard, batch), before)
    return _forward_pass(network, shard, batch, hidden, 0), after


def _inputs(network: Model, shard: Shard, batch: list[Window]) -> Tensor:
    """Return the ids (B, T) for a batch of windows, padded at the end."""
    inputs = np.zeros((len(batch), batch[0].length), dtype=np.int64)  # (B, T)
    for row, window in enumerate(batch):
        inputs[row, : window.length] = shard.tokens[window.start : window.start + window.length]
    return _on_device(inputs, network.device)


def _forward_pass(network: Model, shard: Shard, batch: list[Window], hidden: Tensor, skipped: int) -> _ForwardPass:
    """Select the scored positions of a batch. `hidden` (B, T - skipped, C) omits the first `skipped` columns."""
    rows, columns, positions, context_lengths = [], [], [], []
    for row, window in enumerate(batch):
        column = np.arange(window.length - window.scored, window.length)
        rows.append(np.full(window.scored, row))
        columns.append(column)
        positions.append(window.start + 1 + column)
        context_lengths.append(window.preceding + column + 1)
    scored_positions = np.concatenate(positions)  # (N,)
    targets = shard.tokens[scored_positions].astype(np.int64)
    row_index, column_index = _on_device(np.stack((np.concatenate(rows), np.concatenate(columns) - skipped)), hidden.device)
    scored = hidden[row_index, column_index]  # (N, C)
    is_text = targets != shard.end_of_text
    return _ForwardPass(network, scored_positions, np.concatenate(context_lengths), scored, targets, is_text)


def bootstrap_interval(nats: np.ndarray, sizes: np.ndarray, owners: np.ndarray, documents: int) -> tuple[float, float]:
    """Return the 95% bootstrap interval for bits per byte, given each window's nats, bytes (`sizes`) and document (`owners`).

    Resamples documents if there are at least 50, otherwise windows. The bounds are NaN if there are fewer than 5 to resample.
    """
    if documents >= _MIN_DOCUMENTS_TO_RESAMPLE:
        nats = np.bincount(owners, weights=nats, minlength=documents)
        sizes = np.bincount(owners, weights=sizes, minlength=documents)
    if len(nats) < _MIN_PIECES_TO_RESAMPLE:
        return math.nan, math.nan
    generator = np.random.default_rng(0)
    estimates = np.empty(_BOOTSTRAP_SAMPLES)
    for index in range(_BOOTSTRAP_SAMPLES):
        chosen = generator.integers(0, len(nats), len(nats))
        estimates[index] = nats[chosen].sum() / max(float(sizes[chosen].sum()), 1.0)
    low, high = np.quantile(estimates / math.log(2), (0.025, 0.975))
    return float(low), float(high)
