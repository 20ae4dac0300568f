"""Test that a model initialized from vectors keeps their directions and the scale of the random initialization."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_recipe

from tinylm.embedding.encoded_text import token_names
from tinylm.embedding.init_from_vectors import initialize_from_vectors, table_from_words
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
    """Vectors of all tokens except ten, with a standard deviation of 50."""
    names = token_names(tiny_run.tokenizer)[10:]
    matrix = np.random.default_rng(0).standard_normal((len(names), WIDTH)).astype(np.float32) * 50
    return Vectors(names, matrix, byte_mapped=True)


def embedding_of(run: Run, step: int | None = None) -> np.ndarray:
    network = run.network(run.checkpoint(str(step) if step is not None else None), torch.device("cpu"))
    table: np.ndarray = network.embedding.weight.detach().numpy().copy()
    return table


def test_vectors_are_scaled_to_the_initial_standard_deviation(tiny_run: Run, tokens: Vectors) -> None:
    network = Transformer(tiny_run.recipe.model, tiny_run.tokenizer.vocab_size, seed=1)
    before = network.embedding.weight.detach().clone()
    initialized = initialize_from_vectors(network.embedding, tokens, tiny_run.tokenizer)
    after = network.embedding.weight.detach()
    assert (initialized.tokens, initialized.vocab_size, initialized.from_words) == (
        len(tokens),
        tiny_run.tokenizer.vocab_size,
        False,
    )
    assert (after[:10] == before[:10]).all()
    assert float(after[10:].std()) == pytest.approx(float(before.std()), rel=1e-4)
    ratio = after[10:].numpy() / tokens.matrix
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)


def test_the_vector_of_a_token_is_the_mean_over_the_words_that_contain_it(tiny_run: Run) -> None:
    """The mean is weighted by word counts."""
    tokenizer = tiny_run.tokenizer
    vectors = Vectors(["object", "objects"], np.array([[1, 0], [0, 1]], dtype=np.float32), np.array([3, 1]))
    table = table_from_words(vectors, tokenizer)
    pieces = [set(tokenizer.encode(form)) for form in (" object", " objects")]
    shared = (pieces[0] & pieces[1]).pop()
    np.testing.assert_allclose(table[shared], [0.75, 0.25])
    assert table.any(axis=1).sum() < tokenizer.vocab_size


@pytest.mark.parametrize("frozen", [False, True])
def test_a_recipe_can_initialize_embeddings_and_freeze_them(text_file: Path, tmp_path: Path, tokens: Vectors, frozen: bool) -> None:
    tokens.save(tmp_path / "v.safetensors")
    recipe = tiny_recipe(
        text_file, "modern", f"model.init_embeddings={tmp_path / 'v.safetensors'}", f"model.freeze_embeddings={frozen}",
        "training.steps=4", "evaluation.every=2", "checkpoint.every=2", "checkpoint.keep=9",
    )  # fmt: skip
    reporter = CollectingReporter()
    train(recipe, tmp_path / "run", device="cpu", reporter=reporter)
    run = Run.open(tmp_path / "run")
    notes = [note for note in reporter.notes if note.startswith("embeddings:")]
    assert len(notes) == 1
    assert f"{len(tokens):,} of {run.tokenizer.vocab_size:,} tokens" in notes[0]
    early, late = embedding_of(run, 2)[10:], embedding_of(run, 4)[10:]
    scale = np.linalg.norm(early) / np.linalg.norm(tokens.matrix)
    similarity = np.einsum("nd,nd->n", early, tokens.matrix) * scale / np.maximum(np.square(early).sum(axis=1), 1e-12)
    assert (early.tobytes() == late.tobytes()) == frozen
    if frozen:
        np.testing.assert_allclose(similarity, 1, rtol=1e-3)
        resumed = train(
            recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": 4})}),
            tmp_path / "run", device="cpu", resume=True,
        )  # fmt: skip
        assert resumed.step == 4
        shutil.rmtree(run.path / "checkpoints")
        train(recipe, run.path, device="cpu", resume=True, reporter=reporter)
        assert len([note for note in reporter.notes if note.startswith("embeddings:")]) == 2, (
            "without a checkpoint, training starts again from the vectors"
        )
        assert embedding_of(Run.open(run.path), 4)[10:].tobytes() == late.tobytes()
    assert np.corrcoef(late.ravel(), tokens.matrix.ravel())[0, 1] > 0.9


def test_unusable_vectors_are_errors(tiny_run: Run, tokens: Vectors, text_file: Path) -> None:
    network = Transformer(tiny_run.recipe.model, tiny_run.tokenizer.vocab_size, seed=1)
    narrow = Vectors(tokens.names, tokens.matrix[:, :7].copy(), byte_mapped=True)
    with pytest.raises(InputError, match=r"the vectors have 7 dimensions, but model\.n_embd is 32"):
        initialize_from_vectors(network.embedding, narrow, tiny_run.tokenizer)
    unrelated = Vectors(["not a token"], np.ones((1, WIDTH), np.float32), byte_mapped=True)
    with pytest.raises(InputError, match="none of the tokenizer's tokens has a vector"):
        initialize_from_vectors(network.embedding, unrelated, tiny_run.tokenizer)
    with pytest.raises(RecipeError, match="needs init_embeddings"):
        tiny_recipe(text_file, "modern", "model.freeze_embeddings=true")
    overrides = [f"model.init_embeddings={text_file}", "model.tie_embeddings=true", "model.freeze_embeddings=true"]
    with pytest.raises(RecipeError, match="cannot be combined with tie_embeddings"):
        tiny_recipe(text_file, "modern", *overrides)
    with pytest.raises(RecipeError, match=r"nowhere\.bin: no such file"):
        tiny_recipe(text_file, "modern", "model.init_embeddings=nowhere.bin")
