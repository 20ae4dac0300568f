"""A model that starts from vectors has them, at the scale it would have started with."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_recipe

from tinylm.embedding.reuse import for_pieces, start_from
from tinylm.embedding.text import token_names
from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError
from tinylm.model.transformer import Transformer
from tinylm.pipeline import train
from tinylm.recipe import RecipeError
from tinylm.reporting import CollectingReporter
from tinylm.run import Run

WIDTH = 32


@pytest.fixture
def tokens(tiny_run: Run) -> Vectors:
    """A vector for all tokens but ten, far from the usual scale."""
    names = token_names(tiny_run.tokenizer)[10:]
    matrix = np.random.default_rng(0).standard_normal((len(names), WIDTH)).astype(np.float32) * 50
    return Vectors(names, matrix, byte_mapped=True)


def embedding_of(run: Run, step: int | None = None) -> np.ndarray:
    network = run.network(run.checkpoint(str(step) if step is not None else None), torch.device("cpu"))
    table: np.ndarray = network.embedding.weight.detach().numpy().copy()
    return table


def test_tokens_get_their_own_vectors_at_the_initial_deviation(tiny_run: Run, tokens: Vectors) -> None:
    network = Transformer(tiny_run.recipe.model, tiny_run.tokenizer.vocab_size, seed=1)
    before = network.embedding.weight.detach().clone()
    found = start_from(network.embedding, tokens, tiny_run.tokenizer)
    after = network.embedding.weight.detach()
    assert (found.tokens, found.vocab_size, found.from_words) == (len(tokens), tiny_run.tokenizer.vocab_size, False)
    assert (after[:10] == before[:10]).all()
    assert float(after[10:].std()) == pytest.approx(float(before.std()), rel=1e-4)
    ratio = after[10:].numpy() / tokens.matrix
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)


def test_a_piece_gets_the_mean_of_its_words(tiny_run: Run) -> None:
    """Weighted by how often they occur."""
    tokenizer = tiny_run.tokenizer
    vectors = Vectors(["object", "objects"], np.array([[1, 0], [0, 1]], dtype=np.float32), np.array([3, 1]))
    table = for_pieces(vectors, tokenizer)
    pieces = [set(tokenizer.encode(form)) for form in (" object", " objects")]
    shared = (pieces[0] & pieces[1]).pop()
    np.testing.assert_allclose(table[shared], [0.75, 0.25])
    assert table.any(axis=1).sum() < tokenizer.vocab_size


@pytest.mark.parametrize("frozen", [False, True])
def test_a_recipe_starts_from_vectors_frozen_or_not(text_file: Path, tmp_path: Path, tokens: Vectors, frozen: bool) -> None:
    tokens.save(tmp_path / "v.safetensors")
    recipe = tiny_recipe(
        text_file, "modern", f"model.init_embeddings={tmp_path / 'v.safetensors'}", f"model.freeze_embeddings={frozen}",
        "training.steps=4", "evaluation.every=2", "checkpoint.every=2", "checkpoint.keep=9",
    )  # fmt: skip
    reporter = CollectingReporter()
    train(recipe, tmp_path / "run", device="cpu", reporter=reporter)
    run = Run.open(tmp_path / "run")
    told = [note for note in reporter.notes if note.startswith("embeddings:")]
    assert len(told) == 1
    assert f"{len(tokens):,} of {run.tokenizer.vocab_size:,} tokens" in told[0]
    early, late = embedding_of(run, 2)[10:], embedding_of(run, 4)[10:]
    scale = np.linalg.norm(early) / np.linalg.norm(tokens.matrix)
    alike = np.einsum("nd,nd->n", early, tokens.matrix) * scale / np.maximum(np.square(early).sum(axis=1), 1e-12)
    assert (early.tobytes() == late.tobytes()) == frozen
    if frozen:
        np.testing.assert_allclose(alike, 1, rtol=1e-3)
        again = train(
            recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": 4})}),
            tmp_path / "run", device="cpu", resume=True,
        )  # fmt: skip
        assert again.step == 4
        shutil.rmtree(run.path / "checkpoints")
        train(recipe, run.path, device="cpu", resume=True, reporter=reporter)
        assert len([note for note in reporter.notes if note.startswith("embeddings:")]) == 2, "it begins again, from the vectors"
        assert embedding_of(Run.open(run.path), 4)[10:].tobytes() == late.tobytes()
    assert np.corrcoef(late.ravel(), tokens.matrix.ravel())[0, 1] > 0.9


def test_what_does_not_fit(tiny_run: Run, tokens: Vectors, text_file: Path) -> None:
    network = Transformer(tiny_run.recipe.model, tiny_run.tokenizer.vocab_size, seed=1)
    narrow = Vectors(tokens.names, tokens.matrix[:, :7].copy(), byte_mapped=True)
    with pytest.raises(InputError, match="have 7 dimensions and n_embd is 32"):
        start_from(network.embedding, narrow, tiny_run.tokenizer)
    foreign = Vectors(["nothing like it"], np.ones((1, WIDTH), np.float32), byte_mapped=True)
    with pytest.raises(InputError, match="no token of this tokenizer"):
        start_from(network.embedding, foreign, tiny_run.tokenizer)
    with pytest.raises(RecipeError, match="only means something with init_embeddings"):
        tiny_recipe(text_file, "modern", "model.freeze_embeddings=true")
    overrides = [f"model.init_embeddings={text_file}", "model.tie_embeddings=true", "model.freeze_embeddings=true"]
    with pytest.raises(RecipeError, match="tie_embeddings makes them the head's"):
        tiny_recipe(text_file, "modern", *overrides)
    with pytest.raises(RecipeError, match=r"nowhere\.bin: no such file"):
        tiny_recipe(text_file, "modern", "model.init_embeddings=nowhere.bin")
