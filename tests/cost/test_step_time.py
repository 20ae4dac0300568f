"""Estimates of the step time, and the values that are chosen for `auto` settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from planning import IDLE, WITHOUT_AMX, plan, recipe

from tinylm.cost.accelerators import find
from tinylm.cost.cluster import Cluster
from tinylm.cost.step_time import (
    CLEARLY_FASTER,
    COMPILATION_SECONDS,
    compilation_pays_off,
    cpu_seconds,
    estimate_on_cluster,
)
from tinylm.errors import InputError
from tinylm.recipe import load
from tinylm.recipe.values import ComputeDtype

# These steps were measured on the machine that the constants were fitted to, so this is a regression test, not evidence. The bf16
# steps of NARROW and TINY are those times multiplied by the ratio that computing attention in float32 saved on another machine.
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
        (NARROW, 65, "bf16", False, 141),
        (NARROW, 65, "bf16", True, 115),
        ([IN_FP32, *TINY], 65, "fp32", False, 42),
        (TINY, 65, "bf16", False, 26),
        (NGRAMS, 65, "fp32", False, 40),
    ],
)
def test_estimates_are_within_a_quarter_of_measured_steps(
    settings: list[str], vocab_size: int, precision: ComputeDtype, compiled: bool, milliseconds: float
) -> None:
    loaded = recipe(*settings)
    seconds = cpu_seconds(loaded, vocab_size, loaded.training.global_batch_size, IDLE, precision, compiled=compiled)
    assert 1000 * seconds.total == pytest.approx(milliseconds, rel=0.25)


def test_a_rational_function_takes_less_time_than_newton_schulz_iterations() -> None:
    settings = [f"training.optimizer.orthogonalization={name}" for name in ("rational", "newton_schulz")]
    rational, iterations = (cpu_seconds(recipe(setting, IN_FP32, *LARGE), 8192, 8, IDLE, "fp32").optimizer for setting in settings)
    assert 0.3 * iterations < rational < 0.5 * iterations  # measured on a CPU without AMX: 0.35


def test_auto_precision_is_bf16_if_the_cpu_computes_bf16_natively_and_faster() -> None:
    assert plan(*MIDDLE).precision == "bf16"
    assert plan(*MIDDLE, processor=WITHOUT_AMX).precision == "fp32"
    assert plan(*MIDDLE, processor=replace(WITHOUT_AMX, has_avx512_bf16=True)).precision == "bf16"
    narrowest = [*TINY, "model.n_embd=16"]
    assert plan(*narrowest).precision == "fp32", "the matrix products of this model are too small for bf16 to be faster"
    assert plan(*narrowest, "training.precision=bf16").precision == "bf16"
    assert (
        plan(*MIDDLE, "training.precision=bf16", processor=WITHOUT_AMX).seconds_per_step
        > 10 * plan(*MIDDLE, processor=WITHOUT_AMX).seconds_per_step
    )
    assert CLEARLY_FASTER < 1


def test_auto_compiles_if_training_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinylm.cost.step_time.cpp_compiler", lambda: "g++")
    short, long = plan(*MIDDLE), plan(*MIDDLE, "training.steps=20000")
    assert (short.compiled, long.compiled) == (False, True)
    assert (short.start_up_seconds, long.start_up_seconds) == (0, COMPILATION_SECONDS["cpu"])
    assert long.seconds_per_step < short.seconds_per_step
    assert not plan(*MIDDLE, "training.steps=20000", "training.compile=off").compiled
    monkeypatch.setattr("tinylm.cost.step_time.cpp_compiler", lambda: None)
    assert not plan(*MIDDLE, "training.steps=20000").compiled


@pytest.mark.parametrize(("device", "compilation"), [("cpu", 12.0), ("cuda", 45.0), ("mps", 60.0)])
def test_compilation_pays_off_if_15_percent_of_the_training_time_is_1_5_times_the_compilation_time(
    device: str, compilation: float
) -> None:
    minimum = 1.5 * compilation / 0.15
    assert not compilation_pays_off(0.5, None, 2 * minimum - 1, device)
    assert compilation_pays_off(0.5, None, 2 * minimum + 1, device)
    assert not compilation_pays_off(0.5, minimum - 1, None, device), "training ends too early"
    assert compilation_pays_off(0.5, minimum + 1, None, device)
    assert not compilation_pays_off(0.5, 10.0, 10_000, device)
    assert not compilation_pays_off(0.5, None, None, device), "the length is unknown"


@pytest.mark.parametrize(
    ("name", "precision"), [("h100-sxm", "bf16"), ("t4", "fp16"), ("v100-sxm2-32gb", "fp16"), ("rtx-3090", "bf16")]
)
def test_auto_precision_on_an_accelerator_is_bf16_if_supported_and_fp16_otherwise(name: str, precision: str) -> None:
    estimate = plan(accelerator=name)
    assert (estimate.hardware, estimate.precision) == (name, precision)
    assert estimate.device_memory_bytes == find(name).memory
    assert 0 < estimate.mfu < 1


def test_the_estimate_for_gpt2_on_an_h200_is_within_15_percent_of_the_measured_speed() -> None:
    """benchmarks/results/h200-2026-11.md: 533,000 to 537,000 tokens/s."""
    shipped = load(Path(__file__).parents[2] / "recipes" / "gpt2-124m.yaml", check_files=False)
    estimate = estimate_on_cluster(shipped, 50_304, None, Cluster(find("h200"), 1))
    assert estimate.micro_batch_size == 128, "as in the measured run"
    assert shipped.training.global_batch_size * 1024 / estimate.step_seconds == pytest.approx(535_000, rel=0.15)


def test_an_unsupported_precision_in_the_recipe_is_an_error() -> None:
    assert plan("training.precision=fp32", accelerator="a100-80gb-sxm").precision == "fp32"
    with pytest.raises(InputError, match=r"precision: t4 does not support bf16 matrix products \(use fp32 or fp16\)"):
        plan("training.precision=bf16", accelerator="t4")


def test_fp32_on_a_gpu_is_estimated_in_tf32() -> None:
    large = ["model.n_layer=12", "model.n_embd=768", "model.n_head=12", "training.precision=fp32", "training.compile=off"]
    tf32, fp32 = (plan(*large, accelerator=name) for name in ("a100-80gb-sxm", "v100-sxm2-32gb"))
    assert tf32.mfu * find("a100-80gb-sxm").flops["tf32"] > 2 * fp32.mfu * find("v100-sxm2-32gb").flops["fp32"]


def test_more_devices_are_faster_but_have_a_lower_mfu() -> None:
    large = ["model.n_layer=12", "model.n_embd=768", "model.n_head=12", "training.global_batch_size=512"]
    single, eight = (plan(*large, accelerator="a100-80gb-sxm", devices=devices) for devices in (1, 8))
    assert single.seconds_per_step / 8 < eight.seconds_per_step < single.seconds_per_step / 4
    assert eight.mfu < single.mfu
    assert eight.tokens_per_step == single.tokens_per_step


def test_a_model_that_fills_the_memory_is_sharded_and_then_needs_less_memory_on_each_device() -> None:
    large = ["model.n_layer=24", "model.n_embd=2048", "model.n_head=16", "training.global_batch_size=64"]
    replicated, sharded = (plan(*large, accelerator="a100-40gb-sxm", devices=8, gpus_per_node=g) for g in (8, 4))
    assert (replicated.parallel, replicated.nodes, sharded.nodes) == ("ddp", 1, 2)
    assert sharded.seconds_per_step > replicated.seconds_per_step, "the network is slower than NVLink"
    sharded = plan(*large, "training.parallel=fsdp", accelerator="a100-40gb-sxm", devices=8)
    assert sharded.memory_bytes.weights == replicated.memory_bytes.weights // 8
    assert sharded.checkpoint_bytes == pytest.approx(replicated.checkpoint_bytes, rel=1e-6)
    assert plan(*large, accelerator="l4", devices=8).parallel == "fsdp"


def test_the_step_time_of_a_tiny_model_is_the_time_to_launch_its_kernels() -> None:
    small = ["model.n_layer=2", "model.n_embd=32", "model.n_head=2", "training.global_batch_size=2"]
    fast, slow = (plan(*small, accelerator=name).seconds_per_step for name in ("b200", "l4"))
    assert fast == slow > 1e-3
