"""The plan's arithmetic is that of the model and the trainer it speaks of."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from tinylm.cost.accelerators import find
from tinylm.cost.cpu import Processor
from tinylm.cost.plan import (
    CLEARLY_FASTER,
    COMPILING_SECONDS,
    Numbers,
    Plan,
    choose_micro_batch,
    compiling_pays,
    compute_optimal,
    cpu_seconds,
    estimate_memory,
    flops_per_token,
    host_memory_bytes,
    make_plan,
    parameter_counts,
    training_steps,
)
from tinylm.data.batches import Batches
from tinylm.errors import InputError
from tinylm.model.transformer import Transformer
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


QUIET = Processor(350e9, 27e9, 14e9, cores=2, has_amx=True)
"""The machine that `tinylm.cost.cpu` was fitted on, with nothing else to do."""
OLD = Processor(350e9, 27e9, 14e9, cores=2, has_amx=False)


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
@pytest.mark.parametrize("mebibytes", [1, 30, 300, 3000, 100_000])
@pytest.mark.parametrize("half", [True, False])
def test_the_micro_batch_divides_the_batch_and_is_the_largest_that_fits(batch: int, mebibytes: int, half: bool) -> None:
    one = recipe(f"training.global_batch_size={batch}")
    limit = mebibytes << 20
    chosen = choose_micro_batch(one, 4096, limit, None, half=half)
    assert batch % chosen == 0

    def fits(size: int) -> bool:
        costs = estimate_memory(one, 4096, size, precision="bf16" if half else "fp32", on_gpu=True)
        return costs.weights + costs.gradients + costs.optimizer + costs.activations <= 0.6 * limit

    assert fits(chosen) or chosen == 1
    assert not any(fits(size) for size in range(chosen + 1, batch + 1) if batch % size == 0)


def test_the_micro_batch_can_be_given_and_tokens_can_limit_it() -> None:
    assert choose_micro_batch(recipe("training.micro_batch_size=16"), 4096, 1, None) == 16
    assert choose_micro_batch(recipe(), 4096, 1 << 40, 4096) == 16
    assert choose_micro_batch(recipe("model.context_length=8192"), 4096, 1 << 40, 4096) == 1
    assert choose_micro_batch(recipe(), 4096, 1 << 40, None, devices=4) == 16


def test_a_muon_optimizer_keeps_one_number_per_matrix_weight_and_adamw_two() -> None:
    muon, adamw = (estimate_memory(recipe(f"training.optimizer={name}"), 300, 1) for name in ("muon", "adamw"))
    assert adamw.optimizer == 2 * adamw.weights
    assert adamw.optimizer - muon.optimizer == 4 * parameter_counts(recipe().model, 300)["matrices"]
    assert adamw.update == 0 < muon.update


def test_a_gpu_needs_the_largest_of_step_update_and_evaluation_and_a_cpu_keeps_what_it_freed() -> None:
    for accumulates in (True, False):
        gpu = estimate_memory(recipe(), 300, 4, on_gpu=True, accumulates=accumulates)
        gradients = gpu.gradients if accumulates else 0
        heights = (gradients + gpu.activations, gpu.gradients + gpu.update, gpu.gradients + gpu.evaluation)
        assert gpu.total == gpu.weights + gpu.optimizer + max(heights)
    cpu = estimate_memory(recipe(), 300, 4)
    assert cpu.total > cpu.weights + cpu.optimizer + cpu.gradients + cpu.activations + cpu.evaluation


def test_a_large_vocabulary_is_highest_while_measuring() -> None:
    costs = estimate_memory(recipe("model.n_layer=1"), 50_000, 1, on_gpu=True)
    assert costs.evaluation > costs.activations
    assert costs.evaluation < 2 * (1 << 25) * 4 * 1.05, "logits and their log-softmax, 128 MiB each"


def test_flops_of_a_token_counted_by_hand() -> None:
    model = section(preset="gpt2")
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 61 * 32
    looked_at = 24 / 2  # a causal position sees half of the context on average
    attention = 2 * (2 * looked_at * 32 + 2 * looked_at * 32)  # in 2 layers: scores and mixing, a product and a sum each
    assert flops_per_token(model, 61) == 6 * weights + 3 * attention, "backward costs twice forward"


def plan(*settings: str, **options: Any) -> Plan:
    return make_plan(recipe(*settings), 1000, 100_000, **{"here": QUIET, **options})


def test_a_plan_agrees_with_itself() -> None:
    for options in ({}, {"accelerator": "a100-40gb-sxm", "devices": 4}):
        one = plan("training.epochs=2", "model.preset=gpt2", "model.tie_embeddings=off", **options)
        assert one.tokens_per_step == one.global_batch_size * one.context_length == 64 * 256
        assert one.micro_batch_size * one.gradient_accumulation_steps * one.devices == one.global_batch_size
        assert one.steps == math.ceil(2 * (99_999 // 256) / 64)
        assert one.tokens == one.steps * one.tokens_per_step
        assert one.epochs == pytest.approx(one.tokens / 100_000)
        assert one.parameters - one.parameters_non_embedding == (2 * 1000 + 256) * 384
        assert one.seconds_estimate == pytest.approx(one.steps * one.seconds_per_step + one.start_up_seconds)
        assert one.tokens_per_second == pytest.approx(one.tokens_per_step / one.seconds_per_step)
        assert one.evaluation_seconds == 0, "no held-out tokens"
        matrices = parameter_counts(recipe("model.preset=gpt2").model, 1000)["matrices"]
        assert one.checkpoint_bytes == 4 * one.parameters * 3 - 4 * matrices


@pytest.mark.parametrize("options", [{}, {"accelerator": "t4"}])
def test_minutes_are_filled_with_steps_and_measuring(options: dict[str, str]) -> None:
    one = plan("training.minutes=10", "evaluation.every=20", heldout_tokens=20_000, **options)
    assert one.evaluation_seconds > 0
    assert one.seconds_estimate + one.evaluation_seconds == pytest.approx(600, rel=0.05)


def test_a_text_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"model\.context_length: the training text has about 256 tokens, fewer than context_length 256 \+ 1"
    ):
        make_plan(recipe(), 1000, 256, here=QUIET)
    assert make_plan(recipe(), 1000, 257, here=QUIET).steps == 10


def test_this_machine_is_measured() -> None:
    one = make_plan(recipe("model.n_layer=1", "model.n_head=1", "model.n_embd=16"), 300, 1000)
    assert (one.hardware, one.devices) == ("cpu", 1)
    assert 0 < one.mfu < 1
    assert one.device_memory_bytes == host_memory_bytes() > 1 << 28


# Seconds on a CPU, against steps that were timed on the machine of the fit: a guard for the arithmetic, not evidence for the model.

LARGE = ["model.tie_embeddings=on", "training.global_batch_size=8"]
MIDDLE = ["model.n_layer=4", "model.n_head=4", "model.n_embd=256", "training.global_batch_size=8"]
NARROW = ["model.n_layer=5", "model.n_embd=192", "training.global_batch_size=8"]
TINY = ["model.n_layer=4", "model.n_head=4", "model.n_embd=128", "model.context_length=64", "training.global_batch_size=12"]
NGRAMS = ["model.n_layer=2", "model.n_head=4", "model.n_embd=128", "model.context_length=128", "training.global_batch_size=8"]
NGRAMS += ["model.ngram_embeddings=[2,3,4,5,6]", "model.ngram_width=64"]
IN_FP32 = "training.optimizer.newton_schulz_dtype=fp32"


@pytest.mark.parametrize(
    ("settings", "vocab_size", "precision", "compiled", "milliseconds"),
    [
        (["model.preset=gpt2", "training.optimizer=adamw", *LARGE], 8192, "fp32", False, 735),
        ([IN_FP32, *LARGE], 8192, "fp32", False, 890),
        (LARGE, 8192, "bf16", False, 457),
        (LARGE, 8192, "bf16", True, 396),
        ([IN_FP32, *MIDDLE], 4096, "fp32", False, 367),
        (MIDDLE, 4096, "bf16", False, 185),
        (MIDDLE, 4096, "bf16", True, 154),
        ([IN_FP32, *NARROW], 65, "fp32", False, 250),
        (NARROW, 65, "bf16", False, 177),
        (NARROW, 65, "bf16", True, 144),
        ([IN_FP32, *TINY], 65, "fp32", False, 42),
        (TINY, 65, "bf16", False, 50),
        (NGRAMS, 65, "fp32", False, 40),
    ],
)
def test_steps_that_were_timed_are_foretold_within_a_quarter(
    settings: list[str], vocab_size: int, precision: Numbers, compiled: bool, milliseconds: float
) -> None:
    one = recipe(*settings)
    seconds = cpu_seconds(one, vocab_size, one.training.global_batch_size, QUIET, precision, compiled=compiled)
    assert 1000 * seconds.total == pytest.approx(milliseconds, rel=0.25)


def test_bf16_is_chosen_where_the_processor_has_units_for_it_and_it_is_faster() -> None:
    assert plan(*MIDDLE).precision == "bf16"
    assert plan(*MIDDLE, here=OLD).precision == "fp32"
    assert plan(*TINY).precision == "fp32", "its products are too small to gain"
    assert plan(*TINY, "training.precision=bf16").precision == "bf16"
    assert plan(*MIDDLE, "training.precision=bf16", here=OLD).seconds_per_step > 10 * plan(*MIDDLE, here=OLD).seconds_per_step
    assert CLEARLY_FASTER < 1


def test_compiling_is_planned_for_where_the_training_earns_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinylm.cost.plan.cpp_compiler", lambda: "g++")
    short, long = plan(*MIDDLE), plan(*MIDDLE, "training.steps=20000")
    assert (short.compiled, long.compiled) == (False, True)
    assert (short.start_up_seconds, long.start_up_seconds) == (0, COMPILING_SECONDS["cpu"])
    assert long.seconds_per_step < short.seconds_per_step
    assert not plan(*MIDDLE, "training.steps=20000", "training.compile=off").compiled
    monkeypatch.setattr("tinylm.cost.plan.cpp_compiler", lambda: None)
    assert not plan(*MIDDLE, "training.steps=20000").compiled


@pytest.mark.parametrize(("device", "start_up"), [("cpu", 12.0), ("cuda", 45.0), ("mps", 60.0)])
def test_compiling_pays_where_15_percent_of_the_training_is_one_and_a_half_start_ups(device: str, start_up: float) -> None:
    least = 1.5 * start_up / 0.15
    assert not compiling_pays(0.5, None, 2 * least - 1, device)
    assert compiling_pays(0.5, None, 2 * least + 1, device)
    assert not compiling_pays(0.5, least - 1, None, device), "stopped too early"
    assert compiling_pays(0.5, least + 1, None, device)
    assert not compiling_pays(0.5, 10.0, 10_000, device)
    assert not compiling_pays(0.5, None, None, device), "for who knows how long"


def test_measuring_takes_more_with_a_shorter_stride_and_less_with_fewer_tokens() -> None:
    whole, twice, tenth = (
        plan(f"evaluation={{every: 5, {setting}}}", heldout_tokens=50_000).evaluation_seconds
        for setting in ("stride: 256", "stride: 128", "max_tokens: 5000")
    )
    assert whole > 0
    assert twice == pytest.approx(2 * whole)
    assert tenth == pytest.approx(whole / 10)


# Machines that are not here.


@pytest.mark.parametrize(
    ("name", "precision"), [("h100-sxm", "bf16"), ("t4", "fp16"), ("v100-sxm2-32gb", "fp16"), ("rtx-3090", "bf16")]
)
def test_an_accelerator_computes_in_the_best_that_its_sheet_has(name: str, precision: str) -> None:
    one = plan(accelerator=name)
    assert (one.hardware, one.precision) == (name, precision)
    assert one.device_memory_bytes == find(name).memory
    assert 0 < one.mfu < 1


def test_the_recipe_s_precision_is_respected_or_refused() -> None:
    assert plan("training.precision=fp32", accelerator="a100-80gb-sxm").precision == "fp32"
    with pytest.raises(InputError, match=r"precision: t4 has no bf16 matrix products \(it has fp32, fp16\)"):
        plan("training.precision=bf16", accelerator="t4")


def test_float32_on_a_gpu_is_planned_in_tf32() -> None:
    large = ["model.n_layer=12", "model.n_embd=768", "model.n_head=12", "training.precision=fp32", "training.compile=off"]
    tf32, without = (plan(*large, accelerator=name) for name in ("a100-80gb-sxm", "v100-sxm2-32gb"))
    assert tf32.mfu * find("a100-80gb-sxm").flops["tf32"] > 2 * without.mfu * find("v100-sxm2-32gb").flops["fp32"]


def test_a_batch_that_does_not_split_names_those_that_would() -> None:
    message = r"global_batch_size: 64 sequences do not split over 3 devices \(63 and 66 would\)"
    with pytest.raises(InputError, match=message):
        plan(accelerator="l4", devices=3)
    with pytest.raises(InputError, match=r"2 sequences do not split over 8 devices \(8 would\)"):
        plan("training.global_batch_size=2", accelerator="l4", devices=8)
    with pytest.raises(InputError, match=r"16 does not divide the 8 sequences of each of 8 devices \(1, 2, 4, 8 would\)"):
        plan("training.micro_batch_size=16", accelerator="l4", devices=8)


def test_more_devices_are_faster_and_each_does_less() -> None:
    large = ["model.n_layer=12", "model.n_embd=768", "model.n_head=12", "training.global_batch_size=512"]
    one, eight = (plan(*large, accelerator="a100-80gb-sxm", devices=devices) for devices in (1, 8))
    assert one.seconds_per_step / 8 < eight.seconds_per_step < one.seconds_per_step / 4
    assert eight.mfu < one.mfu
    assert eight.tokens_per_step == one.tokens_per_step


def test_a_larger_memory_takes_larger_micro_batches() -> None:
    large = ["model.n_layer=24", "model.n_embd=1024", "model.n_head=16", "model.context_length=1024"]
    sizes = [plan(*large, accelerator=name).micro_batch_size for name in ("t4", "a100-40gb-sxm", "b200")]
    assert sizes == sorted(set(sizes))


def test_a_tiny_model_waits_for_its_kernels_to_be_started() -> None:
    small = ["model.n_layer=2", "model.n_embd=32", "model.n_head=2", "training.global_batch_size=2"]
    fast, slow = (plan(*small, accelerator=name).seconds_per_step for name in ("b200", "l4"))
    assert fast == slow > 1e-3


# Advice.


def test_chinchilla_s_own_budget_gives_about_its_own_size() -> None:
    """70 G parameters and 1.4 T tokens are 5.88e23 FLOPs (Hoffmann et al. 2022, table 4)."""
    best = compute_optimal(70_000_000_000, 5.88e23, 1_400_000_000_000, 1_400_000_000_000)
    assert best.tokens == 1.4e12
    assert best.parameters_for_flops == pytest.approx(70e9, rel=0.01)
    assert best.tokens_for_flops == pytest.approx(1.4e12, rel=0.01)


def test_repeated_text_is_worth_less_and_less() -> None:
    """At four epochs nearly as much as new text; at forty, the limit of 1 + R* epochs is near (Muennighoff et al. 2023)."""
    effective_tokens = [compute_optimal(1, 1.0, epochs * 1000, 1000).worth_tokens / 1000 for epochs in (1, 4, 16, 40, 1000)]
    assert effective_tokens[0] == 1
    assert 0.9 * 4 < effective_tokens[1] < 4
    assert effective_tokens[2] < 0.7 * 16
    assert effective_tokens[3] < 16
    assert effective_tokens[4] == pytest.approx(16.39)


def test_advice_is_for_the_recipe_s_model_text_and_compute() -> None:
    one = plan("model.ngram_embeddings=[2,3]")
    tables = parameter_counts(recipe("model.ngram_embeddings=[2,3]").model, 1000)["tables"]
    assert one.compute_optimal.tokens == 20 * (one.parameters - tables)
    best = one.compute_optimal
    assert 6 * best.parameters_for_flops * best.tokens_for_flops == pytest.approx(one.flops, rel=1e-3)
    assert best.unique_tokens == 100_000


def test_low_rank_additions_cost_less_memory_and_time_than_all_weights() -> None:
    whole = {"data": {"train": "a.txt"}, "training": {"steps": 10, "optimizer": "adamw", "compile": False, "precision": "fp32"}}
    low = {**whole, "model": {"init_from": "runs/a"}, "training": {**whole["training"], "lora": {"rank": 8}}}  # type: ignore[dict-item]
    machine = Processor(100e9, 20e9, 10e9, cores=2, has_amx=False)
    full, added = (make_plan(Recipe.model_validate(each), 8192, 100_000, here=machine) for each in (whole, low))
    head = 4 * 8192 * 384
    assert full.memory_bytes.activations - added.memory_bytes.activations == head  # whose gradient nobody wants
    assert added.memory_bytes.gradients < full.memory_bytes.gradients / 10
    assert added.flops == pytest.approx(2 / 3 * full.flops, rel=0.15)
    assert added.seconds_per_step < full.seconds_per_step
    assert added.mfu < 1
