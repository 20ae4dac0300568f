"""Gradient accumulation: compute the gradient for one optimizer step in micro-batches, with equal weight for every target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinylm.training.feed import LocalBatch
from tinylm.training.objectives import Objective
from tinylm.training.precision import Precision

MicroBatchContext = Callable[[bool], AbstractContextManager[nn.Module]]
"""The argument is True for the last micro-batch of a step. The context yields the module to call (see `Parallel.micro_batch`)."""


@dataclass(frozen=True)
class GradientSettings:
    """Settings for computing the gradient of a batch."""

    micro_batch_size: int
    """Number of examples per forward and backward pass."""
    precision: Precision
    objective: Objective
    scaler: torch.amp.GradScaler | None = None
    """Scales the loss before the backward pass in fp16."""


def micro_batch_seeds(seed: int, steps_before: int, first: int, count: int) -> Iterator[int]:
    """Yield the dropout seeds for micro-batches `first` to `first + count - 1` of a step.

    They depend only on the recipe's seed, the number of previous steps and the index of the micro-batch, so that a resumed run
    draws the same dropout masks.
    """
    mixed = (seed * 6364136223846793005 + steps_before) * 6364136223846793005
    for micro in range(first, first + count):
        yield (mixed + micro) % 2**63


def accumulate(
    network: nn.Module,
    batch: LocalBatch,
    settings: GradientSettings,
    seeds: Iterator[int] | None = None,
    context: MicroBatchContext | None = None,
) -> Tensor:
    """Add this process's share of the gradient of the mean loss to `.grad`.

    The mean is taken over all targets in the global batch, not over the means of its micro-batches. Therefore, it does not depend
    on the micro-batch size, the number of processes or the padding. `seeds` yields the dropout seed for each micro-batch. With
    several processes, `context` yields the module to call instead of `network`.

    Return this process's share of the mean loss in nats, as a scalar on the device to avoid a host-device synchronization. If the
    objective reports several terms, return a vector of their means (see `Objective.loss_sum`).
    """
    device, scaler = settings.precision.device, settings.scaler
    total = torch.zeros((), device=device, dtype=torch.float32)
    on_cuda = device.type == "cuda"
    micro_batches = list(batch.share.split(settings.micro_batch_size))
    for index, cpu_micro_batch in enumerate(micro_batches):
        if seeds is not None:
            # On a CPU, seed only its generator. `torch.manual_seed` also queues a call with a stack trace for each GPU backend.
            seed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
            seed(next(seeds))
        micro_batch = cpu_micro_batch.to(device, non_blocking=on_cuda)
        with nullcontext(network) if context is None else context(index == len(micro_batches) - 1) as module:
            with settings.precision.autocast():
                losses = settings.objective.loss_sum(module, micro_batch) / max(batch.global_target_count, 1)
            loss, reported = (losses[0], losses[1:]) if losses.ndim else (losses, losses)
            scaled = loss if scaler is None else scaler.scale(loss)
            scaled.backward()  # type: ignore[no-untyped-call]
        total = total + reported.detach()
    return total
