"""Compute vectors for whole texts by pooling the hidden states of a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tinylm.cost.memory import EVALUATION_BATCH_TOKENS
from tinylm.data.framing import Framing, TextCounts, batches_by_length
from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError
from tinylm.model.classifier import pool, text_hidden, without_classifier
from tinylm.reporting import SILENT, Reporter
from tinylm.run import NORMALIZED, Checkpoint, Run

POOLS = ("cls", "mean", "last")
WHICH = "sentence"
"""The value of `which` in the notes that `table` stores with its vectors."""


@torch.no_grad()
def sentence_vectors(
    run: Run,
    texts: Sequence[str],
    how: str = "mean",
    *,
    checkpoint: Checkpoint | None = None,
    device: torch.device | None = None,
    reporter: Reporter = SILENT,
    counts: TextCounts | None = None,
) -> np.ndarray:
    """Return one vector per text, float32 (texts, width). `how` is the pooling method: `cls`, `mean` or `last`.

    If the run was imported from a model whose sentence vectors have length 1, so have these. Long texts are truncated to the
    context length. `counts` receives their number, which is reported. Raises `InputError` for `cls` with a causal model.
    """
    network = without_classifier(run.network(checkpoint or run.checkpoint(), device or torch.device("cpu")))
    if how == "cls" and network.is_causal:
        raise InputError(
            f"cls is the first token, which cannot depend on the text in a model with the {network.architecture} architecture",
            where="--pool",
            hint="use mean or last",
        )
    framing = Framing.of(run.tokenizer, network.model)
    encoded = [run.tokenizer.encode(text) for text in texts]
    counts = TextCounts() if counts is None else counts
    counts.add(map(len, encoded), framing.room)
    counts.report(reporter)
    framed = [framing.frame(ids) for ids in encoded]
    vectors = np.zeros((len(framed), network.input_embedding().embedding_dim), dtype=np.float32)
    done = 0
    with reporter.progress("reading", len(framed), "texts") as advance:
        for batch in batches_by_length([len(ids) for ids in framed], EVALUATION_BATCH_TOKENS):
            tokens, segments = (
                torch.from_numpy(array).to(network.device) for array in framing.rows([framed[index] for index in batch])
            )
            vectors[batch] = pool(text_hidden(network, tokens, segments), segments, how).float().cpu().numpy()
            done += len(batch)
            advance(done)
    if run.environment.get(NORMALIZED):
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def table(run: Run, texts: Sequence[str], how: str, **options: Any) -> Vectors:
    """Return one vector per distinct text that is not empty. The names are the texts themselves.

    The number of duplicates is reported. Raises `InputError` if there are no texts.
    """
    counts = TextCounts()
    distinct = list(dict.fromkeys(counts.without_empty(texts)))
    if not distinct:
        raise InputError("there are no texts", hint="provide a text with one sentence per line")
    if duplicates := len(texts) - counts.empty - len(distinct):
        shown = f"{duplicates:,} duplicate text{'s' * (duplicates != 1)} skipped"
        options.get("reporter", SILENT).note(f"{shown}: there is one vector for each distinct text")
    matrix = sentence_vectors(run, distinct, how, counts=counts, **options)
    chosen = options.get("checkpoint") or run.checkpoint()
    notes = {"run": run.name, "run_path": str(run.path.absolute()), "checkpoint": chosen.name, "which": WHICH, "pool": how}
    return Vectors(distinct, matrix, notes={**notes, "tokenizer": run.tokenizer.fingerprint})


def query_vector(vectors: Vectors, text: str, run_path: str | None = None) -> np.ndarray:
    """Compute the vector of a new text with the run and the pooling method that produced `vectors`.

    Pass `run_path` if the run has moved.

    Raises `InputError` if the run is missing or has a different tokenizer.
    """
    path = run_path or vectors.notes.get("run_path")
    if not isinstance(path, str):
        raise InputError(
            "the vectors file does not say which run computed the vectors", where="--run", hint="specify the run with --run"
        )
    run = Run.open(path)
    if run.tokenizer.fingerprint != vectors.notes.get("tokenizer"):
        raise InputError("is not the run that computed these vectors", where=str(run.path))
    how = vectors.notes.get("pool")
    if how not in POOLS:
        raise InputError("the notes stored with the vectors are damaged: invalid `pool`", where="--vectors")
    checkpoint = run.checkpoint(str(vectors.notes.get("checkpoint")))
    vector: np.ndarray = sentence_vectors(run, [text], how, checkpoint=checkpoint)[0]
    return vector
