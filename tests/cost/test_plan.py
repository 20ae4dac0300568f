"""Test that a plan's figures are consistent and match the data pipeline and the literature."""

from __future__ import annotations

import math

import numpy as np
import pytest
from planning import IDLE, plan, recipe

from tinylm.cost.cpu import Processor
from tinylm.cost.micro_batch import host_memory_bytes
from tinylm.cost.parameters import parameter_counts
from tinylm.cost.plan import compute_optimal, make_plan, training_steps
from tinylm.data.datasets import TokenStream
from tinylm.errors import InputError
from tinylm.recipe import Recipe
from tinylm.recipe.fixed_context import NgramSection
from tinylm.recipe.schema import TrainingSection


def test_the_training_length_is_converted_to_steps() -> None:
    def steps(**length: float) -> int | None:
        return training_steps(TrainingSection.model_validate({"global_batch_size": 8, **length}), 16, examples_per_epoch=62)

    assert steps(steps=7) == 7
    assert steps(tokens=128) == 1
    assert steps(tokens=129) == 2
    assert steps(tokens=12_800) == 100
    assert steps(epochs=1) == math.ceil(62 / 8)
    assert steps(epochs=2) == math.ceil(124 / 8)
    assert steps(epochs=0.001) == 1
    assert steps(minutes=1) is None


@pytest.mark.parametrize(("tokens", "context", "batch"), [(1000, 16, 8), (1025, 32, 4), (33, 32, 1), (5000, 7, 3)])
def test_an_epoch_has_enough_steps_to_cover_every_window(tokens: int, context: int, batch: int) -> None:
    windows = TokenStream(np.zeros(tokens, dtype=np.uint16), context, seed=0).examples_per_epoch
    steps = training_steps(TrainingSection.model_validate({"epochs": 1, "global_batch_size": batch}), context, windows)
    assert steps is not None
    assert (steps - 1) * batch < windows <= steps * batch


def test_the_figures_in_a_plan_are_consistent() -> None:
    for options in ({}, {"accelerator": "a100-40gb-sxm", "devices": 4}):
        estimate = plan("training.epochs=2", "model.preset=gpt2", "model.tie_embeddings=off", **options)
        assert estimate.tokens_per_step == estimate.global_batch_size * estimate.context_length == 64 * 256
        assert estimate.micro_batch_size * estimate.gradient_accumulation_steps * estimate.devices == estimate.global_batch_size
        assert estimate.steps == math.ceil(2 * (99_999 // 256) / 64)
        assert estimate.tokens == estimate.steps * estimate.tokens_per_step
        assert estimate.epochs == pytest.approx(estimate.tokens / 100_000)
        assert estimate.parameters - estimate.parameters_non_embedding == (2 * 1000 + 256) * 384
        assert estimate.seconds_estimate == pytest.approx(estimate.steps * estimate.seconds_per_step + estimate.start_up_seconds)
        assert estimate.tokens_per_second == pytest.approx(estimate.tokens_per_step / estimate.seconds_per_step)
        assert estimate.evaluation_seconds == 0, "there are no held-out tokens"
        matrices = parameter_counts(recipe("model.preset=gpt2").model, 1000)["matrices"]
        assert estimate.checkpoint_bytes == 4 * estimate.parameters * 3 - 4 * matrices


@pytest.mark.parametrize("options", [{}, {"accelerator": "t4"}])
def test_minutes_are_spent_on_steps_and_evaluations(options: dict[str, str]) -> None:
    estimate = plan("training.minutes=10", "evaluation.every=20", heldout_tokens=20_000, **options)
    assert estimate.evaluation_seconds > 0
    assert estimate.seconds_estimate + estimate.evaluation_seconds == pytest.approx(600, rel=0.05)


def test_a_text_shorter_than_a_sequence_is_an_error() -> None:
    with pytest.raises(
        InputError, match=r"model\.context_length: the training text has about 256 tokens, fewer than context_length 256 \+ 1"
    ):
        make_plan(recipe(), 1000, 256, processor=IDLE)
    assert make_plan(recipe(), 1000, 257, processor=IDLE).steps == 10


def test_a_plan_for_this_machine_uses_measured_speeds() -> None:
    estimate = make_plan(recipe("model.n_layer=1", "model.n_head=1", "model.n_embd=16"), 300, 1000)
    assert (estimate.hardware, estimate.devices) == ("cpu", 1)
    assert estimate.mfu > 0
    assert 0 < estimate.cpu_share <= 1
    assert estimate.device_memory_bytes == host_memory_bytes() > 1 << 28


def test_evaluation_time_depends_on_stride_and_tokens() -> None:
    full, twice, tenth = (
        plan(f"evaluation={{every: 5, {setting}}}", heldout_tokens=50_000).evaluation_seconds
        for setting in ("stride: 256", "stride: 128", "max_tokens: 5000")
    )
    assert full > 0
    assert twice == pytest.approx(2 * full)
    assert tenth == pytest.approx(full / 10)


def test_the_compute_optimal_size_for_chinchillas_budget_is_chinchillas_size() -> None:
    """70 billion parameters and 1.4 trillion tokens need 5.88e23 FLOPs (Hoffmann et al. 2022, table 4)."""
    best = compute_optimal(70_000_000_000, 5.88e23, 1_400_000_000_000, 1_400_000_000_000)
    assert best.tokens == 1.4e12
    assert best.parameters_for_flops == pytest.approx(70e9, rel=0.01)
    assert best.tokens_for_flops == pytest.approx(1.4e12, rel=0.01)


def test_repeated_text_has_diminishing_returns() -> None:
    """Four epochs are nearly as good as new text. No number of epochs is worth more than 1 + R* (Muennighoff et al. 2023)."""
    worth = [compute_optimal(1, 1.0, epochs * 1000, 1000).effective_tokens / 1000 for epochs in (1, 4, 16, 40, 1000)]
    assert worth[0] == 1
    assert 0.9 * 4 < worth[1] < 4
    assert worth[2] < 0.7 * 16
    assert worth[3] < 16
    assert worth[4] == pytest.approx(16.39)


def test_compute_optimal_figures_match_the_recipe() -> None:
    estimate = plan("model.ngram_embeddings=[2,3]")
    tables = parameter_counts(recipe("model.ngram_embeddings=[2,3]").model, 1000)["tables"]
    assert estimate.compute_optimal.tokens == 20 * (estimate.parameters - tables)
    best = estimate.compute_optimal
    assert 6 * best.parameters_for_flops * best.tokens_for_flops == pytest.approx(estimate.flops, rel=1e-3)
    assert best.unique_tokens == 100_000


def test_a_plan_includes_the_forward_passes_and_the_weights_of_teachers() -> None:
    alone, same = plan("model.n_layer=3"), recipe("model.n_layer=3").model
    distilled = plan("model.n_layer=3", teachers=[same, same])
    assert distilled.flops == pytest.approx(alone.flops * (1 + 2 / 3))  # a forward pass is a third of the FLOPs of a step
    assert distilled.memory_bytes.teachers == 2 * alone.memory_bytes.weights
    assert distilled.memory_bytes.total == alone.memory_bytes.total + distilled.memory_bytes.teachers
    assert distilled.checkpoint_bytes == alone.checkpoint_bytes
    assert distilled.seconds_per_step == pytest.approx(alone.seconds_per_step * (1 + 2 / 3))
    assert plan(teachers=[NgramSection()]).not_estimated == ("teacher ngram",)


def test_a_plan_lists_the_parts_that_it_ignores() -> None:
    assert plan().not_estimated == ()
    windowed = plan("model.attention_window=8")
    assert windowed.not_estimated == ("attention_window 8",)
    assert windowed.parameters == plan().parameters


def test_lora_costs_less_memory_and_time_than_full_fine_tuning() -> None:
    training = {"steps": 10, "optimizer": "adamw", "compile": False, "precision": "fp32"}
    full_recipe = {"data": {"train": "a.txt"}, "training": training}
    lora_recipe = {**full_recipe, "model": {"init_from": "runs/a"}, "training": {**training, "lora": {"rank": 8}}}
    machine = Processor(100e9, 20e9, 10e9, cores=2, has_amx=False)
    recipes = (full_recipe, lora_recipe)
    full, lora = (make_plan(Recipe.model_validate(document), 8192, 100_000, processor=machine) for document in recipes)
    head = 4 * 8192 * 384
    assert full.memory_bytes.activations - lora.memory_bytes.activations == head  # the head has no gradient
    assert lora.memory_bytes.gradients < full.memory_bytes.gradients / 10
    assert lora.flops == pytest.approx(2 / 3 * full.flops, rel=0.15)
    assert lora.seconds_per_step < full.seconds_per_step
    assert lora.mfu < 1
