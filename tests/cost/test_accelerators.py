"""Data sheets are read right, and a step's seconds follow from its counts."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from tinylm.cost.accelerators import (
    ACCELERATORS,
    ACTIVATION_PASSES,
    BANDWIDTH_SHARE,
    HIDDEN_SHARE,
    LINK_SHARE,
    MATMUL_SHARE,
    Accelerator,
    Precision,
    Source,
    elementwise_bytes,
    ends_bytes,
    find,
    layer_bytes,
    matmul_bytes,
    state_bytes,
    step_seconds,
)
from tinylm.errors import InputError
from tinylm.recipe.presets import PRESETS
from tinylm.recipe.schema import ModelSection

ROUND = Accelerator("round", {"fp32": 1e12, "bf16": 10e12}, 10e9, 1e12, 100e9, Source("a sheet", "https://example.org"))
COUNTS = {"matmul_flops": 6e12, "matmul_bytes": 1e9, "elementwise_bytes": 2e11, "state_bytes": 1e10, "gradient_bytes": 1e9}


def section(**parts: Any) -> ModelSection:
    return ModelSection.model_validate({"n_layer": 2, "n_head": 4, "n_embd": 32, "context_length": 24, **parts})


@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=lambda accelerator: accelerator.name)
def test_every_sheet_names_its_source_and_its_figures_are_plausible(accelerator: Accelerator) -> None:
    assert accelerator.source.title
    assert accelerator.source.url.startswith("https://")
    assert find(accelerator.name.upper()) is accelerator
    assert set(accelerator.flops) <= {"fp32", "tf32", "bf16", "fp16"}
    assert {"fp32", "fp16"} <= set(accelerator.flops)
    assert 1e12 < accelerator.flops["fp32"] < accelerator.flops["fp16"] < 1e16
    assert accelerator.flops.get("bf16", accelerator.flops["fp16"]) == accelerator.flops["fp16"], "a sheet gives them one line"
    assert 10e9 < accelerator.memory < 1e12
    assert accelerator.link_bandwidth < accelerator.bandwidth < 10e12


def test_names_are_unique() -> None:
    assert len({accelerator.name for accelerator in ACCELERATORS}) == len(ACCELERATORS)


def test_an_unknown_name_is_refused_with_the_nearest_one_or_with_all() -> None:
    with pytest.raises(InputError, match=r"--hardware: there is no data sheet for 'h100-smx' \(did you mean h100-sxm\?\)"):
        find("h100-smx")
    with pytest.raises(InputError, match=r"known: b200, h200, h100-sxm, .*rtx-3090"):
        find("abacus")


@pytest.mark.parametrize("name", ["v100-sxm2-32gb", "t4"])
def test_a_precision_that_the_device_lacks_is_refused_naming_those_it_has(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} has no bf16 matrix products \(it has fp32, fp16\)"):
        step_seconds(find(name), 1, "bf16", matmul_flops=1.0)
    assert step_seconds(find(name), 1, "fp16", matmul_flops=1.0).total > 0


def test_a_step_needs_a_device() -> None:
    with pytest.raises(InputError, match="--devices: a step needs one device at least, not 0"):
        step_seconds(ROUND, 0, "bf16", matmul_flops=1.0)


def test_a_step_on_four_devices_computed_by_hand() -> None:
    seconds = step_seconds(ROUND, 4, "bf16", **COUNTS)
    assert seconds.matmul == pytest.approx(6e12 / 10e12 / MATMUL_SHARE / 4)
    assert seconds.memory == pytest.approx((0.2 / 4 + 0.01) / BANDWIDTH_SHARE), "the state is on every device whole"
    assert seconds.communication == pytest.approx((1 - HIDDEN_SHARE) * 2 * 3 / 4 * 0.01 / LINK_SHARE)
    assert seconds.total == seconds.matmul + seconds.memory + seconds.communication


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_doubling_a_count_is_never_faster_and_never_more_than_twice_as_slow(count: str, devices: int) -> None:
    once = step_seconds(ROUND, devices, "bf16", **COUNTS).total
    twice = step_seconds(ROUND, devices, "bf16", **{**COUNTS, count: 2 * COUNTS[count]}).total
    assert once <= twice <= 2 * once


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_shared_work_over_an_infinite_link_scales_perfectly_and_the_state_does_not(devices: int) -> None:
    linked = replace(ROUND, link_bandwidth=math.inf)
    shared = {**COUNTS, "state_bytes": 0.0}
    assert step_seconds(linked, devices, "bf16", **shared).total == pytest.approx(
        step_seconds(linked, 1, "bf16", **shared).total / devices
    )
    one, many = step_seconds(linked, 1, "bf16", **COUNTS), step_seconds(linked, devices, "bf16", **COUNTS)
    assert many.total >= one.total / devices


def test_one_device_communicates_nothing_and_more_bandwidth_is_never_slower() -> None:
    assert step_seconds(ROUND, 1, "bf16", **COUNTS).communication == 0
    slow = step_seconds(ROUND, 8, "bf16", **COUNTS)
    for change in ({"bandwidth": 2e12}, {"link_bandwidth": 200e9}, {"flops": {"bf16": 20e12}}):
        assert step_seconds(replace(ROUND, **change), 8, "bf16", **COUNTS).total < slow.total


def test_no_more_of_the_all_reduce_is_hidden_than_the_backward_pass_is_long() -> None:
    crawling = replace(ROUND, link_bandwidth=1.0)
    seconds = step_seconds(crawling, 2, "bf16", matmul_flops=6e12, gradient_bytes=1e3)
    assert seconds.communication == pytest.approx(1e3 / LINK_SHARE - 2 / 3 * seconds.matmul)


def test_a_product_waits_for_its_operands_when_they_are_slower_than_its_multipliers() -> None:
    starved = step_seconds(ROUND, 1, "bf16", matmul_flops=6e12, matmul_bytes=2e12)
    assert starved.matmul == pytest.approx(2 / BANDWIDTH_SHARE)


def test_the_traffic_of_a_gpt2_block_counted_by_hand() -> None:
    """In 16 bits and widths C, F = 4 C: two norms and sums, GELU, the joined gradient of 3 C columns, biases of 9 C."""
    model = section(preset="gpt2")
    norms, sums = 2 * (8 + 6 + 6 + 12 + 8), 2 * (10 + 6 + 12)
    gelu, joined, biases = 2 * 5 * 4, 2 * 2 * 3, 2 * (3 + 1 + 4 + 1)
    assert layer_bytes(model, "bf16", compiled=False) == 32 * (norms + sums + gelu + joined + biases)
    fused = 2 * (12 + 16 + 6)
    assert layer_bytes(model, "bf16", compiled=True) == 32 * (fused + gelu + joined + biases)


def test_a_residual_stream_of_sixteen_bits_moves_half_and_needs_no_casts() -> None:
    model = section(preset="gpt2")
    for compiled in (False, True):
        whole = layer_bytes(model, "fp32", compiled=compiled)
        halved = layer_bytes(model, "bf16", compiled=compiled, stream_bytes=2)
        assert whole == 2 * halved
        assert halved < layer_bytes(model, "bf16", compiled=compiled)


def test_the_loss_of_a_large_vocabulary_costs_36_bytes_a_logit_eager_and_8_compiled() -> None:
    model = section(preset="gpt2")
    for compiled, expected in ((False, 36), (True, 8)):
        ends = [ends_bytes(model, vocab_size, "fp16", compiled=compiled) for vocab_size in (1000, 2000)]
        assert ends[1] - ends[0] == 1000 * expected


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiling_saves_traffic_and_depth_adds_it(preset: str, precision: Precision) -> None:
    shallow, deep = (section(preset=preset, n_layer=n_layer) for n_layer in (2, 4))
    eager, compiled = (elementwise_bytes(shallow, 61, precision, compiled=flag) for flag in (False, True))
    assert 0 < compiled < eager
    for flag, bytes_of_two in ((False, eager), (True, compiled)):
        added = elementwise_bytes(deep, 61, precision, compiled=flag) - bytes_of_two
        assert added == 2 * layer_bytes(shallow, precision, compiled=flag)


def test_sixteen_bits_halve_what_products_move() -> None:
    model = section(preset="modern", n_kv_head=2)
    assert matmul_bytes(model, 61, "fp32") == 2 * matmul_bytes(model, 61, "bf16")
    assert matmul_bytes(model, 61, "tf32") == matmul_bytes(model, 61, "fp32")


def test_each_micro_batch_moves_the_weights_again() -> None:
    one, two, three = (state_bytes(1000, passes, "bf16") for passes in (1, 2, 3))
    assert three - two == two - one == 1000 * (2 + 2 + 2 + 6 + 6 + 12)
    assert one - (two - one) == 1000 * 40, "a step: clipping 12, AdamW 28"


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the bytes that every operation reads and writes, matrix products and attention apart."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in {"mm", "addmm", "bmm", "detach", "empty"} and "attention" not in name:
            inputs = {leaf.data_ptr(): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}  # x * x reads once
            results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in [*inputs.values(), *results])
        return result


def swiglu(x: Tensor) -> Tensor:
    gate, values = x.chunk(2, dim=-1)
    return F.silu(gate) * values


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


@pytest.mark.parametrize(("kind", "width"), [("gelu", 16), ("relu", 16), ("relu2", 16), ("swiglu", 32)])
def test_the_passes_of_an_activation_are_those_that_torch_makes(kind: str, width: int) -> None:
    activations: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "relu2": relu2, "swiglu": swiglu}
    x = torch.randn(64, width, requires_grad=True)
    slope = torch.ones(64, 16)
    with Traffic() as traffic:
        activations[kind](x).backward(slope)  # type: ignore[no-untyped-call]
    assert traffic.bytes == ACTIVATION_PASSES[kind][0] * 64 * 16 * 4


def test_the_eager_traffic_of_gpt2_is_what_torch_moves() -> None:
    """Counted operation by operation in Hugging Face's GPT-2, in float32; many tokens, so that what goes with weights is small."""
    config = GPT2Config(
        vocab_size=97,
        n_positions=64,
        n_embd=64,
        n_layer=3,
        n_head=4,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    network, tokens = GPT2LMHeadModel(config), torch.randint(97, (64, 65))
    with Traffic() as traffic:
        logits = network(tokens[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    model = section(preset="gpt2", n_layer=3, n_embd=64, context_length=64)
    predicted = elementwise_bytes(model, 97, "fp32", compiled=False) * 64 * 64
    assert predicted == pytest.approx(traffic.bytes, rel=0.1)


def test_it_imports_without_torch() -> None:
    code = "import sys, tinylm.cost.accelerators; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
