"""Estimate the time of a training step on common accelerators from data sheet figures. This module does not import torch.

The module converts counts (FLOPs and bytes) to seconds. The step time is a roofline estimate (Williams, Waterman & Patterson
2009). It is the sum of the times for matrix products and other memory traffic. The constants are the same for every recipe and,
except for `MATMUL_EFFICIENCY_HOPPER`, for every accelerator. `benchmarks/published.py` compares the estimates with published
training runs.

The estimate ignores communication, which `cluster` adds, and kernel launches, which dominate steps of a few milliseconds and which
`step_time` accounts for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tinylm.errors import InputError, did_you_mean
from tinylm.recipe.schema import TransformerSection

MatmulPrecision = Literal["fp32", "tf32", "bf16", "fp16"]

MATMUL_EFFICIENCY = 0.65
"""Fraction of the data sheet's FLOP/s that the matrix products of a training step reach. The best shapes reach 0.86 on an A100,
0.80 on an H100 and 0.78 on a B200 (https://github.com/stas00/ml-engineering/tree/master/compute/accelerator, "Maximum Achievable
Matmul FLOPS"). The shapes in a GPT are assumed to reach a fifth less because tiles do not fill the last wave, inner dimensions are
short, and attention recomputes its scores in the backward pass. The best fit to llm.c's runs on A100s is 0.7."""
MATMUL_EFFICIENCY_HOPPER = 0.55
"""The same for H100s and H200s, fitted to `gpt2-124m` on one H200 (benchmarks/results/h200-2026-11.md). With this value, the
estimates for the runs on H100s in `benchmarks/published.py` are within 5%. With the value above, they were 8 to 13% too fast."""
BANDWIDTH_EFFICIENCY = 0.85
"""Fraction of the data sheet's memory bandwidth that all other kernels reach. This value is an assumption. Large copies reach about
0.9. Norms and losses, which reduce along rows, reach less."""


@dataclass(frozen=True)
class Source:
    """A manufacturer's document that contains the figures."""

    title: str
    url: str


@dataclass(frozen=True)
class Accelerator:
    """The data sheet figures of one device.

    `flops`: dense matrix FLOP/s for each precision, without structured sparsity. 16-bit products accumulate in float32.
    `memory`: memory in bytes. A GB in the data sheet counts as 10^9 bytes. The chip has 7% more, but ECC and the driver use most
    of the difference.
    `bandwidth`: memory bandwidth in bytes/s.
    `link_bandwidth`: bandwidth to the other devices in one direction, in bytes/s. This is half the figure in data sheets, which
    add both directions. For cards that can only be bridged in pairs, it is the PCIe bandwidth.
    `matmul_efficiency`: fraction of `flops` that matrix products reach.
    `network_bandwidth`: bandwidth of a node's network in one direction, in bytes/s: that of NVIDIA's DGX or HGX systems with eight
    devices, and 100 Gbit/s for devices that are not sold in such systems.
    """

    name: str
    flops: Mapping[str, float]
    memory: float
    bandwidth: float
    link_bandwidth: float
    source: Source
    matmul_efficiency: float = MATMUL_EFFICIENCY
    network_bandwidth: float = 12.5e9

    def matmul_flops(self, precision: MatmulPrecision) -> float:
        """Return the dense FLOP/s in the data sheet. Raises `InputError` if the device does not support the precision."""
        if precision not in self.flops:
            known = " or ".join(self.flops)
            raise InputError(f"{self.name} does not support {precision} matrix products", where="precision", hint=f"use {known}")
        return self.flops[precision]


@dataclass(frozen=True)
class StepSeconds:
    """The parts of one optimizer step in seconds, without communication."""

    matmul: float
    elementwise: float
    """Other memory traffic of the forward and backward passes."""
    state: float
    """Memory traffic of the weights, the gradients and the optimizer state."""

    @property
    def passes(self) -> float:
        """The forward and backward passes."""
        return self.matmul + self.elementwise

    @property
    def total(self) -> float:
        return self.passes + self.state


def _from_teraflops(fp32: float, tf32: float | None, bf16: float | None, fp16: float) -> dict[str, float]:
    figures = {"fp32": fp32, "tf32": tf32, "bf16": bf16, "fp16": fp16}
    return {precision: teraflops * 1e12 for precision, teraflops in figures.items() if teraflops is not None}


_H100 = Source(
    "NVIDIA H100 Tensor Core GPU data sheet", "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
)
_A100 = Source(
    "NVIDIA A100 Tensor Core GPU data sheet",
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-nvidia-us-2188504-web.pdf",
)
_HOPPER_SXM = _from_teraflops(67, 494.7, 989.4, 989.4)
_PCIE3, _PCIE4, _PCIE5 = 16e9, 32e9, 64e9  # 16 lanes, one direction
_HDR, _NDR = 8 * 25e9, 8 * 50e9  # one InfiniBand card per device

ACCELERATORS: tuple[Accelerator, ...] = (  # name, FLOP/s, memory, bandwidth, link bandwidth, source
    Accelerator(
        "b200",
        _from_teraflops(80, 1100, 2250, 2250),
        180e9,
        8e12,
        900e9,
        Source(
            "NVIDIA Blackwell Architecture Technical Brief, HGX B200; memory as in the DGX B200 data sheet",
            "https://resources.nvidia.com/en-us-blackwell-architecture",
        ),
        network_bandwidth=_NDR,
    ),
    Accelerator(
        "h200",
        _HOPPER_SXM,
        141e9,
        4.8e12,
        450e9,
        Source("NVIDIA H200 Tensor Core GPU data sheet, SXM", "https://www.nvidia.com/en-us/data-center/h200/"),
        MATMUL_EFFICIENCY_HOPPER,
        _NDR,
    ),
    Accelerator("h100-sxm", _HOPPER_SXM, 80e9, 3.35e12, 450e9, _H100, MATMUL_EFFICIENCY_HOPPER, _NDR),
    Accelerator("h100-pcie", _from_teraflops(51, 378, 756, 756), 80e9, 2e12, _PCIE5, _H100, MATMUL_EFFICIENCY_HOPPER),
    Accelerator("a100-80gb-sxm", _from_teraflops(19.5, 156, 312, 312), 80e9, 2.039e12, 300e9, _A100, network_bandwidth=_HDR),
    Accelerator("a100-80gb-pcie", _from_teraflops(19.5, 156, 312, 312), 80e9, 1.935e12, _PCIE4, _A100),
    Accelerator(
        "a100-40gb-sxm",
        _from_teraflops(19.5, 156, 312, 312),
        40e9,
        1.555e12,
        300e9,
        Source(
            "NVIDIA A100 Tensor Core GPU Architecture, white paper",
            "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf",
        ),
        network_bandwidth=_HDR,
    ),
    Accelerator(
        "v100-sxm2-32gb",
        _from_teraflops(15.7, None, None, 125),
        32e9,
        900e9,
        150e9,
        Source(
            "NVIDIA V100 Tensor Core GPU data sheet",
            "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf",
        ),
        network_bandwidth=50e9,  # four EDR InfiniBand cards
    ),
    Accelerator(
        "l40s",
        _from_teraflops(91.6, 183, 362, 362),
        48e9,
        864e9,
        _PCIE4,
        Source("NVIDIA L40S data sheet", "https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413"),
    ),
    Accelerator(
        "l4",
        _from_teraflops(30.3, 60, 121, 121),
        24e9,
        300e9,
        _PCIE4,
        Source("NVIDIA L4 data sheet", "https://resources.nvidia.com/en-us-data-center-overview/l4-gpu-datasheet"),
    ),
    Accelerator(
        "t4",
        _from_teraflops(8.1, None, None, 65),
        16e9,
        300e9,
        _PCIE3,
        Source(
            "NVIDIA T4 Tensor Core GPU data sheet",
            "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf",
        ),
    ),
    Accelerator(
        "a10g",
        _from_teraflops(35, 35, 70, 70),
        24e9,
        600e9,
        _PCIE4,
        Source(
            "NVIDIA A10G Tensor Core GPU data sheet",
            "https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf",
        ),
    ),
    Accelerator(
        "rtx-4090",
        _from_teraflops(82.6, 82.6, 165.2, 165.2),
        24e9,
        1.008e12,
        _PCIE4,
        Source(
            "NVIDIA Ada GPU Architecture, white paper, appendix A",
            "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
        ),
    ),
    Accelerator(
        "rtx-3090",
        _from_teraflops(35.6, 35.6, 71, 71),
        24e9,
        936e9,
        _PCIE4,
        Source(
            "NVIDIA Ampere GA102 GPU Architecture, white paper, table 9",
            "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf",
        ),
    ),
)


DEVICE_NAMES = {
    "B200": "b200",
    "H200": "h200",
    "H100 80GB HBM3": "h100-sxm",
    "H100 PCIe": "h100-pcie",
    "A100-SXM4-80GB": "a100-80gb-sxm",
    "A100 80GB PCIe": "a100-80gb-pcie",
    "A100-SXM4-40GB": "a100-40gb-sxm",
    "A100-PCIE-40GB": "a100-40gb-sxm",  # same peak FLOP/s, but PCIe instead of NVLink
    "V100-SXM2-32GB": "v100-sxm2-32gb",
    "V100-SXM2-16GB": "v100-sxm2-32gb",  # same peak FLOP/s, but half the memory
    "L40S": "l40s",
    "L4": "l4",
    "T4": "t4",
    "A10G": "a10g",
    "RTX 4090": "rtx-4090",
    "RTX 3090": "rtx-3090",
}
"""Maps each device name reported by the driver, without the vendor, to an accelerator with the same peak FLOP/s.

Device names must match exactly. For example, an "RTX 4090 D" is a different device."""


def from_device_name(name: str) -> Accelerator | None:
    """Return the accelerator for a device name reported by the driver, such as "NVIDIA H200", or None if it is unknown."""
    for vendor in ("NVIDIA ", "Tesla ", "GeForce "):
        name = name.removeprefix(vendor)
    return find(DEVICE_NAMES[name]) if name in DEVICE_NAMES else None


def find(name: str) -> Accelerator:
    """Return the accelerator with this name, ignoring case. Raises `InputError` with suggestions if the name is unknown."""
    by_name = {accelerator.name: accelerator for accelerator in ACCELERATORS}
    wanted = name.strip().lower()
    if wanted not in by_name:
        hint = did_you_mean(wanted, by_name) or "known accelerators: " + ", ".join(by_name)
        raise InputError(f"unknown accelerator {name!r}", where="--hardware", hint=hint)
    return by_name[wanted]


def step_seconds(
    accelerator: Accelerator,
    devices: int,
    precision: MatmulPrecision,
    *,
    matmul_flops: float,
    matmul_bytes: float = 0.0,
    elementwise_bytes: float = 0.0,
    state_bytes: float = 0.0,
) -> StepSeconds:
    """Estimate the seconds for one optimizer step with data parallelism over `devices`, without communication.

    Three counts apply to the global batch, which is divided among the devices. `matmul_flops` is the number of FLOPs in all
    matrix products, `matmul_bytes` is the memory traffic for their operands (the bottleneck in narrow models), and
    `elementwise_bytes` is all other memory traffic. `state_bytes` is the memory traffic for weights, gradients and optimizer state
    on each device.

    Raises `InputError` if the accelerator does not support the precision, or if `devices` is below 1.
    """
    if devices < 1:
        raise InputError(f"must be at least 1, not {devices}", where="--devices")
    peak = accelerator.matmul_flops(precision)
    bandwidth = BANDWIDTH_EFFICIENCY * accelerator.bandwidth
    # A kernel loads operands while it computes, so its time is the longer of the two.
    matmul = max(matmul_flops / (accelerator.matmul_efficiency * peak), matmul_bytes / bandwidth) / devices
    elementwise = elementwise_bytes / bandwidth / devices
    return StepSeconds(matmul, elementwise, state_bytes / bandwidth)


@dataclass(frozen=True)
class _ElementSizes:
    """Bytes per element in the residual stream and in all other activations."""

    stream: int
    other: int

    @property
    def cast(self) -> int:
        """Bytes per element that a cast between the two sizes moves, or 0 if they are equal."""
        return self.stream + self.other if self.stream != self.other else 0


def _element_sizes(precision: MatmulPrecision, stream_bytes: int = 4) -> _ElementSizes:
    return _ElementSizes(stream_bytes, 2) if precision in ("bf16", "fp16") else _ElementSizes(4, 4)


ACTIVATION_TRAFFIC = {
    # A prime marks a gradient. A semicolon separates the forward pass from the backward pass.
    "gelu": (2 + 3, 2 + 3),  # x -> y; y', x -> x'
    "gelu_exact": (2 + 3, 2 + 3),
    "silu": (2 + 3, 2 + 3),
    "relu": (2 + 3, 2 + 3),
    "relu2": (2 + 2 + 2 + 2 + 3 + 3, 2 + 3),  # eager: relu, square; pow(x, 1), times 2, times y', gradient of relu
    "swiglu": (2 + 3 + 3 + 3 + 3 + 4, 3 + 5),  # eager: silu, product; two products, gradient of silu, concatenation of the halves
    "geglu": (2 + 3 + 3 + 3 + 3 + 4, 3 + 5),
    "geglu_exact": (2 + 3 + 3 + 3 + 3 + 4, 3 + 5),
}
"""Elements per hidden unit that an activation reads and writes in the forward and backward pass: (eager, compiled)."""


def block_bytes(model: TransformerSection, precision: MatmulPrecision, *, compiled: bool, stream_bytes: int = 4) -> int:
    """Return the bytes per token that one block moves outside its matrix products in the forward and backward pass.

    In eager mode, every operation reads its inputs and writes its result. In compiled mode, neighboring operations become one
    kernel that reads the group's inputs and writes its outputs.

    Legend: C width, F feed-forward width, P columns of queries, keys and values, R columns of queries and keys, e bytes per
    element, s bytes per element in the residual stream. In 16-bit precision, s is `stream_bytes`: 4 if autocast leaves the stream
    in float32, or 2 if the model casts the stream, which avoids further casts. A prime marks a gradient. A semicolon separates
    the forward pass from the backward pass.

    ==================  ============================================  ===================================================
    operation           eager                                         compiled
    ==================  ============================================  ===================================================
    norm                C: x -> y (2s), cast (s + e);                 with its sum and casts: x, branch -> x, y (2s + 2e);
                        cast (s + e), y', x -> x' (3s), gain (2s)     y', x, x' -> x', cast (e + 3s + e), gain (e + s)
    residual sum        C: x, branch -> x (2s + e);                   (in the norm)
                        cast (s + e), sum of two gradients (3s)
    activation          F: `ACTIVATION_TRAFFIC` (e)                   F: `ACTIVATION_TRAFFIC` (e)
    gradient of q k v   P: concatenated (2e)                          the same
    biases              P + C + F + C: sums of their gradients (e)    the same
    rotary positions    R: 4 products, 2 sums, concatenation (9e);    R: 2e; 2e
                        10e
    norm of q and k     R: 2e; 5e                                     R: in the rotation; e
    dropout             2C: x -> y, mask (2e + 1), twice              (in the norm)
    ==================  ============================================  ===================================================
    """
    sizes = _element_sizes(precision, stream_bytes)
    s, e, cast = sizes.stream, sizes.other, sizes.cast
    width, hidden = model.n_embd, model.feed_forward_width
    queries, keys = model.n_head * model.head_width, model.kv_heads * model.head_width
    inputs = 2 * hidden if model.is_gated else hidden
    norms = 1 if model.norm_position == "post" and model.parallel_residual else 2
    eager_passes, compiled_passes = ACTIVATION_TRAFFIC[model.feed_forward]
    total = 2 * e * (queries + 2 * keys)
    total += e * (queries + 2 * keys + width + inputs + width) if model.bias else 0
    rotary = model.position == "rope"
    if compiled:
        copy = e if cast else 0
        total += norms * width * ((2 * s + 2 * e) + (e + 3 * s + copy) + (e + s))
        total += compiled_passes * e * hidden
        total += (queries + keys) * e * (4 * rotary + (1 if rotary else 5) * model.qk_norm)
    else:
        total += norms * width * ((2 * s + cast) + (cast + 3 * s + 2 * s))
        total += 2 * width * ((2 * s + e) + (cast + 3 * s))
        total += eager_passes * e * hidden
        total += (queries + keys) * e * (19 * rotary + 7 * model.qk_norm)
        total += 2 * width * 2 * (2 * e + 1) if model.dropout else 0
    return total


def outside_block_bytes(
    model: TransformerSection,
    vocab_size: int,
    precision: MatmulPrecision,
    *,
    compiled: bool,
    stream_bytes: int = 4,
    compiled_loss: bool | None = None,
) -> int:
    """Return the bytes per token moved outside the blocks and the head's matrix product, by the embedding, last norm and loss.

    The loss dominates, with V logits of e bytes. In eager mode, the logits are cast to float32 (e + 4), and their gradient is cast
    back (e + 4). Log-softmax reads and writes the logits (8). The incoming gradient is written as zeros with one nonzero entry (4),
    and the outgoing gradient is computed from it and the log-softmax result (12). In compiled mode, the logits are read for the
    maximum, the sum and the gradient, and the gradient is written (4e). In eager mode, a soft cap adds three operations in the
    forward pass (6e) and three in the backward pass (7e). In compiled mode, it is fused into the other kernels. If `compiled_loss`
    is None, the loss uses the same mode as the rest of the model.
    """
    sizes = _element_sizes(precision, stream_bytes)
    s, e, cast = sizes.stream, sizes.other, sizes.cast
    norms = (1 if model.norm_position == "pre" else 0) + (1 if model.embedding_norm else 0)
    if compiled:
        copy = e if cast else 0
        norm = (s + e) + (e + s + s + copy) + (e + s)
        embedding = 2 * s + 3 * s  # copy a row; read its gradient and add it to the gradient of the table
    else:
        norm = (2 * s + cast) + (cast + 3 * s + 2 * s)
        embedding = 2 * s + 3 * s + (2 * s if model.position in ("learned", "sinusoidal") else 0)
    if compiled if compiled_loss is None else compiled_loss:
        logits = 4 * e
    else:
        logits = (2 * (e + 4) if e < 4 else 0) + 8 + 4 + 12 + (13 * e if model.logit_softcap is not None else 0)
    return model.n_embd * (embedding + norms * norm) + vocab_size * logits


def elementwise_bytes(
    model: TransformerSection, vocab_size: int, precision: MatmulPrecision, *, compiled: bool, stream_bytes: int = 4
) -> int:
    """Return the bytes per token that the forward and backward pass of the whole model move outside matrix products."""
    blocks = model.n_layer * block_bytes(model, precision, compiled=compiled, stream_bytes=stream_bytes)
    return blocks + outside_block_bytes(model, vocab_size, precision, compiled=compiled, stream_bytes=stream_bytes)


def matmul_bytes(model: TransformerSection, vocab_size: int, precision: MatmulPrecision) -> int:
    """Return the bytes per token of activations that matrix products read and write in the forward and backward pass.

    `state_bytes` counts the weights. Each weight takes part in three products: for the output, the input gradient and the weight
    gradient. Each product reads or writes one input row and one output row. Attention is one kernel (Dao et al. 2022), with
    q, k, v -> y in the forward pass and q, k, v, y, y' -> q', k', v' in the backward pass.
    """
    e = _element_sizes(precision).other
    width, hidden = model.n_embd, model.feed_forward_width
    queries, keys = model.n_head * model.head_width, model.kv_heads * model.head_width
    inputs = 2 * hidden if model.is_gated else hidden
    projections = (width + queries + 2 * keys) + (queries + width) + (width + inputs) + (hidden + width)
    attention = (2 * queries + 2 * keys) + (4 * queries + 4 * keys)
    return e * (model.n_layer * (3 * projections + attention) + 3 * (width + vocab_size))


def state_bytes(parameters: int, micro_batches: int, precision: MatmulPrecision, *, shards: int = 1) -> float:
    """Return the bytes moved on one device for weights, gradients and AdamW state in a step with `micro_batches` micro-batches.

    In each micro-batch, each weight is read for two products and its gradient is written (3e) and added to the sum (12). In 16-bit
    precision, the weight and gradient are also cast (6 each). In each step, the gradient norm is computed and the gradients are
    scaled (12). A fused AdamW then reads the weight, the gradient and two moments, and writes all but the gradient (28). If the
    weights are sharded, each device updates one of `shards` parts of them.
    """
    e = _element_sizes(precision).other
    casts = 2 * _element_sizes(precision).cast
    return parameters * (micro_batches * (3 * e + casts + 12) + (12 + 28) / shards)
