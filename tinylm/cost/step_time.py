"""Estimate the time of an optimizer step on this machine's CPU or on accelerators. This module does not import torch.

It builds a `StepEstimate` from a recipe, its vocabulary size and a device, and predicts which precision and micro-batch size
training on that device would choose for `auto`, and whether it would compile. This module counts FLOPs, bytes and kernels. `cpu`
and `accelerators` convert the counts to seconds.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tinylm.cost import accelerators, cpu, memory
from tinylm.cost.accelerators import Accelerator, MatmulPrecision
from tinylm.cost.cluster import BACKWARD_FRACTION, Cluster, Layers, Passes, Strategy, exposed_seconds
from tinylm.cost.cpu import CpuSeconds, Processor
from tinylm.cost.examples import ExampleSize
from tinylm.cost.micro_batch import (
    CPU_MICRO_BATCH_TOKENS,
    check_batch_divides,
    choose_micro_batch,
    data_parallelism,
    host_memory_bytes,
)
from tinylm.cost.network import NetworkCost, network_cost
from tinylm.cost.parameters import lora_parameters, teacher_flops_per_token
from tinylm.recipe.schema import ModelVariant, MuonOptimizer, Optimizer, Recipe, TrainingSection, TransformerSection
from tinylm.recipe.values import ComputeDtype

CLEARLY_FASTER = 0.95
"""An option is clearly faster if it takes less than this fraction of the other option's time. Timings vary by a few percent.
`precision: auto` chooses bf16 on a CPU only if it is clearly faster than fp32."""

COMPILATION_SAVINGS = 0.15
"""Assumed fraction of the forward and backward time that compilation saves. For the `modern` preset, it saved 18 to 21% in bf16 and
10 to 13% in fp32 (docs/lab-notebook.md, "What made a step faster")."""
COMPILATION_SECONDS = {"cpu": 12.0, "cuda": 45.0}
"""Assumed compilation time in seconds by device type. For other devices, it is 60 seconds."""
MIN_COMPILATION_PAYBACK = 1.5
"""Compile only if the saved time is more than this multiple of the compilation time."""

COMPILED_TOGETHER = {"cuda": (0.04, 180.0)}
"""By device type: the fraction of the time of a step with compiled blocks that compiling all blocks together may save, and the
seconds that this takes. Both are assumptions. They only decide whether training tries it, and it keeps the faster of the two."""

_ADAMW_BYTES = 28 + 12
"""Bytes per weight that an AdamW step and clipping move. AdamW reads the weight, the gradient and two moments, and writes all but
the gradient (28). Clipping reads the gradient to compute the norm, then reads and writes it again to scale it (12)."""
_NEWTON_SCHULZ_BYTES = 72
"""Bytes per weight that a Muon step with Newton-Schulz iterations moves: 28 for the momentum and the update, 16 for stacking and
the norm, 16 for the iteration and 12 for the weight."""
_RATIONAL_BYTES = 44
"""Bytes per weight that a Muon step with a rational function moves: 28 for the momentum and the update, 4 for the Gram matrix and
12 for the product that updates the weight."""


@dataclass(frozen=True)
class StepEstimate:
    """The estimated cost of one optimizer step on a device, and the values that training would choose for `auto`."""

    name: str
    memory_bytes: int
    """Total memory of the device."""
    peak_flops: float
    precision: ComputeDtype
    compiled: bool
    micro_batch_size: int
    optimizer: Optimizer
    step_seconds: float
    evaluation_seconds: float
    """Evaluation time in seconds per held-out token."""
    start_up_seconds: float
    """Compilation time in seconds, or 0 without compilation."""
    cpu_share: float = 1.0
    """Fraction of the time that a thread runs on a CPU core when all cores are in use. It is 1 for accelerators."""
    parallel: Strategy = "ddp"
    """How several devices train together."""


def with_teachers(step: StepEstimate, recipe: Recipe, vocab_size: int, teachers: Sequence[ModelVariant]) -> StepEstimate:
    """Add the forward passes of distilled models to a step. They are assumed to take as long per FLOP as the rest of the step."""
    if not teachers:
        return step
    network = network_cost(recipe, vocab_size)
    own_flops = network.flops(recipe.training.lora) / network.size.tokens
    return replace(step, step_seconds=step.step_seconds * (1 + teacher_flops_per_token(teachers, vocab_size) / own_flops))


def compilation_pays_off(step_seconds: float, seconds_left: float | None, steps_left: float | None, device_type: str) -> bool:
    """Return whether compilation saves clearly more time than it takes. `step_seconds` is the time of a step without compilation.

    Training ends after `seconds_left` or `steps_left`, whichever comes first. None means no limit.
    """
    saved = _total_seconds(step_seconds, seconds_left, steps_left) * COMPILATION_SAVINGS
    return saved > MIN_COMPILATION_PAYBACK * COMPILATION_SECONDS.get(device_type, 60.0)


def compiling_together_may_pay_off(
    step_seconds: float, seconds_left: float | None, steps_left: float | None, device_type: str
) -> bool:
    """Like `compilation_pays_off`, for compiling all blocks together. `step_seconds` is the time of a step with compiled blocks."""
    savings, compilation_seconds = COMPILED_TOGETHER[device_type]
    return _total_seconds(step_seconds, seconds_left, steps_left) * savings > MIN_COMPILATION_PAYBACK * compilation_seconds


def _total_seconds(step_seconds: float, seconds_left: float | None, steps_left: float | None) -> float:
    ends = [seconds_left, None if steps_left is None else steps_left * step_seconds]
    return min((end for end in ends if end is not None), default=0.0)


def cpp_compiler() -> str | None:
    """Return the C++ compiler that torch.compile uses on a CPU, or None if none is installed."""
    return next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None)


def _seconds_left(training: TrainingSection) -> float | None:
    return None if training.minutes is None else 60 * training.minutes


def estimate_on_cpu(
    recipe: Recipe, vocab_size: int, steps: int | None, processor: Processor | None, size: ExampleSize | None = None
) -> StepEstimate:
    """Estimate a step on this machine's CPU. If `processor` is None, the CPU is measured.

    `steps` is the number of steps in the run, or None if it is unknown. `size` is the size of the training examples, or None for
    the largest possible size.
    """
    training, size = recipe.training, size or ExampleSize.largest(recipe)
    host = host_memory_bytes()
    micro = choose_micro_batch(recipe, vocab_size, host, CPU_MICRO_BATCH_TOKENS, size=size)
    machine = processor or _measure(recipe, vocab_size, micro, size)

    def seconds(precision: ComputeDtype, compiled: bool = False) -> CpuSeconds:
        return cpu_seconds(recipe, vocab_size, micro, machine, precision, compiled=compiled, size=size)

    if training.precision != "auto":
        precision: ComputeDtype = training.precision
    else:
        faster = machine.has_fast_bf16 and seconds("bf16").passes < CLEARLY_FASTER * seconds("fp32").passes
        precision = "bf16" if faster else "fp32"
    micro = choose_micro_batch(recipe, vocab_size, host, CPU_MICRO_BATCH_TOKENS, half=precision != "fp32", size=size)
    compiled = training.compile not in (False, "auto")
    if training.compile == "auto":
        pays_off = compilation_pays_off(seconds(precision).passes, _seconds_left(training), steps, "cpu")
        compiled = _can_compile(recipe) and cpp_compiler() is not None and pays_off
    passes_per_token = seconds("fp32").passes / (training.global_batch_size * size.tokens)
    if training.activation_checkpointing:
        passes_per_token *= 3 / 4  # an evaluation does not recompute activations
    return StepEstimate(
        name="cpu",
        memory_bytes=host,
        peak_flops=machine.peak_flops(precision),
        precision=precision,
        compiled=compiled,
        micro_batch_size=micro,
        optimizer=_resolve_optimizer(training, "cpu", has_bf16_units=machine.has_amx),
        step_seconds=seconds(precision, compiled).total,
        evaluation_seconds=passes_per_token / 3,
        cpu_share=machine.cpu_share,
        start_up_seconds=COMPILATION_SECONDS["cpu"] if compiled else 0.0,
    )


def _can_compile(recipe: Recipe) -> bool:
    return True in recipe.model.training_values.get("compile", (True,))


def _measure(recipe: Recipe, vocab_size: int, micro_batch_size: int, size: ExampleSize) -> Processor:
    """Measure this machine's CPU with arrays as large as the recipe's activations and weights."""
    network = network_cost(recipe, vocab_size, size)
    tensor = 4 * micro_batch_size * math.ceil(size.length) * network.activation_width
    return cpu.measure(tensor, 4 * network.parameter_count)


def _trained_parameters(recipe: Recipe, vocab_size: int) -> int:
    """Return the number of trained parameters. With LoRA, only the adapters are trained."""
    model, lora = recipe.model, recipe.training.lora
    adapters = lora_parameters(model, lora) if lora and isinstance(model, TransformerSection) else 0
    return adapters or network_cost(recipe, vocab_size).parameter_count


def cpu_seconds(
    recipe: Recipe,
    vocab_size: int,
    micro_batch_size: int,
    machine: Processor,
    precision: ComputeDtype,
    *,
    compiled: bool = False,
    size: ExampleSize | None = None,
) -> CpuSeconds:
    """Estimate the parts of one optimizer step on a CPU in seconds."""
    network, training = network_cost(recipe, vocab_size, size), recipe.training
    counts, sequences = network.counts, training.global_batch_size
    micro_batches = sequences // micro_batch_size
    optimizer = _resolve_optimizer(training, "cpu", has_bf16_units=machine.has_amx)
    trained = _trained_parameters(recipe, vocab_size)
    state_bytes = trained * (_ADAMW_BYTES + 12 * (micro_batches - 1)) + counts["matrices"] * _muon_bytes(optimizer)
    if training.lora is None:  # Each micro-batch zeroes the gradients of the embedding tables.
        state_bytes += 4 * micro_batches * (counts["embedding"] + counts["positions"] + counts["tables"])
    factor = _recomputation_factor(training)
    work = cpu.Work(
        precision=precision,
        matmul_flops=factor * sequences * network.weight_flops(training.lora),
        elementwise_bytes=factor * sequences * network.elementwise_bytes(precision, compiled=compiled),
        scores=factor * sequences * network.scores,
        kernels=factor * micro_batches * network.kernels(precision, compiled=compiled),
        state_bytes=state_bytes,
        update_kernels=cpu.UPDATE_KERNELS * (network.depth + 1),
        newton_schulz_flops=_muon_flops(network.matrix_shapes, optimizer),
        newton_schulz_precision="bf16" if _updates_in_bf16(optimizer) else "fp32",
    )
    return cpu.step_seconds(machine, work)


def estimate_on_cluster(
    recipe: Recipe, vocab_size: int, steps: int | None, cluster: Cluster, size: ExampleSize | None = None
) -> StepEstimate:
    """Estimate a data-parallel step on a cluster. `steps` is the number of steps in the run, or None if it is unknown.

    `size` is the size of the training examples, or None for the largest possible size. Raises `InputError` if the batch cannot be
    divided among the devices, or if the accelerator does not support the recipe's precision.
    """
    training, size, accelerator = recipe.training, size or ExampleSize.largest(recipe), cluster.accelerator
    network = network_cost(recipe, vocab_size, size)
    check_batch_divides(recipe, cluster.gpus)
    precision = accelerator_precision(recipe, accelerator)
    peak = accelerator.matmul_flops(_matmul_precision(accelerator, precision))
    strategy = data_parallelism(recipe, vocab_size, int(accelerator.memory), cluster.gpus)
    resolved = recipe.model_copy(update={"training": training.model_copy(update={"precision": precision})})
    half = precision != "fp32"
    micro = choose_micro_batch(
        resolved, vocab_size, int(accelerator.memory), None, half=half, devices=cluster.gpus, size=size, sharded=strategy == "fsdp"
    )

    def seconds(compiled: bool) -> float:
        return accelerator_seconds(recipe, vocab_size, micro, cluster, precision, compiled=compiled, size=size)

    compiled = training.compile not in (False, "auto")
    if training.compile == "auto":
        pays_off = compilation_pays_off(seconds(compiled=False), _seconds_left(training), steps, "cuda")
        compiled = _can_compile(recipe) and pays_off
    evaluated_bytes = network.elementwise_bytes("fp32", compiled=False)
    evaluation = accelerators.step_seconds(
        accelerator, 1, "fp32", matmul_flops=network.flops() / 3, elementwise_bytes=evaluated_bytes / 3
    )
    return StepEstimate(
        name=accelerator.name,
        memory_bytes=int(accelerator.memory),
        peak_flops=peak,
        precision=precision,
        compiled=compiled,
        micro_batch_size=micro,
        optimizer=_resolve_optimizer(training, "cuda", has_bf16_units="bf16" in accelerator.flops),
        step_seconds=seconds(compiled),
        evaluation_seconds=evaluation.total / size.tokens,
        start_up_seconds=COMPILATION_SECONDS["cuda"] if compiled else 0.0,
        parallel=strategy,
    )


def accelerator_precision(recipe: Recipe, accelerator: Accelerator) -> ComputeDtype:
    """Return the precision in which an accelerator trains a recipe."""
    if recipe.training.precision != "auto":
        return recipe.training.precision
    return "bf16" if "bf16" in accelerator.flops else "fp16" if "fp16" in accelerator.flops else "fp32"


def accelerator_seconds(
    recipe: Recipe,
    vocab_size: int,
    micro_batch_size: int,
    cluster: Cluster,
    precision: ComputeDtype,
    *,
    compiled: bool,
    size: ExampleSize | None = None,
) -> float:
    """Return the seconds for one optimizer step: the longer of the devices' time and the time to launch their kernels.

    The devices' time includes the communication that does not overlap with computation.
    """
    training, size, accelerator, devices = recipe.training, size or ExampleSize.largest(recipe), cluster.accelerator, cluster.gpus
    network = network_cost(recipe, vocab_size, size)
    matmul_precision = _matmul_precision(accelerator, precision)
    micro_batches = training.global_batch_size // devices // micro_batch_size
    sequences = training.global_batch_size
    trained = _trained_parameters(recipe, vocab_size)
    matrices = network.counts["matrices"]
    optimizer = _resolve_optimizer(training, "cuda", has_bf16_units="bf16" in accelerator.flops)
    # `step_seconds` assumes `matmul_precision` for all FLOPs, but Muon in fp32 does not use tf32. One device updates each matrix.
    in_bf16 = _updates_in_bf16(optimizer)
    muon_factor = 1 if in_bf16 else accelerator.matmul_flops(matmul_precision) / accelerator.matmul_flops("fp32")
    muon_flops = _muon_flops(network.matrix_shapes, optimizer) * muon_factor
    factor = _recomputation_factor(training)
    compiled_loss = 4 * micro_batch_size * network.targets * vocab_size >= memory.FUSED_LOSS_FROM
    elementwise = network.elementwise_bytes(precision, compiled=compiled, compiled_loss=compiled_loss)
    strategy = data_parallelism(recipe, vocab_size, int(accelerator.memory), devices)
    shards = devices if strategy == "fsdp" else 1
    computed = accelerators.step_seconds(
        accelerator,
        devices,
        matmul_precision,
        matmul_flops=factor * sequences * network.flops(training.lora) + muon_flops,
        matmul_bytes=factor * sequences * network.matmul_bytes(matmul_precision),
        elementwise_bytes=factor * sequences * elementwise,
        state_bytes=accelerators.state_bytes(trained, micro_batches, matmul_precision, shards=shards)
        + matrices * _muon_bytes(optimizer) / shards,
    )
    passes = Passes(
        computed.passes,
        micro_batches,
        gather_bytes=2 if precision == "bf16" else 4,
        backward_fraction=1 - (1 - BACKWARD_FRACTION) / factor,
    )
    exposed = exposed_seconds(cluster, _layers(network, trained), passes, strategy)
    launched = factor * micro_batches * network.kernels(precision, compiled=compiled)
    return max(computed.total + exposed, launched * cpu.LAUNCH_SECONDS)


def _layers(network: NetworkCost, trained: int) -> Layers:  # type: ignore[type-arg]
    """Return how the trained parameters are distributed over the layers. With LoRA, all of them are in the blocks."""
    counts = network.counts
    head, tables = counts["head"], counts["embedding"] + counts["positions"] + counts["tables"]
    if trained != network.parameter_count:
        head = tables = 0
    share = 6 * (counts["head"] or counts["embedding"]) * network.targets / network.flops()
    return Layers(network.depth, (trained - head - tables) / network.depth, head, tables, min(share, 1.0))


def _matmul_precision(accelerator: Accelerator, precision: ComputeDtype) -> MatmulPrecision:
    """Return the precision of matrix products. In fp32 training, it is tf32 if the accelerator supports that."""
    return "tf32" if precision == "fp32" and "tf32" in accelerator.flops else precision


def _recomputation_factor(training: TrainingSection) -> float:
    """Return the relative cost of the forward and backward pass. With activation checkpointing, the forward pass runs twice."""
    return 4 / 3 if training.activation_checkpointing else 1.0


def _resolve_optimizer(training: TrainingSection, device_type: str, *, has_bf16_units: bool) -> Optimizer:
    """Return the recipe's optimizer, with `auto` replaced with the value that training would choose."""
    optimizer = training.optimizer
    if not isinstance(optimizer, MuonOptimizer):
        return optimizer
    return optimizer.resolved(device_type, has_bf16_units=has_bf16_units)


def _muon_bytes(optimizer: Optimizer) -> int:
    """Return how many more bytes per matrix element Muon moves than AdamW's update."""
    if not isinstance(optimizer, MuonOptimizer):
        return 0
    return (_RATIONAL_BYTES if optimizer.orthogonalization == "rational" else _NEWTON_SCHULZ_BYTES) - 28


def _muon_flops(shapes: Counter[tuple[int, int]], optimizer: Optimizer) -> int:
    """Return the FLOPs of the orthogonalization. A rational function takes about as long as one Newton-Schulz iteration."""
    if not isinstance(optimizer, MuonOptimizer):
        return 0
    steps = 1 if optimizer.orthogonalization == "rational" else optimizer.newton_schulz_steps
    return sum(count * cpu.newton_schulz_flops(*shape, steps) for shape, count in shapes.items())


def _updates_in_bf16(optimizer: Optimizer) -> bool:
    """Return whether Muon computes its updates in bf16."""
    return isinstance(optimizer, MuonOptimizer) and optimizer.computes_in_bf16
