"""Estimate the memory of training on one device, and choose the largest micro-batch that fits. Does not import torch.

Combines the byte counts of `memory` for a recipe, its vocabulary size and a micro-batch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from tinylm.cost import memory
from tinylm.cost.parameters import estimated, has_estimates, lora_parameters, parameter_counts
from tinylm.errors import InputError
from tinylm.recipe.arithmetic import divisors
from tinylm.recipe.checks import listed
from tinylm.recipe.schema import DataSection, MuonOptimizer, Recipe
from tinylm.recipe.values import ComputeDtype

CPU_MICRO_BATCH_TOKENS = 2048
"""Maximum number of tokens in a micro-batch on a CPU. Larger micro-batches do not fit in the caches, so they are not faster."""
USABLE_MEMORY = 0.6
"""Fraction of a device's memory that `micro_batch_size: auto` may use."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, not counting the memory of the process itself.

    `activations`, `update` and `evaluation` are the peaks of a forward and backward pass, of the optimizer's temporaries and of an
    evaluation, which do not exist at the same time. `saving` is the copy of weights and optimizer state that training on a CPU
    makes while it writes a checkpoint. `total` is the peak of the whole run. On a GPU it includes the largest of the three peaks.
    On a CPU it is the resident set, which includes freed memory that the allocator keeps.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    update: int
    evaluation: int
    saving: int
    total: int


def estimate_memory(
    recipe: Recipe,
    vocab_size: int,
    micro_batch_size: int,
    *,
    precision: ComputeDtype = "fp32",
    on_gpu: bool = False,
    accumulates: bool = True,
    bf16_updates: bool = False,
) -> MemoryEstimate:
    """Estimate the memory of training with this micro-batch size.

    Weights, gradients and optimizer state are float32 in every precision. With LoRA, only the adapters have gradients and state.
    `accumulates`: a step has several micro-batches, so gradients and activations exist at the same time. `bf16_updates`: Muon
    computes its updates in bf16.
    """
    model = estimated(recipe.model)
    counts = parameter_counts(model, vocab_size)
    lora = recipe.training.lora
    parameters = sum(counts.values()) + (lora_parameters(model, lora) if lora else 0)
    trained = lora_parameters(model, lora) if lora else parameters
    muon = isinstance(recipe.training.optimizer, MuonOptimizer)
    slots = 2 * trained - (counts["matrices"] if muon else 0)
    config = memory.PassConfig(
        vocab_size,
        micro_batch_size,
        precision,
        on_gpu=on_gpu,
        recompute=recipe.training.activation_checkpointing,
        frozen=lora is not None,
        document_mask=isinstance(recipe.data, DataSection) and recipe.data.document_mask,
    )
    activations = memory.activation_bytes(model, config)
    update = memory.muon_bytes(model, bf16=bf16_updates) if muon else 0
    evaluation = max(memory.evaluation_bytes(model, vocab_size))
    gradients = 4 * trained
    if on_gpu:
        passes = max(activations + (gradients if accumulates else 0), gradients)
        peak = max(passes, gradients + update, gradients + evaluation)
    else:
        resident = gradients if accumulates else 0
        peak = memory.cpu_peak_bytes(model, vocab_size, max(activations, gradients - resident + update), resident)
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


def choose_micro_batch(
    recipe: Recipe,
    vocab_size: int,
    memory_bytes: int,
    max_tokens: int | None,
    *,
    half: bool = False,
    devices: int = 1,
) -> int:
    """Return the recipe's micro-batch size, or for `auto` the largest size that fits in `USABLE_MEMORY` of the device's memory.

    The size divides the batch of each device. It is 1 if no size fits. `max_tokens` is the limit on a CPU; None means a GPU. `half`
    means training in 16 bits: in fp16 if the recipe sets it, else in bf16. Memory is ignored for an architecture without estimates.
    """
    training, context = recipe.training, recipe.model.context_length
    if training.micro_batch_size != "auto":
        return training.micro_batch_size
    batch = training.global_batch_size // devices
    precision: ComputeDtype = ("fp16" if training.precision == "fp16" else "bf16") if half else "fp32"
    for size in (size for size in range(batch, 0, -1) if batch % size == 0):
        if max_tokens is not None and size * context > max_tokens:
            continue
        if not has_estimates(recipe.model):
            return size
        costs = estimate_memory(recipe, vocab_size, size, precision=precision, on_gpu=max_tokens is None, accumulates=size < batch)
        step = costs.weights + costs.gradients + costs.optimizer + costs.activations
        if step <= USABLE_MEMORY * memory_bytes:
            return size
    return 1


def check_batch_divides(recipe: Recipe, devices: int) -> None:
    """Raise `InputError` if `devices` do not divide the global batch, or the micro-batch size does not divide a device's batch."""
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
            f"{micro} does not divide the {share} sequences of each of {devices} devices",
            where="training.micro_batch_size",
            hint=f"use {listed(list(map(str, sizes)), 'or')}",
        )


def host_memory_bytes() -> int:
    """Return the memory that this process may use: the physical memory of this machine, or less if `ulimit -v` is lower.

    Returns 8 GiB if the system does not report it.
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
