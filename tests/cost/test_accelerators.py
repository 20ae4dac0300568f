"""Test that data sheet figures are plausible, and that a step's time follows from its FLOPs and bytes."""

from __future__ import annotations

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

from tinylm.cost.accelerators import (
    ACCELERATORS,
    ACTIVATION_TRAFFIC,
    BANDWIDTH_EFFICIENCY,
    DEVICE_NAMES,
    MATMUL_EFFICIENCY,
    Accelerator,
    MatmulPrecision,
    Source,
    block_bytes,
    elementwise_bytes,
    find,
    from_device_name,
    matmul_bytes,
    outside_block_bytes,
    state_bytes,
    step_seconds,
)
from tinylm.errors import InputError
from tinylm.recipe.presets import DECODER_PRESETS
from tinylm.recipe.schema import DecoderSection

ROUND = Accelerator("round", {"fp32": 1e12, "bf16": 10e12}, 10e9, 1e12, 100e9, Source("a sheet", "https://example.org"))
COUNTS = {"matmul_flops": 6e12, "matmul_bytes": 1e9, "elementwise_bytes": 2e11, "state_bytes": 1e10}


def section(**parts: Any) -> DecoderSection:
    return DecoderSection.model_validate({"n_layer": 2, "n_head": 4, "n_embd": 32, "context_length": 24, **parts})


@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=lambda accelerator: accelerator.name)
def test_every_data_sheet_has_a_source_and_plausible_figures(accelerator: Accelerator) -> None:
    assert accelerator.source.title
    assert accelerator.source.url.startswith("https://")
    assert find(accelerator.name.upper()) is accelerator
    assert set(accelerator.flops) <= {"fp32", "tf32", "bf16", "fp16"}
    assert {"fp32", "fp16"} <= set(accelerator.flops)
    assert 1e12 < accelerator.flops["fp32"] < accelerator.flops["fp16"] < 1e16
    assert accelerator.flops.get("bf16", accelerator.flops["fp16"]) == accelerator.flops["fp16"], (
        "data sheets list the same figure for both"
    )
    assert 10e9 < accelerator.memory < 1e12
    assert accelerator.link_bandwidth < accelerator.bandwidth < 10e12


def test_names_are_unique() -> None:
    assert len({accelerator.name for accelerator in ACCELERATORS}) == len(ACCELERATORS)


def test_the_error_for_an_unknown_name_suggests_a_similar_name_or_lists_all_names() -> None:
    with pytest.raises(InputError, match=r"--hardware: unknown accelerator 'h100-smx' \(did you mean h100-sxm\?\)"):
        find("h100-smx")
    with pytest.raises(InputError, match=r"known accelerators: b200, h200, h100-sxm, .*rtx-3090"):
        find("abacus")


@pytest.mark.parametrize("name", ["v100-sxm2-32gb", "t4"])
def test_the_error_for_an_unsupported_precision_lists_the_supported_precisions(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} does not support bf16 matrix products \(use fp32 or fp16\)"):
        step_seconds(find(name), 1, "bf16", matmul_flops=1.0)
    assert step_seconds(find(name), 1, "fp16", matmul_flops=1.0).total > 0


def test_a_step_requires_at_least_one_device() -> None:
    with pytest.raises(InputError, match="--devices: must be at least 1, not 0"):
        step_seconds(ROUND, 0, "bf16", matmul_flops=1.0)


def test_a_step_on_four_devices_matches_a_calculation_by_hand() -> None:
    seconds = step_seconds(ROUND, 4, "bf16", **COUNTS)
    assert seconds.matmul == pytest.approx(6e12 / 10e12 / MATMUL_EFFICIENCY / 4)
    assert seconds.elementwise == pytest.approx(0.2 / 4 / BANDWIDTH_EFFICIENCY)
    assert seconds.state == pytest.approx(0.01 / BANDWIDTH_EFFICIENCY), "every device stores the whole state"
    assert seconds.total == seconds.matmul + seconds.elementwise + seconds.state == seconds.passes + seconds.state


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_doubling_a_count_at_most_doubles_the_time(count: str, devices: int) -> None:
    once = step_seconds(ROUND, devices, "bf16", **COUNTS).total
    twice = step_seconds(ROUND, devices, "bf16", **{**COUNTS, count: 2 * COUNTS[count]}).total
    assert once <= twice <= 2 * once


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_shared_work_scales_linearly_and_the_state_does_not(devices: int) -> None:
    def seconds(devices: int, **counts: float) -> float:
        return step_seconds(ROUND, devices, "bf16", **counts).total

    shared = {**COUNTS, "state_bytes": 0.0}
    assert seconds(devices, **shared) == pytest.approx(seconds(1, **shared) / devices)
    assert seconds(devices, **COUNTS) >= seconds(1, **COUNTS) / devices


def test_a_faster_device_saves_time() -> None:
    slow = step_seconds(ROUND, 8, "bf16", **COUNTS)
    for change in ({"bandwidth": 2e12}, {"flops": {"bf16": 20e12}}):
        assert step_seconds(replace(ROUND, **change), 8, "bf16", **COUNTS).total < slow.total


def test_a_memory_bound_matmul_takes_as_long_as_its_memory_traffic() -> None:
    seconds = step_seconds(ROUND, 1, "bf16", matmul_flops=6e12, matmul_bytes=2e12)
    assert seconds.matmul == pytest.approx(2 / BANDWIDTH_EFFICIENCY)


def test_the_traffic_of_a_gpt2_block_matches_a_calculation_by_hand() -> None:
    """In 16 bits with F = 4 C, add up two norms, two residual sums, GELU, the gradient of q, k and v (3 C), and biases (9 C)."""
    model = section(preset="gpt2")
    norms, sums = 2 * (8 + 6 + 6 + 12 + 8), 2 * (10 + 6 + 12)
    gelu, qkv_gradient, biases = 2 * 5 * 4, 2 * 2 * 3, 2 * (3 + 1 + 4 + 1)
    assert block_bytes(model, "bf16", compiled=False) == 32 * (norms + sums + gelu + qkv_gradient + biases)
    norms_and_sums = 2 * (12 + 16 + 6)
    assert block_bytes(model, "bf16", compiled=True) == 32 * (norms_and_sums + gelu + qkv_gradient + biases)


def test_a_16_bit_residual_stream_moves_half_the_bytes_and_has_no_casts() -> None:
    model = section(preset="gpt2")
    for compiled in (False, True):
        fp32 = block_bytes(model, "fp32", compiled=compiled)
        bf16 = block_bytes(model, "bf16", compiled=compiled, stream_bytes=2)
        assert fp32 == 2 * bf16
        assert bf16 < block_bytes(model, "bf16", compiled=compiled)


def test_the_eager_loss_moves_36_bytes_per_logit_and_the_compiled_loss_8() -> None:
    model = section(preset="gpt2")
    for compiled, expected in ((False, 36), (True, 8)):
        small, large = (outside_block_bytes(model, vocab_size, "fp16", compiled=compiled) for vocab_size in (1000, 2000))
        assert large - small == 1000 * expected


@pytest.mark.parametrize("preset", DECODER_PRESETS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compilation_reduces_traffic_and_more_layers_increase_it(preset: str, precision: MatmulPrecision) -> None:
    shallow, deep = (section(preset=preset, n_layer=n_layer) for n_layer in (2, 4))
    eager, compiled = (elementwise_bytes(shallow, 61, precision, compiled=flag) for flag in (False, True))
    assert 0 < compiled < eager
    for flag, bytes_of_shallow in ((False, eager), (True, compiled)):
        added = elementwise_bytes(deep, 61, precision, compiled=flag) - bytes_of_shallow
        assert added == 2 * block_bytes(shallow, precision, compiled=flag)


def test_16_bits_halve_the_traffic_of_matrix_products() -> None:
    model = section(preset="modern", n_kv_head=2)
    assert matmul_bytes(model, 61, "fp32") == 2 * matmul_bytes(model, 61, "bf16")
    assert matmul_bytes(model, 61, "tf32") == matmul_bytes(model, 61, "fp32")


def test_every_micro_batch_moves_the_weights() -> None:
    one, two, three = (state_bytes(1000, micro_batches, "bf16") for micro_batches in (1, 2, 3))
    assert three - two == two - one == 1000 * (2 + 2 + 2 + 6 + 6 + 12)
    assert one - (two - one) == 1000 * 40, "bytes per weight and step: 12 for clipping, 28 for AdamW"


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the bytes that all operations except matrix products and attention read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in {"mm", "addmm", "bmm", "detach", "empty"} and "attention" not in name:
            # Key the inputs by address, because x * x reads x only once.
            inputs = {leaf.data_ptr(): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in [*inputs.values(), *results])
        return result


def swiglu(x: Tensor) -> Tensor:
    gate, values = x.chunk(2, dim=-1)
    return F.silu(gate) * values


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


@pytest.mark.parametrize(("kind", "width"), [("gelu", 16), ("relu", 16), ("relu2", 16), ("swiglu", 32)])
def test_the_traffic_of_an_activation_matches_torch(kind: str, width: int) -> None:
    activations: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "relu2": relu2, "swiglu": swiglu}
    x = torch.randn(64, width, requires_grad=True)
    gradient = torch.ones(64, 16)
    with Traffic() as traffic:
        activations[kind](x).backward(gradient)  # type: ignore[no-untyped-call]
    assert traffic.bytes == ACTIVATION_TRAFFIC[kind][0] * 64 * 16 * 4


def test_the_eager_traffic_of_gpt2_matches_torch() -> None:
    """Compare with Hugging Face's GPT-2 in float32, with so many tokens that the weight traffic is negligible."""
    from transformers import GPT2Config, GPT2LMHeadModel  # takes seconds, which test processes without this test save

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


def test_the_module_does_not_import_torch() -> None:
    code = "import sys, tinylm.cost.accelerators; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_known_device_has_a_data_sheet() -> None:
    for name, sheet in DEVICE_NAMES.items():
        accelerator = from_device_name(f"NVIDIA {name}")
        assert accelerator is not None
        assert accelerator.name == sheet


def test_a_device_is_found_by_the_drivers_exact_name() -> None:
    sheets = [from_device_name(name) for name in ("NVIDIA GeForce RTX 4090", "Tesla T4", "NVIDIA GeForce RTX 4090 D")]
    assert [None if sheet is None else sheet.name for sheet in sheets] == ["rtx-4090", "t4", None]
