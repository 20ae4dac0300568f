"""What the data sheets say of common accelerators, and how long one training step takes on some of them. Imports without torch.

In come counts (floating-point operations, bytes); out come seconds. The model is a roofline (Williams, Waterman & Patterson
2009) with three terms that follow one another on a device: matrix products, everything that only moves memory, and what
the backward pass does not hide of the all-reduce. The same constants serve every accelerator and every recipe;
`benchmarks/published.py` holds them against training runs that others published.

It knows of one node only, whose devices all reach each other at `link_bandwidth`, and of data parallelism only. Left out is
the time to launch kernels, which rules once a step takes but a few milliseconds: of a tiny model it promises too much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tinylm.errors import InputError, did_you_mean
from tinylm.recipe.schema import ModelSection

Precision = Literal["fp32", "tf32", "bf16", "fp16"]

MATMUL_SHARE = 0.65
"""Share of the sheet's FLOP/s that a training step's matrix products reach. The best shape alone reaches 0.86 on an A100, 0.80
on an H100 and 0.78 on a B200 (https://github.com/stas00/ml-engineering/tree/master/compute/accelerator, "Maximum Achievable
Matmul FLOPS"). A fifth less is assumed for the mixture of shapes in a GPT, attention among them: tiles that do not fill the last
wave, short inner dimensions, and a backward pass of attention that forms its scores a second time. Between what llm.c's runs on
A100s (0.7) and on H100s (0.6) ask for; no value serves both exactly."""
BANDWIDTH_SHARE = 0.85
"""Share of the sheet's memory bandwidth that kernels outside matrix products reach. Assumed: large copies reach about 0.9, norms
and losses, which reduce along rows, less."""
LINK_SHARE = 0.7
"""Share of the link that a ring reaches with gradients of 100 MB and more. Assumed, and tested by no run in
`benchmarks/published.py`: the all-reduce is at most 3 % of their steps."""
HIDDEN_SHARE = 0.5
"""Share of the all-reduce that runs behind the backward pass. Assumed: the first layers' gradients and the embedding's are
ready last and have nothing left to hide behind; in a small model they are a large part."""
BACKWARD_SHARE = 2 / 3
"""The backward pass's part of forward and backward: two products for each one of the forward pass."""


@dataclass(frozen=True)
class Source:
    """The document of the maker that the figures were read from."""

    title: str
    url: str


@dataclass(frozen=True)
class Accelerator:
    """One device. `flops` are dense matrix FLOP/s by precision, without structured sparsity; 16-bit ones sum in float32.

    `memory` is in bytes with the sheet's GB taken as 10^9: the chip has 7 % more, of which ECC and the driver take most.
    `bandwidth` is bytes/s to that memory, `link_bandwidth` bytes/s to the other devices in one direction, half of the sum of both
    directions that sheets print. Cards that only a bridge joins in pairs have their PCIe slot's.
    """

    name: str
    flops: Mapping[str, float]
    memory: float
    bandwidth: float
    link_bandwidth: float
    source: Source

    def matmul_flops(self, precision: Precision) -> float:
        """Dense FLOP/s of the sheet. Raises `InputError`, naming what there is, for a precision that the device lacks."""
        if precision not in self.flops:
            known = ", ".join(self.flops)
            raise InputError(f"{self.name} has no {precision} matrix products", where="precision", hint=f"it has {known}")
        return self.flops[precision]


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one optimiser step by what they are spent on; `communication` is what the backward pass does not hide."""

    matmul: float
    memory: float
    communication: float

    @property
    def total(self) -> float:
        return self.matmul + self.memory + self.communication


def _tera(fp32: float, tf32: float | None, bf16: float | None, fp16: float) -> dict[str, float]:
    figures = {"fp32": fp32, "tf32": tf32, "bf16": bf16, "fp16": fp16}
    return {precision: teraflops * 1e12 for precision, teraflops in figures.items() if teraflops is not None}


_H100 = Source(
    "NVIDIA H100 Tensor Core GPU data sheet", "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
)
_A100 = Source(
    "NVIDIA A100 Tensor Core GPU data sheet",
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-nvidia-us-2188504-web.pdf",
)
_HOPPER_SXM = _tera(67, 494.7, 989.4, 989.4)
_PCIE3, _PCIE4, _PCIE5 = 16e9, 32e9, 64e9  # sixteen lanes, one direction

ACCELERATORS: tuple[Accelerator, ...] = (
    Accelerator(
        "b200",
        _tera(80, 1100, 2250, 2250),
        180e9,
        8e12,
        900e9,
        Source(
            "NVIDIA Blackwell Architecture Technical Brief, HGX B200; memory as in the DGX B200 data sheet",
            "https://resources.nvidia.com/en-us-blackwell-architecture",
        ),
    ),
    Accelerator(
        "h200",
        _HOPPER_SXM,
        141e9,
        4.8e12,
        450e9,
        Source("NVIDIA H200 Tensor Core GPU data sheet, SXM", "https://www.nvidia.com/en-us/data-center/h200/"),
    ),
    Accelerator("h100-sxm", _HOPPER_SXM, 80e9, 3.35e12, 450e9, _H100),
    Accelerator("h100-pcie", _tera(51, 378, 756, 756), 80e9, 2e12, _PCIE5, _H100),
    Accelerator("a100-80gb-sxm", _tera(19.5, 156, 312, 312), 80e9, 2.039e12, 300e9, _A100),
    Accelerator("a100-80gb-pcie", _tera(19.5, 156, 312, 312), 80e9, 1.935e12, _PCIE4, _A100),
    Accelerator(
        "a100-40gb-sxm",
        _tera(19.5, 156, 312, 312),
        40e9,
        1.555e12,
        300e9,
        Source(
            "NVIDIA A100 Tensor Core GPU Architecture, white paper",
            "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf",
        ),
    ),
    Accelerator(
        "v100-sxm2-32gb",
        _tera(15.7, None, None, 125),
        32e9,
        900e9,
        150e9,
        Source(
            "NVIDIA V100 Tensor Core GPU data sheet",
            "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf",
        ),
    ),
    Accelerator(
        "l40s",
        _tera(91.6, 183, 362, 362),
        48e9,
        864e9,
        _PCIE4,
        Source("NVIDIA L40S data sheet", "https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413"),
    ),
    Accelerator(
        "l4",
        _tera(30.3, 60, 121, 121),
        24e9,
        300e9,
        _PCIE4,
        Source("NVIDIA L4 data sheet", "https://resources.nvidia.com/en-us-data-center-overview/l4-gpu-datasheet"),
    ),
    Accelerator(
        "t4",
        _tera(8.1, None, None, 65),
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
        _tera(35, 35, 70, 70),
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
        _tera(82.6, 82.6, 165.2, 165.2),
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
        _tera(35.6, 35.6, 71, 71),
        24e9,
        936e9,
        _PCIE4,
        Source(
            "NVIDIA Ampere GA102 GPU Architecture, white paper, table 9",
            "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf",
        ),
    ),
)


def find(name: str) -> Accelerator:
    """The accelerator of that name, in any case. Raises `InputError`, with the nearest name or all of them, when there is none."""
    by_name = {accelerator.name: accelerator for accelerator in ACCELERATORS}
    wanted = name.strip().lower()
    if wanted not in by_name:
        hint = did_you_mean(wanted, by_name) or "known: " + ", ".join(by_name)
        raise InputError(f"there is no data sheet for {name!r}", where="--hardware", hint=hint)
    return by_name[wanted]


def step_seconds(
    accelerator: Accelerator,
    devices: int,
    precision: Precision,
    *,
    matmul_flops: float,
    matmul_bytes: float = 0.0,
    elementwise_bytes: float = 0.0,
    state_bytes: float = 0.0,
    gradient_bytes: float = 0.0,
) -> StepSeconds:
    """Seconds of one optimiser step, data-parallel over `devices` in one node.

    Of the whole global batch, so shared by the devices: `matmul_flops` of all matrix products, `matmul_bytes` that their operands
    move (the roof of narrow models), `elementwise_bytes` that everything else moves. Of each device, so not shared:
    `state_bytes` for weights, gradients and optimiser state, and `gradient_bytes`, the gradients that a ring all-reduce sums:
    each device sends 2 (N - 1) / N of them (Patarasuk & Yuan 2009).

    Raises `InputError` for a precision that the accelerator lacks and for fewer devices than one.
    """
    if devices < 1:
        raise InputError(f"a step needs one device at least, not {devices}", where="--devices")
    peak = accelerator.matmul_flops(precision)
    bandwidth = BANDWIDTH_SHARE * accelerator.bandwidth
    # A product waits for its operands or for its multipliers, whichever is slower; a kernel has both in flight at once.
    matmul = max(matmul_flops / (MATMUL_SHARE * peak), matmul_bytes / bandwidth) / devices
    elementwise = elementwise_bytes / bandwidth / devices
    ring = 2 * (devices - 1) / devices * gradient_bytes / (LINK_SHARE * accelerator.link_bandwidth)
    hidden = min(HIDDEN_SHARE * ring, BACKWARD_SHARE * (matmul + elementwise))
    return StepSeconds(matmul, elementwise + state_bytes / bandwidth, ring - hidden)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of a number: in the residual stream and what norms make of it, and elsewhere."""

    stream: int
    other: int

    @property
    def cast(self) -> int:
        """One number read in one type and written in the other; nothing where they are the same."""
        return self.stream + self.other if self.stream != self.other else 0


def _sizes(precision: Precision, stream_bytes: int = 4) -> _Sizes:
    return _Sizes(stream_bytes, 2) if precision in ("bf16", "fp16") else _Sizes(4, 4)


ACTIVATION_PASSES = {
    # Numbers read and written, forward and backward, in hidden widths: eager, compiled.
    "gelu": (2 + 3, 2 + 3),  # forward x -> y; backward y', x -> x'
    "gelu_exact": (2 + 3, 2 + 3),
    "relu": (2 + 3, 2 + 3),
    "relu2": (2 + 2 + 2 + 2 + 3 + 3, 2 + 3),  # eager: relu, square; x^1, twice, product, relu'
    "swiglu": (2 + 3 + 3 + 3 + 3 + 4, 3 + 5),  # eager: silu, product; two products, silu', joining the halves
}


def layer_bytes(model: ModelSection, precision: Precision, *, compiled: bool, stream_bytes: int = 4) -> int:
    """Bytes that one block moves for one token outside its matrix products, forward and backward.

    Eager, every operation reads its inputs and writes its result; compiled, neighbours are one kernel that reads what enters
    the group and writes what leaves it. Numbers per token, e bytes each and s in the residual stream: `stream_bytes` in 16
    bits, where autocast leaves it in float32 (4) unless the model casts it (2), which spares the casts too. C width, F hidden
    width, P columns of queries, keys and values, R of queries and keys:

    ==================  ============================================  ===================================================
    operation           eager                                         compiled
    ==================  ============================================  ===================================================
    norm                C: x -> y (2s), cast (s + e);                 with its sum and casts: x, branch -> x, y (2s + 2e);
                        cast (s + e), y', x -> x' (3s), gain (2s)     y', x, x' -> x', cast (e + 3s + e), gain (e + s)
    residual sum        C: x, branch -> x (2s + e);                   (in the norm)
                        cast (s + e), sum of two gradients (3s)
    activation          F: `ACTIVATION_PASSES` (e)                    F: `ACTIVATION_PASSES` (e)
    gradient of q k v   P: joined into one matrix (2e)                the same
    biases              P + C + F + C: their gradients' sums (e)      the same
    rotary positions    R: 4 products, 2 sums, joining (9e); 10e      R: 2e; 2e
    norm of q and k     R: 2e; 5e                                     R: in the rotation; e
    dropout             2C: x -> y, mask (2e + 1), twice              (in the norm)
    ==================  ============================================  ===================================================
    """
    sizes = _sizes(precision, stream_bytes)
    s, e, cast = sizes.stream, sizes.other, sizes.cast
    width, hidden = model.n_embd, model.feed_forward_width
    queries, keys = model.n_head * model.head_width, model.kv_heads * model.head_width
    inputs = 2 * hidden if model.feed_forward == "swiglu" else hidden
    norms = 1 if model.norm_position == "post" and model.parallel_residual else 2
    eager_passes, compiled_passes = ACTIVATION_PASSES[model.feed_forward]
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


def ends_bytes(model: ModelSection, vocab_size: int, precision: Precision, *, compiled: bool, stream_bytes: int = 4) -> int:
    """Bytes for one token outside the blocks and outside the head's matrix product: embedding, last norm, and the loss.

    The loss dominates: V logits of e bytes. Eager they are cast to float32 (e + 4, and back), log-softmax reads and writes them
    (8), its gradient is first written as zeros with one entry (4), then formed from it and the result (12). Compiled, they
    are read for the maximum, for the sum, and for the gradient that is written (4e). A soft cap is three more operations
    forward (6e) and backward (7e), or part of the compiled kernels.
    """
    sizes = _sizes(precision, stream_bytes)
    s, e, cast = sizes.stream, sizes.other, sizes.cast
    norms = (1 if model.norm_position == "pre" else 0) + (1 if model.embedding_norm else 0)
    if compiled:
        copy = e if cast else 0
        norm = (s + e) + (e + s + s + copy) + (e + s)
        logits = 4 * e
        embedding = 2 * s + 3 * s  # a row copied; its gradient read and added to the table's
    else:
        norm = (2 * s + cast) + (cast + 3 * s + 2 * s)
        logits = (2 * (e + 4) if e < 4 else 0) + 8 + 4 + 12 + (13 * e if model.logit_softcap is not None else 0)
        embedding = 2 * s + 3 * s + (2 * s if model.position in ("learned", "sinusoidal") else 0)
    return model.n_embd * (embedding + norms * norm) + vocab_size * logits


def elementwise_bytes(model: ModelSection, vocab_size: int, precision: Precision, *, compiled: bool, stream_bytes: int = 4) -> int:
    """Bytes that forward and backward of one token move outside matrix products: all blocks and both ends."""
    blocks = model.n_layer * layer_bytes(model, precision, compiled=compiled, stream_bytes=stream_bytes)
    return blocks + ends_bytes(model, vocab_size, precision, compiled=compiled, stream_bytes=stream_bytes)


def matmul_bytes(model: ModelSection, vocab_size: int, precision: Precision) -> int:
    """Bytes that the operands of one token's matrix products move, forward and backward; the weights are in `state_bytes`.

    Each of the three products of a weight (forward, and the gradients of its input and of itself) moves its input's and its
    output's width. Attention is one kernel (Dao et al. 2022): forward q, k, v -> y; backward q, k, v, y, y' -> q', k', v'.
    """
    e = _sizes(precision).other
    width, hidden = model.n_embd, model.feed_forward_width
    queries, keys = model.n_head * model.head_width, model.kv_heads * model.head_width
    inputs = 2 * hidden if model.feed_forward == "swiglu" else hidden
    projections = (width + queries + 2 * keys) + (queries + width) + (width + inputs) + (hidden + width)
    attention = (2 * queries + 2 * keys) + (4 * queries + 4 * keys)
    return e * (model.n_layer * (3 * projections + attention) + 3 * (width + vocab_size))


def state_bytes(parameters: int, micro_batches: int, precision: Precision) -> int:
    """Bytes that weights, gradients and AdamW's state move on one device in a step of `micro_batches` passes.

    A pass reads each weight for two products, writes its gradient and adds that to the sum (12), in 16 bits with a copy of
    the weight and of the gradient in the other type (6 each). A step reads the gradients' norm and scales them (12), then reads
    weight, gradient and two moments and writes all but the gradient (28), as a fused AdamW does.
    """
    e = _sizes(precision).other
    casts = 2 * _sizes(precision).cast
    return parameters * (micro_batches * (3 * e + casts + 12) + 12 + 28)
