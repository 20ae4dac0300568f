"""The plan's arithmetic is that of the model and the trainer it speaks of."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from tinylm.data.batches import Batches
from tinylm.errors import InputError
from tinylm.model.transformer import Transformer
from tinylm.plan import (
    choose_micro_batch,
    flops_per_token,
    host_memory_bytes,
    make_plan,
    matmul_flops,
    memory,
    parameter_counts,
    training_steps,
)
from tinylm.recipe import Recipe, loads
from tinylm.recipe.presets import PRESETS
from tinylm.recipe.schema import ModelSection, TrainingSection

PARTS: list[dict[str, Any]] = [
    {},
    {"norm": "layernorm"},
    {"norm": "rmsnorm"},
    {"norm_position": "post"},
    {"norm_position": "post", "parallel_residual": True},
    {"parallel_residual": True},
    {"position": "learned"},
    {"position": "sinusoidal"},
    {"position": "none"},
    {"feed_forward": "swiglu"},
    {"feed_forward": "relu2"},
    {"feed_forward_multiple": 2.7},
    {"bias": True},
    {"bias": False},
    {"bias": True, "feed_forward": "swiglu", "norm": "layernorm"},
    {"tie_embeddings": True},
    {"tie_embeddings": False},
    {"qk_norm": True},
    {"embedding_norm": True, "norm": "layernorm", "bias": True},
    {"n_kv_head": 1},
    {"n_kv_head": 2, "bias": True},
    {"norm_gain": False},
    {"norm_gain": False, "norm": "layernorm", "bias": True},
    {"qk_norm": True, "qk_gain": False},
    {"qk_norm": False, "qk_gain": True},
    {"ngram_embeddings": [2]},
    {"ngram_embeddings": [2, 3], "ngram_rows": 50},
    {"value_embeddings": 1},
    {"value_embeddings": 3, "n_kv_head": 2},
    {"value_residual": True},
    {"embedding_shortcut": True},
]


def section(**parts: Any) -> ModelSection:
    return ModelSection.model_validate({"n_layer": 2, "n_head": 4, "n_embd": 32, "context_length": 24, **parts})


def recipe(*settings: str) -> Recipe:
    return loads("data: {train: a.txt}\ntraining: {steps: 10}\n", settings, check_files=False)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_plan_counts_the_parameters_that_the_model_has(preset: str) -> None:
    for parts, n_layer in itertools.product(PARTS, (1, 3)):
        model = section(preset=preset, n_layer=n_layer, **parts)
        counts = parameter_counts(model, 61)
        network = Transformer(model, 61)
        assert sum(counts.values()) == network.parameter_count(), parts
        matrices = sum(
            p.numel()
            for name, p in network.named_parameters()
            if p.ndim == 2 and name.startswith(("blocks.", "ngrams.projection")) and "embedding" not in name
        )
        assert counts["matrices"] == matrices


def test_gpt2_small_has_the_published_number_of_parameters() -> None:
    model = ModelSection.model_validate({"preset": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "context_length": 1024})
    assert sum(parameter_counts(model, 50_257).values()) == 124_439_808


def test_steps_tokens_and_epochs_become_steps() -> None:
    def steps(**length: float) -> int | None:
        return training_steps(TrainingSection.model_validate({"global_batch_size": 8, **length}), 16, train_tokens=1000)

    assert steps(steps=7) == 7
    assert steps(tokens=128) == 1
    assert steps(tokens=129) == 2
    assert steps(tokens=12_800) == 100
    assert steps(epochs=1) == math.ceil(62 / 8), "999 targets fill 62 windows of 16"
    assert steps(epochs=2) == math.ceil(124 / 8)
    assert steps(epochs=0.001) == 1
    assert steps(minutes=1) is None


@pytest.mark.parametrize(("tokens", "context", "batch"), [(1000, 16, 8), (1025, 32, 4), (33, 32, 1), (5000, 7, 3)])
def test_an_epoch_is_the_steps_that_see_every_window(tokens: int, context: int, batch: int) -> None:
    windows = Batches(np.zeros(tokens, dtype=np.uint16), context, seed=0).windows
    steps = training_steps(TrainingSection.model_validate({"epochs": 1, "global_batch_size": batch}), context, tokens)
    assert steps is not None
    assert (steps - 1) * batch < windows <= steps * batch


@pytest.mark.parametrize("batch", [1, 2, 7, 12, 64, 96])
@pytest.mark.parametrize("mebibytes", [1, 30, 100, 1000, 100_000])
def test_the_micro_batch_divides_the_batch_and_is_the_largest_that_fits(batch: int, mebibytes: int) -> None:
    one = recipe(f"training.global_batch_size={batch}")
    limit = mebibytes << 20
    chosen = choose_micro_batch(one, 4096, limit, None)
    assert batch % chosen == 0

    def fits(size: int) -> bool:
        return memory(one, 4096, size).total <= 0.6 * limit

    assert fits(chosen) or chosen == 1
    assert not any(fits(size) for size in range(chosen + 1, batch + 1) if batch % size == 0)


def test_the_micro_batch_can_be_given_and_tokens_can_limit_it() -> None:
    assert choose_micro_batch(recipe("training.micro_batch_size=16"), 4096, 1, None) == 16
    assert choose_micro_batch(recipe(), 4096, 1 << 40, 4096) == 16
    assert choose_micro_batch(recipe("model.context_length=8192"), 4096, 1 << 40, 4096) == 1


def test_a_muon_optimizer_keeps_one_number_per_matrix_weight_and_adamw_two() -> None:
    muon, adamw = (memory(recipe(f"training.optimizer={name}"), 300, 1) for name in ("muon", "adamw"))
    assert adamw.optimizer == 2 * adamw.weights
    assert adamw.optimizer - muon.optimizer == 4 * parameter_counts(recipe().model, 300)["matrices"]
    assert muon.total == muon.weights + muon.gradients + muon.optimizer + muon.activations


def test_flops_of_a_token_counted_by_hand() -> None:
    model = section(preset="gpt2")
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 61 * 32
    looked_at = 24 / 2  # a causal position sees half of the context on average
    attention = 2 * (2 * looked_at * 32 + 2 * looked_at * 32)  # in 2 layers: scores and mixing, a product and a sum each
    assert flops_per_token(model, 61) == 6 * weights + 3 * attention, "backward costs twice forward"


def test_a_plan_agrees_with_itself() -> None:
    plan = make_plan(recipe("training.epochs=2", "model.preset=gpt2", "model.tie_embeddings=off"), 1000, 100_000, peak_flops=1e9)
    assert plan.tokens_per_step == plan.global_batch_size * plan.context_length == 64 * 256
    assert plan.micro_batch_size * plan.gradient_accumulation_steps == plan.global_batch_size
    assert plan.steps == math.ceil(2 * (99_999 // 256) / 64)
    assert plan.tokens == plan.steps * plan.tokens_per_step
    assert plan.epochs == pytest.approx(plan.tokens / 100_000)
    assert plan.parameters - plan.parameters_non_embedding == (2 * 1000 + 256) * 384
    assert plan.seconds_estimate == pytest.approx(plan.flops / (1e9 * 0.5))
    assert (
        plan.checkpoint_bytes == 4 * plan.parameters * 3 - 4 * parameter_counts(recipe("model.preset=gpt2").model, 1000)["matrices"]
    )


def test_minutes_are_filled_with_steps() -> None:
    plan = make_plan(recipe("training.minutes=10"), 1000, 100_000, peak_flops=1e11)
    assert plan.seconds_estimate == pytest.approx(600, rel=0.05)


def test_a_text_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"model\.context_length: the training text has about 256 tokens, fewer than context_length 256 \+ 1"
    ):
        make_plan(recipe(), 1000, 256, peak_flops=1e9)
    assert make_plan(recipe(), 1000, 257, peak_flops=1e9).steps == 10


def test_this_machine_is_measured() -> None:
    assert matmul_flops() > 1e8
    assert host_memory_bytes() > 1 << 28
