"""Estimate the parameters, batch sizes, FLOPs, memory and time of a training run before it starts.

This module computes a `Plan` from a recipe, a vocabulary size and a number of training tokens. It does not import torch.
`parameters` counts parameters and FLOPs, `micro_batch` estimates memory, and `step_time` estimates seconds on this machine's CPU or
on accelerators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tinylm.cost import accelerators
from tinylm.cost.cluster import GPUS_PER_NODE, Cluster, Strategy
from tinylm.cost.cpu import Processor
from tinylm.cost.examples import ExampleSize
from tinylm.cost.micro_batch import MemoryEstimate, estimate_memory
from tinylm.cost.network import network_cost
from tinylm.cost.parameters import (
    lora_parameters,
    not_estimated,
    parameter_counts,
    teacher_flops_per_token,
)
from tinylm.cost.step_time import estimate_on_cluster, estimate_on_cpu, with_teachers
from tinylm.cpu_load import MIN_CPU_SHARE
from tinylm.errors import InputError
from tinylm.recipe.encoder import MaskedLMObjective
from tinylm.recipe.mixture import MixtureShares
from tinylm.recipe.schema import DecoderSection, ModelVariant, Recipe, TrainingSection, TransformerSection, require_text
from tinylm.recipe.values import ComputeDtype

BUSY = "other programs use this CPU, so training may be as slow as the upper end of the estimate"

TOKENS_PER_PARAMETER = 20
"""Training tokens per parameter for compute-optimal training (Hoffmann et al. 2022, tables 2 and 3)."""
REPETITIONS_SCALE = 15.39
"""R* in equation 5 and appendix A of Muennighoff et al. 2023. The value of the R-th repetition of a text decays as exp(-R / R*)."""


@dataclass(frozen=True)
class ComputeOptimal:
    """The recommendations of Hoffmann et al. 2022. Parameter counts exclude n-gram tables and value embeddings."""

    tokens: int
    """Compute-optimal number of training tokens for the recipe's model."""
    parameters_for_flops: int
    tokens_for_flops: int
    """Compute-optimal numbers of parameters and training tokens for the recipe's FLOPs, with C = 6 N D."""
    unique_tokens: int
    """Number of tokens in the training text."""
    effective_tokens: int
    """Number of unique tokens that would be worth as much as the repeated training tokens (Muennighoff et al. 2023)."""


@dataclass(frozen=True)
class SourceUse:
    """How much of the training a source of a mixture supplies."""

    source: str
    share: float
    """The fraction of the training sequences, over the whole run."""
    tokens: int
    """Number of tokens in the training part of the source."""
    epochs: float
    """How many times the source is read."""


@dataclass(frozen=True)
class Plan:
    """The estimated cost of a training run. Field names are the keys of `tinylm plan --json`.

    If the recipe sets `minutes`, `steps` and everything that depends on it are estimates. `micro_batch_size`,
    `gradient_accumulation_steps` and `memory_bytes` are per device. `seconds_estimate` includes compilation (`start_up_seconds`)
    but not evaluations (`evaluation_seconds`). `parallel` is how several devices train together. `mfu` is the model FLOPs
    utilization, the fraction of the peak FLOP/s at this precision that the recipe's FLOPs use. `cpu_share` is the fraction of the
    time that a thread runs on a core when all cores are in use. It is 1 for accelerators, which are not measured. If the machine
    is busy, `seconds_range` and `steps_range` extend from the estimate for an idle machine to the estimate for this CPU share.
    Otherwise, both ends equal the estimate. `not_estimated` lists the parts of the model that the plan ignores, as "key value".
    `sources` is empty unless the text is a mixture. `compute_optimal` is None unless the model is a decoder that predicts the next
    token, because these laws were measured for such models.
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
    memory_bytes: MemoryEstimate
    checkpoint_bytes: int
    seconds_estimate: float
    hardware: str
    devices: int
    nodes: int
    parallel: Strategy
    device_memory_bytes: int
    precision: ComputeDtype
    compiled: bool
    mfu: float
    cpu_share: float
    seconds_per_step: float
    tokens_per_second: float
    start_up_seconds: float
    evaluation_seconds: float
    seconds_range: tuple[float, float]
    steps_range: tuple[int, int]
    compute_optimal: ComputeOptimal | None
    not_estimated: tuple[str, ...]
    sources: tuple[SourceUse, ...] = ()

    @property
    def busy(self) -> bool:
        """Whether other programs used the CPU when it was measured."""
        return self.cpu_share < MIN_CPU_SHARE


def make_plan(
    recipe: Recipe,
    vocab_size: int,
    train_tokens: int,
    *,
    heldout_tokens: int = 0,
    source_tokens: Sequence[int] = (),
    accelerator: str | None = None,
    devices: int = 1,
    gpus_per_node: int = GPUS_PER_NODE,
    network_bandwidth: float | None = None,
    processor: Processor | None = None,
    teachers: Sequence[ModelVariant] = (),
    size: ExampleSize | None = None,
) -> Plan:
    """Estimate the cost of a recipe for `train_tokens` training tokens, on this machine's CPU or on `devices` accelerators.

    `accelerator` is a name in `accelerators.ACCELERATORS`, or None for the CPU. The devices are in nodes of `gpus_per_node`, and
    `network_bandwidth` is a node's, in bytes/s (None: that of the usual system with this accelerator). `heldout_tokens` is the
    length of the held-out text, and `source_tokens` are the numbers of training tokens of the sources of a mixture. If `processor`
    is None, the CPU is measured. `teachers` are the `model:` sections of the runs in `objective.teacher`. `size` is the mean size
    of labeled texts or sentence pairs, and None for a text, whose examples fill the context.

    Raises `InputError` if the architecture has no estimates, if the text is shorter than one sequence, if the accelerator is
    unknown or does not support the recipe's precision, or if the batch cannot be divided among the devices.
    """
    model, training = recipe.model, recipe.training
    network = network_cost(recipe, vocab_size, size)
    if size is None and train_tokens <= model.context_length:
        raise InputError(
            f"the training text has about {train_tokens:,} tokens, fewer than context_length {model.context_length:,} + 1",
            where="model.context_length",
        )
    per_example = network.size.tokens
    steps = training_steps(training, per_example, examples_per_epoch(recipe, train_tokens, size))
    if accelerator is None:
        nodes, step = 1, estimate_on_cpu(recipe, vocab_size, steps, processor, size)
    else:
        cluster = Cluster(accelerators.find(accelerator), devices, gpus_per_node, network_bandwidth)
        nodes, step = cluster.nodes, estimate_on_cluster(recipe, vocab_size, steps, cluster, size)
    step = with_teachers(step, recipe, vocab_size, teachers)
    seconds_per_evaluation = _evaluated_tokens(recipe, heldout_tokens) * step.evaluation_seconds
    if steps is None:
        seconds_left = 60 * (training.minutes or 0) - step.start_up_seconds
        steps = _steps_in(seconds_left, step.step_seconds, seconds_per_evaluation, recipe.evaluation.every)
    accumulation = training.global_batch_size // devices // step.micro_batch_size
    costs = estimate_memory(
        recipe,
        vocab_size,
        step.micro_batch_size,
        precision=step.precision,
        on_gpu=accelerator is not None,
        accumulates=accumulation > 1,
        optimizer=step.optimizer,
        size=size,
        shards=devices if step.parallel == "fsdp" else 1,
    )
    costs = costs.with_teachers(
        sum(sum(parameter_counts(teacher, vocab_size).values()) for teacher in teachers if isinstance(teacher, DecoderSection))
    )
    counts = network.counts
    adapters = lora_parameters(model, training.lora) if training.lora and isinstance(model, TransformerSection) else 0
    parameters = network.parameter_count + adapters
    tokens_per_step = round(training.global_batch_size * per_example)
    per_token = network.flops(training.lora) / per_example
    tokens = steps * tokens_per_step
    seconds = steps * step.step_seconds + step.start_up_seconds
    slowdown = 1 / step.cpu_share if step.cpu_share < MIN_CPU_SHARE else 1.0
    limited_by_time = training.minutes is not None
    return Plan(
        parameters=parameters,
        parameters_non_embedding=parameters - counts["embedding"] - counts["positions"] - counts["tables"] - counts["head"],
        context_length=model.context_length,
        vocab_size=vocab_size,
        global_batch_size=training.global_batch_size,
        micro_batch_size=step.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        tokens_per_step=tokens_per_step,
        steps=steps,
        tokens=tokens,
        epochs=tokens / train_tokens,
        flops=(per_token + teacher_flops_per_token(teachers, vocab_size)) * tokens,
        memory_bytes=costs,
        checkpoint_bytes=(costs.weights + costs.optimizer) * (devices if step.parallel == "fsdp" else 1),
        seconds_estimate=seconds,
        hardware=step.name,
        devices=devices,
        nodes=nodes,
        parallel=step.parallel,
        device_memory_bytes=step.memory_bytes,
        precision=step.precision,
        compiled=step.compiled,
        mfu=per_token * tokens_per_step / (step.step_seconds * devices * step.peak_flops),
        cpu_share=step.cpu_share,
        seconds_per_step=step.step_seconds,
        tokens_per_second=tokens_per_step / step.step_seconds,
        start_up_seconds=step.start_up_seconds,
        evaluation_seconds=seconds_per_evaluation * evaluations(steps, recipe.evaluation.every),
        seconds_range=(seconds, seconds if limited_by_time else seconds * slowdown),
        steps_range=(max(1, int(steps / slowdown)) if limited_by_time else steps, steps),
        compute_optimal=(
            compute_optimal(parameters - counts["tables"], per_token * tokens, tokens, train_tokens)
            if isinstance(model, DecoderSection) and size is None
            else None
        ),
        not_estimated=(
            *not_estimated(model),
            *(f"teacher {teacher.architecture}" for teacher in teachers if not isinstance(teacher, DecoderSection)),
        ),
        sources=_source_uses(recipe, source_tokens, tokens),
    )


def _source_uses(recipe: Recipe, source_tokens: Sequence[int], tokens: int) -> tuple[SourceUse, ...]:
    """Return how much each source of a mixture contributes to `tokens` training tokens. Empty if `source_tokens` is empty."""
    if not source_tokens:
        return ()
    mixture = require_text(recipe.data).mixture
    shares = map(float, MixtureShares.of(mixture).mean)
    return tuple(
        SourceUse(item.name, share, size, share * tokens / max(size, 1))
        for item, share, size in zip(mixture, shares, source_tokens, strict=True)
    )


def examples_per_epoch(recipe: Recipe, train_tokens: int, size: ExampleSize | None) -> int:
    """Return the number of training examples in an epoch. `size` is None if the examples are windows of a text."""
    if size is not None:
        return max(1, round(train_tokens / size.tokens))
    framed = 2 if isinstance(recipe.objective, MaskedLMObjective) else 0  # each window is between [CLS] and [SEP]
    return (train_tokens - 1) // (recipe.model.context_length - framed)


def evaluations(steps: int, every: int | float) -> int:
    """Return the number of evaluations in a run with `steps` steps. `every` is the value of `evaluation.every`."""
    return min(steps, math.ceil(steps / every if every >= 1 else 1 / every))


def _steps_in(seconds: float, step_seconds: float, evaluation_seconds: float, every: int | float) -> int:
    """Return the number of steps that fit in `seconds`, including their evaluations."""
    if every >= 1:
        return max(1, int(seconds / (step_seconds + evaluation_seconds / every)))
    return max(1, int((seconds - evaluation_seconds * math.ceil(1 / every)) / step_seconds))


def training_steps(training: TrainingSection, tokens_per_example: float, examples_per_epoch: int) -> int | None:
    """Return the number of optimizer steps that the recipe specifies, or None if it sets `minutes`."""
    if training.steps is not None:
        return training.steps
    if training.tokens is not None:
        return math.ceil(training.tokens / (training.global_batch_size * tokens_per_example))
    if training.epochs is not None:
        return max(1, math.ceil(training.epochs * examples_per_epoch / training.global_batch_size))
    return None


def _evaluated_tokens(recipe: Recipe, heldout_tokens: int) -> float:
    """Return the number of tokens that the model processes in one evaluation.

    If the stride is less than the context length, windows overlap and tokens are processed more than once.
    """
    scored = min(heldout_tokens, recipe.evaluation.max_tokens or heldout_tokens)
    return scored * recipe.model.context_length / (recipe.evaluation.stride or recipe.model.context_length)


def compute_optimal(parameters: int, flops: float, tokens: int, unique_tokens: int) -> ComputeOptimal:
    """Return compute-optimal sizes. With D = 20 N tokens and C = 6 N D FLOPs, N = sqrt(C / 120) (Hoffmann et al. 2022)."""
    optimal_parameters = math.sqrt(flops / (6 * TOKENS_PER_PARAMETER))
    return ComputeOptimal(
        tokens=TOKENS_PER_PARAMETER * parameters,
        parameters_for_flops=round(optimal_parameters),
        tokens_for_flops=round(TOKENS_PER_PARAMETER * optimal_parameters),
        unique_tokens=unique_tokens,
        effective_tokens=effective_tokens(tokens, unique_tokens),
    )


def effective_tokens(tokens: int, unique_tokens: int, scale: float = REPETITIONS_SCALE) -> int:
    """Return the number of unique tokens that are worth as much as `tokens` training tokens from a text with `unique_tokens`.

    It is U + U R* (1 - exp(-R / R*)), with U unique tokens, R = tokens / U - 1 repetitions, and R* = `scale` (Muennighoff et al.
    2023).
    """
    repetitions = max(0.0, tokens / unique_tokens - 1)
    return min(tokens, round(unique_tokens * (1 + scale * (1 - math.exp(-repetitions / scale)))))
