"""What a recipe will cost, before it costs it: parameters, batches, FLOPs, memory, time. Imports without torch.

Everything is arithmetic on the recipe, the vocabulary and the number of training tokens. Bytes are counted in `memory`. Seconds
come from `cpu` on this machine's CPU, which is measured for a moment, or from the data sheets in `accelerators`.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from typing import Literal

from tinylm.cost import accelerators, cpu, memory
from tinylm.cost.accelerators import Accelerator
from tinylm.cost.cpu import CpuSeconds, Processor
from tinylm.errors import InputError
from tinylm.recipe.schema import LoraSection, ModelSection, MuonOptimizer, Recipe, TrainingSection

Numbers = Literal["fp32", "bf16", "fp16"]

CPU_MICRO_BATCH_TOKENS = 2048
"""Beyond this a forward pass on a CPU gains nothing and only leaves the caches."""
USABLE_MEMORY = 0.6
"""Share of a device's memory that a micro-batch left to `auto` may fill."""
CLEARLY_FASTER = 0.95
"""On a CPU, bf16 is taken when its passes need at most this share of fp32's time: trials differ by a few per cent."""

COMPILING_SAVES = 0.15
"""Of a step's time, at the least of what benchmarks/README.md lists for the `modern` preset."""
COMPILING_SECONDS = {"cpu": 12.0, "cuda": 45.0}
COMPILING_WORTH = 1.5
"""What is saved must be this many times the start-up."""

UNDISTURBED = 0.9
"""Left alone, measuring has a core for 98 % of its time and more; beside one busy process mostly for 70 to 87 %."""
BUSY = "this machine is busy with something else: the times that were measured on it are less certain"

TOKENS_PER_PARAMETER = 20
"""Of a compute-optimal training (Hoffmann et al. 2022, tables 2 and 3)."""
EPOCHS_AS_GOOD_AS_NEW = 4
REPETITIONS_SCALE = 15.39
"""R* of Muennighoff et al. 2023, equation 5 and appendix A: what R repetitions of a text are worth decays as exp(-R / R*)."""

_MUON_BYTES = 72
"""That Muon moves for each weight: momentum and update (28), stack and norm (16), the iteration (16), the weight (12)."""
_ADAMW_BYTES = 28 + 12
"""For each weight: weight, gradient and two moments read, all but the gradient written; the gradient's norm and scaling."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, beside what the program itself needs.

    `activations` is the height of the forward and backward pass, `update` that of the optimiser's temporaries, `evaluation` that of
    measuring: bytes of tensors, and only one of the three is there at a time. `saving` are the copies of weights and optimiser
    state that a CPU's memory holds while they are written. `total` is the height of the training: on a GPU
    with the largest of the three, on a CPU as the resident set, which keeps what was freed.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    update: int
    evaluation: int
    saving: int
    total: int


@dataclass(frozen=True)
class ComputeOptimal:
    """What Hoffmann et al. 2022 would advise. Parameters are those of matrix products and embeddings, tables apart."""

    tokens: int
    """For the recipe's model."""
    parameters_for_flops: int
    tokens_for_flops: int
    """For the recipe's FLOPs, by C = 6 N D."""
    unique_tokens: int
    worth_tokens: int
    """What the recipe's tokens are worth in tokens that were never repeated (Muennighoff et al. 2023)."""


@dataclass(frozen=True)
class Plan:
    """The names are the keys of `tinylm plan --json`. For `minutes`, `steps` and what follows from it are estimates.

    With several devices `micro_batch_size`, `gradient_accumulation_steps` and `memory_bytes` are those of each.
    `seconds_estimate` is that of stepping, with the `start_up_seconds` of compiling; `evaluation_seconds` is that of all
    evaluations together. `mfu`: share of the device's peak in this precision that the recipe's FLOPs are. `undisturbed`: share of
    the time of measuring that this machine gave to it; 1 where a data sheet was read instead.
    """

    parameters: int
    parameters_non_embedding: int
    context_length: int
    vocab_size: int
    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    tokens_per_step: int
    steps: int
    tokens: int
    epochs: float
    flops: float
    memory_bytes: Memory
    checkpoint_bytes: int
    seconds_estimate: float
    hardware: str
    devices: int
    device_memory_bytes: int
    precision: Numbers
    compiled: bool
    mfu: float
    undisturbed: float
    seconds_per_step: float
    tokens_per_second: float
    start_up_seconds: float
    evaluation_seconds: float
    compute_optimal: ComputeOptimal


def parameter_counts(model: ModelSection, vocab_size: int) -> dict[str, int]:
    """Trainable numbers by part: embeddings (a tied head counted here), tables that are looked up, head, matrices, the rest."""
    width, hidden = model.n_embd, model.feed_forward_width
    queries, keys = model.n_head * model.head_width, model.kv_heads * model.head_width
    norm = width * (model.norm_gain + (model.norm_gain and model.bias and model.norm == "layernorm"))
    inputs = 2 * hidden if model.feed_forward == "swiglu" else hidden
    matrices = width * (queries + 2 * keys) + queries * width + width * inputs + hidden * width
    biases = (queries + 2 * keys) + width + inputs + width if model.bias else 0
    norms_per_block = 1 if model.norm_position == "post" and model.parallel_residual else 2
    small = norms_per_block * norm + biases + (2 * model.head_width if model.qk_norm and model.qk_gain else 0)
    small += 2 if model.embedding_shortcut else 0
    outside = (norm if model.norm_position == "pre" else 0) + (norm if model.embedding_norm else 0)
    return {
        "embedding": vocab_size * width,
        "positions": model.context_length * width if model.position == "learned" else 0,
        "tables": len(model.ngram_embeddings) * model.ngram_rows * model.ngram_width
        + min(2 * model.value_embeddings, model.n_layer) * vocab_size * keys,
        "head": 0 if model.tie_embeddings else vocab_size * width,
        "matrices": model.n_layer * matrices + len(model.ngram_embeddings) * model.ngram_width * width,
        "rest": model.n_layer * small + outside + (model.n_layer - 1 if model.value_residual else 0),
    }


def lora_parameters(model: ModelSection, lora: LoraSection) -> int:
    """Numbers of the low-rank additions, the only ones that such a training changes."""
    width, hidden, queries = model.n_embd, model.feed_forward_width, model.n_head * model.head_width
    shapes = {
        "attention.qkv": (width, queries + 2 * model.kv_heads * model.head_width),
        "attention.output": (queries, width),
        "feed_forward.input": (width, 2 * hidden if model.feed_forward == "swiglu" else hidden),
        "feed_forward.output": (hidden, width),
    }
    return model.n_layer * lora.rank * sum(sum(shapes[target]) for target in lora.targets)


def flops_per_token(model: ModelSection, vocab_size: int, lora: LoraSection | None = None) -> float:
    """Forward and backward: 6 per weight of every matrix product, the head included, and causal attention's own products.

    With `lora` 4 for the weights that stay as they are, which need no gradient, and 6 for the additions.
    """
    attention = 6 * model.n_layer * model.context_length * model.n_head * model.head_width
    return _weight_flops_per_token(model, vocab_size, lora) + attention


def _weight_flops_per_token(model: ModelSection, vocab_size: int, lora: LoraSection | None) -> float:
    """All but attention's own products."""
    weights = parameter_counts(model, vocab_size)["matrices"] + vocab_size * model.n_embd
    return 6.0 * weights if lora is None else 4.0 * weights + 6.0 * lora_parameters(model, lora)


def training_steps(training: TrainingSection, context_length: int, train_tokens: int) -> int | None:
    """Optimiser steps that the recipe asks for; None when the clock decides. `train_tokens` is the length of one epoch."""
    per_step = training.global_batch_size * context_length
    if training.steps is not None:
        return training.steps
    if training.tokens is not None:
        return math.ceil(training.tokens / per_step)
    if training.epochs is not None:
        sequences = max(1, (train_tokens - 1) // context_length)
        return max(1, math.ceil(training.epochs * sequences / training.global_batch_size))
    return None


def compiling_pays(step_seconds: float, seconds_left: float | None, steps_left: float | None, device_type: str) -> bool:
    """Whether compiling saves more than it costs, for steps that take `step_seconds` without it."""
    ends = [seconds_left, None if steps_left is None else steps_left * step_seconds]
    total = min((end for end in ends if end is not None), default=0.0)
    return total * COMPILING_SAVES > COMPILING_WORTH * COMPILING_SECONDS.get(device_type, 60.0)


def cpp_compiler() -> str | None:
    """The C++ compiler that compiling for a CPU would use, where one is here."""
    return next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None)


def estimate_memory(
    recipe: Recipe,
    vocab_size: int,
    micro_batch_size: int,
    *,
    precision: Numbers = "fp32",
    on_gpu: bool = False,
    accumulates: bool = True,
    half_updates: bool = False,
) -> Memory:
    """Weights, gradients and optimiser state are float32 whatever the precision; with LoRA, the last two of the additions only.

    `accumulates`: a step has several micro-batches, so that gradients exist beside a pass's activations. `half_updates`: Muon works
    in bf16.
    """
    model = recipe.model
    counts = parameter_counts(model, vocab_size)
    lora = recipe.training.lora
    parameters = sum(counts.values()) + (lora_parameters(model, lora) if lora else 0)
    trained = lora_parameters(model, lora) if lora else parameters
    muon = isinstance(recipe.training.optimizer, MuonOptimizer)
    slots = 2 * trained - (counts["matrices"] if muon else 0)
    one_pass = memory.Pass(
        vocab_size,
        micro_batch_size,
        precision,
        on_gpu=on_gpu,
        recompute=recipe.training.activation_checkpointing,
        frozen=lora is not None,
    )
    activations = memory.activation_bytes(model, one_pass)
    update = memory.muon_bytes(model, half=half_updates) if muon else 0
    evaluation = max(memory.evaluation_bytes(model, vocab_size))
    gradients = 4 * trained
    if on_gpu:
        passes = max(activations + (gradients if accumulates else 0), gradients)
        height = max(passes, gradients + update, gradients + evaluation)
    else:
        kept = gradients if accumulates else 0
        height = memory.host_bytes(model, vocab_size, max(activations, gradients - kept + update), kept)
    kept_state = 4 * (parameters + slots)
    saving = 0 if on_gpu else kept_state
    return Memory(4 * parameters, gradients, 4 * slots, activations, update, evaluation, saving, kept_state + saving + height)


def choose_micro_batch(
    recipe: Recipe,
    vocab_size: int,
    memory_bytes: int,
    most_tokens: int | None,
    *,
    half: bool = False,
    devices: int = 1,
) -> int:
    """The recipe's micro-batch, or for `auto` the largest divisor of a device's share whose step should fit in 60 % of its memory.

    `most_tokens` limits it to what is in a CPU's caches; None: a GPU. `half`: in 16 bits, bf16 unless the recipe asks for fp16.
    """
    training, context = recipe.training, recipe.model.context_length
    if training.micro_batch_size != "auto":
        return training.micro_batch_size
    batch = training.global_batch_size // devices
    precision: Numbers = ("fp16" if training.precision == "fp16" else "bf16") if half else "fp32"
    for size in (size for size in range(batch, 0, -1) if batch % size == 0):
        if most_tokens is not None and size * context > most_tokens:
            continue
        costs = estimate_memory(recipe, vocab_size, size, precision=precision, on_gpu=most_tokens is None, accumulates=size < batch)
        step = costs.weights + costs.gradients + costs.optimizer + costs.activations
        if step <= USABLE_MEMORY * memory_bytes:
            return size
    return 1


def host_memory_bytes() -> int:
    """This machine's memory; 8 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 << 30


@dataclass(frozen=True)
class _Pace:
    """What `make_plan` wants to know of a device."""

    name: str
    memory_bytes: int
    peak_flops: float
    precision: Numbers
    compiled: bool
    micro_batch_size: int
    half_updates: bool
    step_seconds: float
    evaluation_seconds: float
    """Of one held-out token."""
    start_up_seconds: float
    undisturbed: float = 1.0


def make_plan(
    recipe: Recipe,
    vocab_size: int,
    train_tokens: int,
    *,
    heldout_tokens: int = 0,
    accelerator: str | None = None,
    devices: int = 1,
    here: Processor | None = None,
) -> Plan:
    """The cost of a recipe on a text of `train_tokens`, on this machine's CPU or on `devices` accelerators of that name.

    `heldout_tokens`: what an evaluation reads. `here`: instead of measuring this machine. Raises `InputError` when the text is
    shorter than one sequence, for an accelerator without a data sheet or without the recipe's precision, and for a batch that does
    not split over the devices.
    """
    model, training = recipe.model, recipe.training
    if train_tokens <= model.context_length:
        raise InputError(
            f"the training text has about {train_tokens:,} tokens, fewer than context_length {model.context_length:,} + 1",
            where="model.context_length",
        )
    counts = parameter_counts(model, vocab_size)
    parameters = sum(counts.values()) + (lora_parameters(model, training.lora) if training.lora else 0)
    tokens_per_step = training.global_batch_size * model.context_length
    per_token = flops_per_token(model, vocab_size, training.lora)
    steps = training_steps(training, model.context_length, train_tokens)
    if accelerator is None:
        pace = _cpu(recipe, vocab_size, steps, here)
    else:
        pace = _accelerator(recipe, vocab_size, steps, accelerators.find(accelerator), devices)
    scored = min(heldout_tokens, recipe.evaluation.max_tokens or heldout_tokens)
    read = scored * model.context_length / (recipe.evaluation.stride or model.context_length)
    once = read * pace.evaluation_seconds
    if steps is None:
        left = 60 * (training.minutes or 0) - pace.start_up_seconds
        steps = max(1, int(left / (pace.step_seconds + once / recipe.evaluation.every)))
    accumulation = training.global_batch_size // devices // pace.micro_batch_size
    costs = estimate_memory(
        recipe,
        vocab_size,
        pace.micro_batch_size,
        precision=pace.precision,
        on_gpu=accelerator is not None,
        accumulates=accumulation > 1,
        half_updates=pace.half_updates,
    )
    tokens = steps * tokens_per_step
    return Plan(
        parameters=parameters,
        parameters_non_embedding=parameters - counts["embedding"] - counts["positions"] - counts["tables"] - counts["head"],
        context_length=model.context_length,
        vocab_size=vocab_size,
        global_batch_size=training.global_batch_size,
        micro_batch_size=pace.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        tokens_per_step=tokens_per_step,
        steps=steps,
        tokens=tokens,
        epochs=tokens / train_tokens,
        flops=per_token * tokens,
        memory_bytes=costs,
        checkpoint_bytes=costs.weights + costs.optimizer,
        seconds_estimate=steps * pace.step_seconds + pace.start_up_seconds,
        hardware=pace.name,
        devices=devices,
        device_memory_bytes=pace.memory_bytes,
        precision=pace.precision,
        compiled=pace.compiled,
        mfu=per_token * tokens_per_step / (pace.step_seconds * devices * pace.peak_flops),
        undisturbed=pace.undisturbed,
        seconds_per_step=pace.step_seconds,
        tokens_per_second=tokens_per_step / pace.step_seconds,
        start_up_seconds=pace.start_up_seconds,
        evaluation_seconds=once * math.ceil(steps / recipe.evaluation.every),
        compute_optimal=compute_optimal(parameters - counts["tables"], per_token * tokens, tokens, train_tokens),
    )


def compute_optimal(parameters: int, flops: float, tokens: int, unique_tokens: int) -> ComputeOptimal:
    """About 20 tokens for each parameter, and C = 6 N D: then N = sqrt(C / 120) (Hoffmann et al. 2022)."""
    best = math.sqrt(flops / (6 * TOKENS_PER_PARAMETER))
    return ComputeOptimal(
        tokens=TOKENS_PER_PARAMETER * parameters,
        parameters_for_flops=round(best),
        tokens_for_flops=round(TOKENS_PER_PARAMETER * best),
        unique_tokens=unique_tokens,
        worth_tokens=effective_tokens(tokens, unique_tokens),
    )


def effective_tokens(tokens: int, unique_tokens: int, scale: float = REPETITIONS_SCALE) -> int:
    """In tokens that were never repeated, `tokens` of a text of `unique_tokens`.

    U + U R* (1 - exp(-R / R*)) with R = tokens / U - 1 and R* the scale (Muennighoff et al. 2023).
    """
    repetitions = max(0.0, tokens / unique_tokens - 1)
    return min(tokens, round(unique_tokens * (1 + scale * (1 - math.exp(-repetitions / scale)))))


def _muon_flops(recipe: Recipe) -> int:
    optimizer = recipe.training.optimizer
    if not isinstance(optimizer, MuonOptimizer):
        return 0
    shapes = memory.matrix_shapes(recipe.model)
    steps = optimizer.newton_schulz_steps
    return sum(count * cpu.newton_schulz_flops(*shape, steps) for shape, count in shapes.items())


def _half_updates(recipe: Recipe, has_units: bool) -> bool:
    optimizer = recipe.training.optimizer
    if not isinstance(optimizer, MuonOptimizer):
        return False
    return has_units if optimizer.newton_schulz_dtype == "auto" else optimizer.newton_schulz_dtype == "bf16"


def _elementwise_bytes(model: ModelSection, vocab_size: int, precision: Numbers, *, compiled: bool) -> int:
    """Of one token. Only blocks are compiled, so that both ends are eager; bf16's residual stream is bf16."""
    stream = 2 if precision == "bf16" else 4
    blocks = model.n_layer * accelerators.layer_bytes(model, precision, compiled=compiled, stream_bytes=stream)
    return blocks + accelerators.ends_bytes(model, vocab_size, precision, compiled=False, stream_bytes=stream)


def _cpu(recipe: Recipe, vocab_size: int, steps: int | None, measured: Processor | None) -> _Pace:
    training = recipe.training
    host = host_memory_bytes()
    micro = choose_micro_batch(recipe, vocab_size, host, CPU_MICRO_BATCH_TOKENS)
    machine = measured or _measured(recipe, vocab_size, micro)
    half_updates = _half_updates(recipe, machine.has_amx)

    def seconds(precision: Numbers, compiled: bool = False) -> CpuSeconds:
        return cpu_seconds(recipe, vocab_size, micro, machine, precision, compiled=compiled)

    if training.precision != "auto":
        precision: Numbers = training.precision
    else:
        faster = machine.has_amx and seconds("bf16").passes < CLEARLY_FASTER * seconds("fp32").passes
        precision = "bf16" if faster else "fp32"
    micro = choose_micro_batch(recipe, vocab_size, host, CPU_MICRO_BATCH_TOKENS, half=precision != "fp32")
    compiled = training.compile
    if compiled == "auto":
        left = None if training.minutes is None else 60 * training.minutes
        compiled = cpp_compiler() is not None and compiling_pays(seconds(precision).passes, left, steps, "cpu")
    plain = seconds("fp32").passes / (training.global_batch_size * recipe.model.context_length)
    if training.activation_checkpointing:
        plain *= 3 / 4  # an evaluation does not compute again
    return _Pace(
        name="cpu",
        memory_bytes=host,
        peak_flops=machine.peak(precision),
        precision=precision,
        compiled=compiled,
        micro_batch_size=micro,
        half_updates=half_updates,
        step_seconds=seconds(precision, compiled).total,
        evaluation_seconds=plain / 3,
        undisturbed=machine.undisturbed,
        start_up_seconds=COMPILING_SECONDS["cpu"] if compiled else 0.0,
    )


def _measured(recipe: Recipe, vocab_size: int, micro: int) -> Processor:
    tensor = 4 * micro * recipe.model.context_length * recipe.model.feed_forward_width
    return cpu.measure(tensor, 4 * sum(parameter_counts(recipe.model, vocab_size).values()))


def cpu_seconds(
    recipe: Recipe, vocab_size: int, micro_batch_size: int, machine: Processor, precision: Numbers, *, compiled: bool = False
) -> CpuSeconds:
    """Seconds of one optimiser step on a CPU, and what they are spent on."""
    model, training = recipe.model, recipe.training
    counts = parameter_counts(model, vocab_size)
    tokens = training.global_batch_size * model.context_length
    passes = training.global_batch_size // micro_batch_size
    products = _weight_flops_per_token(model, vocab_size, training.lora)
    muon = counts["matrices"] if isinstance(training.optimizer, MuonOptimizer) else 0
    trained = lora_parameters(model, training.lora) if training.lora else sum(counts.values())
    moved = trained * (_ADAMW_BYTES + 12 * (passes - 1)) + muon * (_MUON_BYTES - 28)
    if training.lora is None:  # gradients of what is looked up begin as zeros, to which few rows are added
        moved += 4 * passes * (counts["embedding"] + counts["positions"] + counts["tables"])
    again = 4 / 3 if training.activation_checkpointing else 1.0  # forward twice, backward once: backward counts double
    half = _half_updates(recipe, machine.has_amx)
    blocks = model.n_layer * cpu.query_blocks(training.global_batch_size, model.n_head, model.context_length)
    work = cpu.Work(
        numbers=precision,
        matmul_flops=again * tokens * products,
        elementwise_bytes=again * tokens * _elementwise_bytes(model, vocab_size, precision, compiled=compiled),
        scores=again * tokens * model.context_length * model.n_head * model.n_layer,
        query_blocks=blocks,
        kernels=again * passes * cpu.kernels(model.n_layer, len(model.ngram_embeddings), precision, compiled=compiled),
        state_bytes=moved,
        update_kernels=cpu.UPDATE_KERNELS * (model.n_layer + 1),
        newton_schulz_flops=_muon_flops(recipe),
        newton_schulz_in="bf16" if half else "fp32",
    )
    return cpu.step_seconds(machine, work)


def split_over(recipe: Recipe, devices: int) -> None:
    """Raises `InputError` where the batch does not split into equal shares, or the recipe's micro-batch not into its share."""
    batch, micro = recipe.training.global_batch_size, recipe.training.micro_batch_size
    if devices < 1:
        raise InputError(f"a step needs one device at least, not {devices}", where="--devices")
    if devices == 1:
        return
    if batch % devices:
        sizes = [size for size in (batch // devices * devices, -(-batch // devices) * devices) if size]
        raise InputError(
            f"{batch} sequences do not split over {devices} devices",
            where="training.global_batch_size",
            hint=f"{' and '.join(map(str, sizes))} would",
        )
    share = batch // devices
    if micro != "auto" and share % micro:
        sizes = [size for size in range(1, share + 1) if share % size == 0]
        raise InputError(
            f"{micro} does not divide the {share} sequences of each of {devices} devices",
            where="training.micro_batch_size",
            hint=f"{', '.join(map(str, sizes))} would" if len(sizes) > 1 else f"{sizes[0]} would",
        )


def _accelerator(recipe: Recipe, vocab_size: int, steps: int | None, accelerator: Accelerator, devices: int) -> _Pace:
    """Both ways of bounding a step: what the devices need, and what it takes the interpreter to start their kernels."""
    model, training = recipe.model, recipe.training
    split_over(recipe, devices)
    if training.precision != "auto":
        precision: Numbers = training.precision
    else:
        precision = "bf16" if "bf16" in accelerator.flops else "fp16" if "fp16" in accelerator.flops else "fp32"
    sheet: accelerators.Precision = "tf32" if precision == "fp32" and "tf32" in accelerator.flops else precision
    peak = accelerator.matmul_flops(sheet)
    decided = recipe.model_copy(update={"training": training.model_copy(update={"precision": precision})})
    micro = choose_micro_batch(decided, vocab_size, int(accelerator.memory), None, half=precision != "fp32", devices=devices)
    passes = training.global_batch_size // devices // micro
    half_updates = _half_updates(recipe, "bf16" in accelerator.flops)
    tokens = training.global_batch_size * model.context_length
    counts = parameter_counts(model, vocab_size)
    parameters = sum(counts.values())
    trained = lora_parameters(model, training.lora) if training.lora else parameters
    again = 4 / 3 if training.activation_checkpointing else 1.0
    muon = counts["matrices"] if isinstance(training.optimizer, MuonOptimizer) else 0
    muon_flops = _muon_flops(recipe) * (1 if half_updates else peak / accelerator.matmul_flops("fp32"))

    def seconds(compiled: bool) -> float:
        there = accelerators.step_seconds(
            accelerator,
            devices,
            sheet,
            # Muon takes each matrix once.
            matmul_flops=again * tokens * flops_per_token(model, vocab_size, training.lora) + muon_flops,
            matmul_bytes=again * tokens * accelerators.matmul_bytes(model, vocab_size, sheet),
            elementwise_bytes=again * tokens * _elementwise_bytes(model, vocab_size, precision, compiled=compiled),
            state_bytes=accelerators.state_bytes(trained, passes, sheet) + muon * (_MUON_BYTES - 28),
            gradient_bytes=4 * trained,
        ).total
        orders = len(model.ngram_embeddings)
        started = again * passes * cpu.kernels(model.n_layer, orders, precision, compiled=compiled)
        return max(there, started * cpu.LAUNCH_SECONDS)

    compiled = training.compile
    if compiled == "auto":
        left = None if training.minutes is None else 60 * training.minutes
        compiled = compiling_pays(seconds(compiled=False), left, steps, "cuda")
    plain = _elementwise_bytes(model, vocab_size, "fp32", compiled=False)
    evaluation = accelerators.step_seconds(
        accelerator, 1, "fp32", matmul_flops=flops_per_token(model, vocab_size) / 3, elementwise_bytes=plain / 3
    )
    return _Pace(
        name=accelerator.name,
        memory_bytes=int(accelerator.memory),
        peak_flops=peak,
        precision=precision,
        compiled=compiled,
        micro_batch_size=micro,
        half_updates=half_updates,
        step_seconds=seconds(compiled),
        evaluation_seconds=evaluation.total,
        start_up_seconds=COMPILING_SECONDS["cuda"] if compiled else 0.0,
    )
