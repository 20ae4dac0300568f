"""Estimate the memory needed for training on one device, and choose the largest micro-batch that fits.

This module combines the byte counts from `memory` for a recipe, its vocabulary size and a micro-batch. It does not import torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from tinylm.cost import memory
from tinylm.cost.cluster import Strategy
from tinylm.cost.examples import ExampleSize
from tinylm.cost.network import NetworkCost, has_document_mask, network_cost
from tinylm.cost.parameters import has_estimates, lora_parameters
from tinylm.errors import InputError
from tinylm.recipe.arithmetic import divisors
from tinylm.recipe.checks import listed
from tinylm.recipe.schema import MuonOptimizer, Optimizer, Recipe, TransformerSection
from tinylm.recipe.values import ComputeDtype

CPU_MICRO_BATCH_TOKENS = 2048
"""Maximum number of tokens in a micro-batch on a CPU. Larger micro-batches do not fit in the caches and are not faster."""
USABLE_MEMORY = 0.6
"""Fraction of a device's memory that `micro_batch_size: auto` may use."""
MAX_REPLICATED = 0.5
"""`parallel: auto` is `ddp` if weights, gradients and optimizer state take at most this fraction of a device's memory."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, excluding the baseline memory of the process.

    `activations`, `update` and `evaluation` are the peaks for a forward and backward pass, the optimizer's temporaries and an
    evaluation. They do not occur at the same time. `saving` is the copy of the weights and optimizer state that is made on a CPU
    while a checkpoint is written. `optimizer` includes the moving average of the weights. `teachers` is the size of the weights of
    distilled models. `total` is the peak for the whole run. On a GPU, it includes the largest of the three peaks. On a CPU, it is
    the resident set, which includes freed memory that the allocator keeps.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    update: int
    evaluation: int
    saving: int
    total: int
    teachers: int = 0

    def with_teachers(self, parameters: int) -> MemoryEstimate:
        """Return the estimate with the float32 weights of teachers that have this many parameters in total."""
        return replace(self, teachers=4 * parameters, total=self.total + 4 * parameters)


def estimate_memory(
    recipe: Recipe,
    vocab_size: int,
    micro_batch_size: int,
    *,
    precision: ComputeDtype = "fp32",
    on_gpu: bool = False,
    accumulates: bool = True,
    optimizer: Optimizer | None = None,
    size: ExampleSize | None = None,
    shards: int = 1,
) -> MemoryEstimate:
    """Estimate the memory needed for training with this micro-batch size.

    Weights, gradients and optimizer state are float32 in every precision. With LoRA, only the adapters have gradients and optimizer
    state. If `accumulates` is true, a step has several micro-batches, so gradients and activations exist at the same time.
    `optimizer` is the recipe's optimizer without `auto`, if that is known. `size` is the size of the training examples, or None if
    it is unknown. With `fsdp`, `shards` is the number of devices among which weights, gradients and optimizer state are divided.
    Raises `InputError` if the architecture has no estimates.
    """
    network, model = network_cost(recipe, vocab_size, size), recipe.model
    lora = recipe.training.lora
    adapters = lora_parameters(model, lora) if lora and isinstance(model, TransformerSection) else 0
    parameters = network.parameter_count + adapters
    trained = adapters or parameters
    optimizer = optimizer or recipe.training.optimizer
    muon = isinstance(optimizer, MuonOptimizer)
    slots = 2 * trained - (network.counts["matrices"] if muon else 0) + (trained if recipe.training.ema is not None else 0)
    config = memory.PassConfig(
        vocab_size,
        micro_batch_size,
        precision,
        on_gpu=on_gpu,
        recompute=recipe.training.activation_checkpointing,
        frozen=lora is not None,
        document_mask=has_document_mask(recipe),
    )
    activations = network.activation_bytes(config)
    update = memory.muon_bytes(network.matrix_shapes, optimizer) if isinstance(optimizer, MuonOptimizer) else 0
    evaluations = network.evaluation_bytes()
    evaluation = max(evaluations)
    gradients = 4 * trained if shards == 1 or accumulates else 4 * trained // shards  # `fsdp` accumulates whole gradients
    if shards > 1:
        activations += _gathered_bytes(network, 2 if precision == "bf16" else 4)
    parameters, slots = parameters // shards, slots // shards
    if on_gpu:
        passes = max(activations + (gradients if accumulates else 0), gradients)
        peak = max(passes, gradients + update, gradients + evaluation)
    else:
        resident = gradients if accumulates else 0
        peak = memory.cpu_peak_bytes(
            max(activations, gradients - resident + update), resident, largest=4 * network.largest_table, evaluation=evaluations
        )
    kept_state = 4 * (parameters + slots)
    saving = 0 if on_gpu else kept_state
    return MemoryEstimate(
        weights=4 * parameters,
        gradients=gradients,
        optimizer=4 * slots,
        activations=activations,
        update=update,
        evaluation=evaluation,
        saving=saving,
        total=kept_state + saving + peak,
    )


def _gathered_bytes(network: NetworkCost, weight_bytes: int) -> int:  # type: ignore[type-arg]
    """Return the size of the weights that `fsdp` gathers on a device at the same time: two blocks, the embeddings and the head."""
    counts = network.counts
    outside = counts["embedding"] + counts["positions"] + counts["tables"] + counts["head"]
    return weight_bytes * (outside + 2 * (network.parameter_count - outside) // network.depth)


def data_parallelism(recipe: Recipe, vocab_size: int, memory_bytes: int, devices: int) -> Strategy:
    """Return how `devices` devices with `memory_bytes` of memory each train together.

    `auto` is `ddp` if the training state takes at most half of a device's memory, or if the architecture has no estimates.
    """
    if recipe.training.parallel != "auto":
        return recipe.training.parallel
    if devices == 1 or not has_estimates(recipe.model):
        return "ddp"
    costs = estimate_memory(recipe, vocab_size, 1)
    return "fsdp" if costs.weights + costs.gradients + costs.optimizer > MAX_REPLICATED * memory_bytes else "ddp"


def choose_micro_batch(
    recipe: Recipe,
    vocab_size: int,
    memory_bytes: int,
    max_tokens: int | None,
    *,
    half: bool = False,
    devices: int = 1,
    size: ExampleSize | None = None,
    sharded: bool = False,
) -> int:
    """Return the recipe's micro-batch size. For `auto`, choose the largest size that fits in the usable fraction of device
    memory.

    The chosen size divides each device's batch. It is 1 if no size fits. `max_tokens` limits the micro-batch on a CPU and is None
    for a GPU. `half` means 16-bit training: fp16 if the recipe sets it, and bf16 otherwise. `size` is the size of the
    training examples, or None if it is unknown. `sharded` means `fsdp`. The memory limit is ignored for an architecture without
    estimates.
    """
    training, positions = recipe.training, recipe.model.context_length if size is None else size.positions
    if training.micro_batch_size != "auto":
        return training.micro_batch_size
    batch = training.global_batch_size // devices
    precision: ComputeDtype = ("fp16" if training.precision == "fp16" else "bf16") if half else "fp32"
    for sequences in (number for number in range(batch, 0, -1) if batch % number == 0):
        if max_tokens is not None and sequences * positions > max_tokens:
            continue
        if not has_estimates(recipe.model):
            return sequences
        costs = estimate_memory(
            recipe,
            vocab_size,
            sequences,
            precision=precision,
            on_gpu=max_tokens is None,
            accumulates=sequences < batch,
            size=size,
            shards=devices if sharded else 1,
        )
        step = costs.weights + costs.gradients + costs.optimizer + costs.activations
        if step <= USABLE_MEMORY * memory_bytes:
            return sequences
    return 1


def check_batch_divides(recipe: Recipe, devices: int) -> None:
    """Raise `InputError` if the global batch or a device's batch cannot be divided evenly.

    `devices` must divide the global batch size, and the micro-batch size must divide the batch size per device.
    """
    batch, micro = recipe.training.global_batch_size, recipe.training.micro_batch_size
    if devices < 1:
        raise InputError(f"must be at least 1, not {devices}", where="--devices")
    if devices == 1:
        return
    if batch % devices:
        sizes = [size for size in (batch // devices * devices, -(-batch // devices) * devices) if size]
        raise InputError(
            f"{batch} sequences cannot be divided among {devices} devices",
            where="training.global_batch_size",
            hint=f"use {' or '.join(map(str, sizes))}",
        )
    share = batch // devices
    if micro != "auto" and share % micro:
        sizes = divisors(share)
        raise InputError(
            f"{micro} does not divide the {share} sequences per device",
            where="training.micro_batch_size",
            hint=f"use {listed(list(map(str, sizes)), 'or')}",
        )


def host_memory_bytes() -> int:
    """Return the bytes of memory that this process can use.

    This is the physical memory of the machine, or the limit set by `ulimit -v` if that is lower. If the system does not report its
    physical memory, 8 GiB is assumed.
    """
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        physical = 8 << 30
    try:
        import resource
    except ImportError:  # Windows
        return physical
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return physical if limit == resource.RLIM_INFINITY else min(physical, limit)
