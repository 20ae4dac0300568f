"""Extract vectors from a trained language model: its input or output embedding, or the mean hidden state of each token or word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinylm.embedding.encoded_text import token_names, word_spans
from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError
from tinylm.model.base import Model
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Checkpoint, Run
from tinylm.text.sources import Corpus, describe
from tinylm.tokenizer.backend_errors import translate_backend_errors


def static_vectors(run: Run, checkpoint: Checkpoint, which: str) -> Vectors:
    """Return the vectors of all tokens: the token embedding (`which="input"`) or the output projection (`which="output"`)."""
    network = run.network(checkpoint, torch.device("cpu"))
    module = network.input_embedding() if which == "input" else network.output_embedding()
    matrix = module.weight.detach().numpy().copy()
    return Vectors(token_names(run.tokenizer), matrix, byte_mapped=True, notes=_notes(run, checkpoint, which))


def contextual_vectors(
    run: Run,
    checkpoint: Checkpoint,
    sources: Sequence[str],
    *,
    layer: int | None = None,
    words: bool = False,
    min_count: int = 1,
    field: str = "text",
    template: str | None = None,
    errors: str = "strict",
    device: torch.device | None = None,
    reporter: Reporter = SILENT,
) -> Vectors:
    """Average the residual stream after `layer` blocks over all occurrences of each token in a text.

    A `layer` of 0 means the input to the first block. The default is half the number of blocks, rounded up. Before each token, the
    model sees at least half a context window of text, or everything before the token if that is shorter. With `words`, average over
    every token in every occurrence of a word. Raises `InputError` if the layer does not exist, the text is empty, or no token or
    word occurs at least `min_count` times.
    """
    device = device or torch.device("cpu")
    network = run.network(checkpoint, device)
    depth = network.depth
    if not depth:
        raise InputError(f"a model with the {network.architecture} architecture has no residual stream")
    layer = (depth + 1) // 2 if layer is None else layer
    if layer > depth:
        raise InputError(f"must be from 0 to {depth}, the number of blocks", where=f"--layer {layer}")
    names = token_names(run.tokenizer)
    sums = _VectorSums(0 if words else len(names), network.input_embedding().embedding_dim)
    with (
        Corpus(sources, field=field, template=template, errors=errors) as corpus,
        reporter.progress("reading", None, "") as advance,
    ):
        done = 0
        for piece in corpus.pieces():
            with translate_backend_errors():
                encoding = run.tokenizer.backend.encode(piece.text, add_special_tokens=False)
            ids = np.array(encoding.ids, dtype=np.int64)
            keys = _word_numbers(piece.text, encoding.offsets, sums) if words else ids
            for span, states in _hidden_states(network, ids, run.tokenizer.end_of_text, layer, device):
                sums.add(keys[span], states)
            done += len(ids)
            advance(done)
    if not done:
        raise InputError("the text is empty", where=describe(sources))
    kept = np.flatnonzero(sums.counts >= min_count)
    kept = kept[np.argsort(-sums.counts[kept], kind="stable")]
    if not len(kept):
        noun = "words" if words else "tokens"
        raise InputError(
            f"no {noun} in this text occur {min_count} times or more", where=describe(sources), hint="lower --min-count"
        )
    matrix = (sums.sums.numpy()[kept] / sums.counts[kept, None]).astype(np.float32)
    chosen = [sums.words[row] for row in kept] if words else [names[row] for row in kept]
    notes = {**_notes(run, checkpoint, "contextual"), "layer": layer, "sources": list(sources)}
    return Vectors(chosen, matrix, sums.counts[kept], byte_mapped=not words, notes=notes)


def _notes(run: Run, checkpoint: Checkpoint, which: str) -> dict[str, Any]:
    return {"run": run.name, "checkpoint": checkpoint.name, "which": which, "tokenizer": run.tokenizer.fingerprint}


class _VectorSums:
    """Running sums of vectors by key. A key is a token id or a word number. Words are numbered in order of first occurrence."""

    def __init__(self, rows: int, width: int) -> None:
        self.sums = torch.zeros((rows, width), dtype=torch.float64)
        self.counts = np.zeros(rows, dtype=np.int64)
        self.word_numbers: dict[str, int] = {}

    @property
    def words(self) -> list[str]:
        return list(self.word_numbers)

    def add(self, keys: np.ndarray, vectors: Tensor) -> None:
        """Add `vectors[i]` to the sum for `keys[i]`. Skip negative keys. Shapes: `keys` (tokens,), `vectors` (tokens, width)."""
        missing = len(self.word_numbers) - len(self.sums)
        if missing > 0:
            extra = max(missing, len(self.sums))
            self.sums = torch.cat([self.sums, self.sums.new_zeros((extra, self.sums.shape[1]))])
            self.counts = np.concatenate([self.counts, np.zeros(extra, dtype=np.int64)])
        known = keys >= 0
        self.sums.index_add_(0, torch.from_numpy(keys[known]), vectors[torch.from_numpy(known)])
        self.counts += np.bincount(keys[known], minlength=len(self.counts))


def _word_numbers(text: str, offsets: Sequence[tuple[int, int]], sums: _VectorSums) -> np.ndarray:
    """Return, for each token, the number of the word that contains the token's last character, or -1 if there is none."""
    spans = word_spans(text)
    starts = np.array([start for start, _ in spans], dtype=np.int64)
    ends = np.array([end for _, end in spans], dtype=np.int64)
    numbers = [sums.word_numbers.setdefault(text[start:end].lower(), len(sums.word_numbers)) for start, end in spans]
    last = np.array([end - 1 for _, end in offsets], dtype=np.int64)
    index = np.searchsorted(starts, last, side="right") - 1
    inside = (index >= 0) & (last < np.concatenate([ends, [0]])[index])
    return np.where(inside, np.array([*numbers, -1], dtype=np.int64)[index], -1)


@torch.no_grad()
def _hidden_states(
    network: Model, ids: np.ndarray, start_token: int | None, layer: int, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (slice of `ids`, hidden states after `layer` blocks), with the states as (tokens, width).

    The windows overlap by half, but each token is yielded only once.
    """
    prefix = [] if start_token is None else [start_token]
    context = network.model.context_length - len(prefix)
    stride = max(1, context // 2)
    name = f"blocks.{layer - 1}.resid_post" if layer else "blocks.0.resid_pre"
    begin = done = 0
    while done < len(ids):
        window = ids[begin : begin + context]
        tokens = torch.from_numpy(np.concatenate([np.array(prefix, dtype=np.int64), window]))[None].to(device)
        with network.caching([name]) as cache:
            network.hidden(tokens)  # the logits are not needed
        states = cache[name][0, len(prefix) :]
        yield slice(done, begin + len(window)), states[done - begin :].double().cpu()
        done = begin + len(window)
        begin += stride
