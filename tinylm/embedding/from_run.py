"""Vectors out of a trained language model: its input or output embedding, or what a layer makes of tokens in context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinylm.embedding.text import token_names, word_spans
from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError
from tinylm.model.transformer import Transformer
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Checkpoint, Run
from tinylm.text.sources import Corpus, describe


def static(run: Run, checkpoint: Checkpoint, which: str) -> Vectors:
    """The table that reads tokens (`input`) or the one that predicts them (`output`), a row per token."""
    network = run.network(checkpoint, torch.device("cpu"))
    module = network.embedding if which == "input" else network.head
    matrix = module.weight.detach().numpy().copy()
    return Vectors(token_names(run.tokenizer), matrix, byte_mapped=True, notes=_notes(run, checkpoint, which))


def contextual(
    run: Run,
    checkpoint: Checkpoint,
    sources: Sequence[str],
    *,
    layer: int | None = None,
    words: bool = False,
    min_count: int = 1,
    field: str = "text",
    errors: str = "strict",
    device: torch.device | None = None,
    reporter: Reporter = SILENT,
) -> Vectors:
    """For each token of a text the mean, over its occurrences, of the residual stream after `layer` blocks (0: before any).

    `layer` None: half of them. Every token is seen with at least half a context before it, where the document has so much.
    With `words`: for each word the mean over all tokens of its occurrences. Raises `InputError` for a layer that is not
    there and for a text without anything that occurs `min_count` times.
    """
    depth = run.recipe.model.n_layer
    layer = (depth + 1) // 2 if layer is None else layer
    if layer > depth:
        raise InputError(f"the model has {depth} blocks, so 0 to {depth}", where=f"--layer {layer}")
    device = device or torch.device("cpu")
    network = run.network(checkpoint, device)
    names = token_names(run.tokenizer)
    sums = _Sums(0 if words else len(names), network.model.n_embd)
    with Corpus(sources, field=field, errors=errors) as corpus, reporter.progress("reading", None, "") as advance:
        done = 0
        for piece in corpus.pieces():
            encoding = run.tokenizer.backend.encode(piece.text, add_special_tokens=False)
            ids = np.array(encoding.ids, dtype=np.int64)
            keys = _word_keys(piece.text, encoding.offsets, sums) if words else ids
            for span, hidden in _states(network, ids, run.tokenizer.end_of_text, layer, device):
                sums.add(keys[span], hidden)
            done += len(ids)
            advance(done)
    kept = np.flatnonzero(sums.counts >= min_count)
    kept = kept[np.argsort(-sums.counts[kept], kind="stable")]
    if not len(kept):
        raise InputError(f"nothing in this text occurs {min_count} times", where=describe(sources), hint="lower --min-count")
    matrix = (sums.sums.numpy()[kept] / sums.counts[kept, None]).astype(np.float32)
    chosen = [sums.words[row] for row in kept] if words else [names[row] for row in kept]
    notes = {**_notes(run, checkpoint, "contextual"), "layer": layer, "sources": list(sources)}
    return Vectors(chosen, matrix, sums.counts[kept], byte_mapped=not words, notes=notes)


def _notes(run: Run, checkpoint: Checkpoint, which: str) -> dict[str, Any]:
    return {"run": run.name, "checkpoint": checkpoint.name, "which": which, "tokenizer": run.tokenizer.fingerprint}


class _Sums:
    """Sums of vectors by key; keys are token ids, or numbers given to words as they come."""

    def __init__(self, rows: int, width: int) -> None:
        self.sums = torch.zeros((rows, width), dtype=torch.float64)
        self.counts = np.zeros(rows, dtype=np.int64)
        self.numbers: dict[str, int] = {}

    @property
    def words(self) -> list[str]:
        return list(self.numbers)

    def add(self, keys: np.ndarray, vectors: Tensor) -> None:
        """Add each row of `vectors` to its key; a negative key to none."""
        missing = len(self.numbers) - len(self.sums)
        if missing > 0:
            more = max(missing, len(self.sums))
            self.sums = torch.cat([self.sums, self.sums.new_zeros((more, self.sums.shape[1]))])
            self.counts = np.concatenate([self.counts, np.zeros(more, dtype=np.int64)])
        known = keys >= 0
        self.sums.index_add_(0, torch.from_numpy(keys[known]), vectors[torch.from_numpy(known)])
        self.counts += np.bincount(keys[known], minlength=len(self.counts))


def _word_keys(text: str, offsets: Sequence[tuple[int, int]], sums: _Sums) -> np.ndarray:
    """For each token the number of the word in which its last character stands, or -1."""
    spans = word_spans(text)
    starts = np.array([start for start, _ in spans], dtype=np.int64)
    ends = np.array([end for _, end in spans], dtype=np.int64)
    numbers = [sums.numbers.setdefault(text[start:end].lower(), len(sums.numbers)) for start, end in spans]
    last = np.array([end - 1 for _, end in offsets], dtype=np.int64)
    place = np.searchsorted(starts, last, side="right") - 1
    inside = (place >= 0) & (last < np.concatenate([ends, [0]])[place])
    return np.where(inside, np.array([*numbers, -1], dtype=np.int64)[place], -1)


@torch.no_grad()
def _states(
    network: Transformer, ids: np.ndarray, start_token: int | None, layer: int, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """(which tokens, their states after `layer` blocks): each once, in windows that overlap by half."""
    lead = [] if start_token is None else [start_token]
    context = network.model.context_length - len(lead)
    stride = max(1, context // 2)
    begin = scored = 0
    while scored < len(ids):
        window = ids[begin : begin + context]
        tokens = torch.from_numpy(np.concatenate([np.array(lead, dtype=np.int64), window]))[None].to(device)
        states = _after(network, tokens, layer)[0, len(lead) :]
        yield slice(scored, begin + len(window)), states[scored - begin :].double().cpu()
        scored = begin + len(window)
        begin += stride


def _after(network: Transformer, tokens: Tensor, layer: int) -> Tensor:
    """The residual stream (1, T, C) after `layer` blocks."""
    caught: list[Tensor] = []

    def before(module: Any, arguments: tuple[Any, ...]) -> None:
        caught.append(arguments[0])

    def after(module: Any, arguments: Any, result: tuple[Any, ...]) -> None:
        caught.append(result[0])

    block = network.blocks[max(layer - 1, 0)]
    hook = block.register_forward_hook(after) if layer else block.register_forward_pre_hook(before)
    try:
        network.hidden(tokens)
    finally:
        hook.remove()
    return caught[0]
