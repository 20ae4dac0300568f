"""If memory runs out, the batch is recomputed in smaller micro-batches with the same result."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NoteCollector, tiny_recipe

from tinylm.errors import WorkError
from tinylm.model.transformer import Transformer
from tinylm.pipeline import train
from tinylm.recipe import Recipe
from tinylm.run import Run
from tinylm.training import compilation, gradient


@pytest.fixture(scope="module")
def recipe(short_file: Path) -> Recipe:
    return tiny_recipe(short_file, "modern", "model.n_embd=16", "training.micro_batch_size=2", "evaluation.max_tokens=200")


def _losses(folder: Path) -> list[float]:
    return [line["loss"] for line in Run(folder).metrics() if line["kind"] == "step"]


@pytest.fixture
def limit_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], list[int]]:
    """Return a function that makes forward passes with more than `max_sequences` sequences run out of memory.

    The function returns a list that records the number of sequences in each pass.
    """

    def install(max_sequences: int, on_gpu: bool) -> list[int]:
        forward, passes = Transformer.forward, []

        def limited(network: Transformer, tokens: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
            if "targets" in options:
                passes.append(len(tokens))
                if len(tokens) > max_sequences and on_gpu:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                if len(tokens) > max_sequences:
                    torch.empty(1 << 58, dtype=torch.uint8)  # Raise a real CPU allocator error.
            return forward(network, tokens, *rest, **options)

        monkeypatch.setattr(Transformer, "forward", limited)
        return passes

    return install


SPLITS = [
    (8, 8, 4, [4]),
    (8, 8, 2, [4, 2]),
    (12, 12, 4, [6, 3]),
    (12, 4, 3, [2]),
    (15, 15, 5, [5]),
    (10, 5, 3, [2]),
    (7, 7, 6, [1]),
]


@pytest.mark.parametrize(
    ("batch", "micro", "max_sequences", "reduced", "on_gpu"), [*((*split, True) for split in SPLITS), (*SPLITS[1], False)]
)
def test_a_batch_that_does_not_fit_is_split_without_changing_the_result(
    batch: int,
    micro: int,
    max_sequences: int,
    reduced: list[int],
    on_gpu: bool,
    limit_memory: Any,
    short_file: Path,
    tmp_path: Path,
) -> None:
    """Each reduced micro-batch size divides the batch size and is at most half of the previous size."""
    short = ("training.steps=3", "training.compile=off", f"training.global_batch_size={batch}", "evaluation.max_tokens=50")
    recipes = {
        size: tiny_recipe(short_file, "modern", *short, "model.n_embd=16", "model.dropout=0.2", f"training.micro_batch_size={size}")
        for size in (micro, reduced[-1])
    }
    train(recipes[reduced[-1]], tmp_path / "small", device="cpu")
    passes, observer = limit_memory(max_sequences, on_gpu), NoteCollector()
    train(recipes[micro], tmp_path / "large", device="cpu", observer=observer)
    assert passes == [micro, *reduced[:-1]] + 3 * (batch // reduced[-1]) * [reduced[-1]]
    assert _losses(tmp_path / "large") == _losses(tmp_path / "small")
    sizes = [micro, *reduced]
    assert observer.notes == [
        f"out of memory: continuing with {batch // small} micro-batches of {small} instead of {batch // large} of {large}; "
        f"the global batch size stays {batch}"
        for large, small in itertools.pairwise(sizes)
    ]


def test_running_out_of_memory_within_a_batch_discards_its_partial_gradients(
    limit_memory: Any, short_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(short_file, "modern", "training.steps=4", "training.compile=off", "evaluation.max_tokens=50")
    train(recipe, tmp_path / "uninterrupted", device="cpu")
    passes, forward = [], Transformer.forward

    def fail_once(network: Transformer, tokens: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        passes.append(len(tokens))
        if len(passes) == 6:  # the second micro-batch of the third step
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(network, tokens, *rest, **options)

    monkeypatch.setattr(Transformer, "forward", fail_once)
    observer = NoteCollector()
    train(recipe, tmp_path / "run", device="cpu", observer=observer)
    assert passes[:14] == [4, 4, 4, 4, 4, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert len(observer.notes) == 1
    assert _losses(tmp_path / "run") == pytest.approx(_losses(tmp_path / "uninterrupted"), rel=1e-5)


def test_the_error_for_a_sequence_that_does_not_fit_into_memory_has_a_hint(
    limit_memory: Any, recipe: Recipe, tmp_path: Path
) -> None:
    passes, observer = limit_memory(0, True), NoteCollector()
    with pytest.raises(WorkError, match="one sequence does not fit into memory: CUDA out of memory") as caught:
        train(recipe, tmp_path / "run", device="cpu", observer=observer)
    assert "activation_checkpointing" in str(caught.value.hint)
    assert passes[-2:] == [2, 1]
    assert len(observer.notes) == 1


def test_an_automatic_micro_batch_size_fits_into_memory(limit_memory: Any, short_file: Path, tmp_path: Path) -> None:
    passes, observer = limit_memory(2, True), NoteCollector()
    options = ("training.steps=2", "training.micro_batch_size=auto", "training.compile=off", "evaluation.max_tokens=50")
    train(tiny_recipe(short_file, "modern", *options), tmp_path / "run", device="cpu", observer=observer)
    assert passes[:3] == [8, 4, 2]
    assert set(passes[3:]) == {2}
    assert observer.notes == []
    assert Run(tmp_path / "run").recipe.training.micro_batch_size == 2


def test_running_out_of_memory_in_a_compilation_trial_does_not_stop_training(
    limit_memory: Any, short_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "available_compiler", lambda device: "g++")
    limit_memory(2, True)
    observer = NoteCollector()
    recipe = tiny_recipe(short_file, "modern", "training.steps=2", "training.compile=auto", "evaluation.max_tokens=50")
    assert train(recipe, tmp_path / "run", device="cpu", observer=observer).step == 2
    assert len(observer.notes) == 1


def test_other_errors_are_not_retried(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(gradient, "accumulate", broken)
    observer = NoteCollector()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        train(recipe, tmp_path / "run", device="cpu", observer=observer)
    assert observer.notes == []
