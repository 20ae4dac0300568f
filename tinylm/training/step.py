"""One optimiser step's gradient: a global batch in micro-batches, every target weighing the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from tinylm.model.objective import Example, Objective
from tinylm.training.feed import GlobalBatch
from tinylm.training.precision import Precision

MicroBatchContext = Callable[[bool], AbstractContextManager[nn.Module]]
"""Told whether a micro-batch is the last, it gives what to call in it (`Parallel.micro_batch`)."""


def micro_batch_seeds(seed: int, steps_before: int, first: int, count: int) -> Iterator[int]:
    """A seed for each of `count` micro-batches of a step from the `first` on, from the recipe's seed and the step alone."""
    mixed = (seed * 6364136223846793005 + steps_before) * 6364136223846793005
    for micro in range(first, first + count):
        yield (mixed + micro) % 2**63


def accumulate(
    network: nn.Module,
    objective: Objective,
    batch: GlobalBatch,
    micro_batch_size: int,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    seeds: Iterator[int] | None = None,
    together: MicroBatchContext | None = None,
) -> Tensor:
    """Add the gradient of the mean loss over all targets of `batch` to `.grad`.

    The mean is over the targets of the whole batch, not of means, so that neither the size of the micro-batches, nor the number
    of processes, nor padding changes it. `seeds`, one per micro-batch, decide dropout; `together` says what several processes call
    in place of `network`. Returns this process's part of that mean, in nats, on the device, so that the host need not wait.
    """
    total = torch.zeros((), device=precision.device, dtype=torch.float32)
    on_cuda = precision.device.type == "cuda"
    pieces = [torch.split(each, micro_batch_size) for each in (batch.example.inputs, batch.example.targets)]
    count = len(pieces[0])
    for index, (inputs, wanted) in enumerate(zip(*pieces, strict=True)):
        if seeds is not None:
            torch.manual_seed(next(seeds))
        example = Example(inputs.to(precision.device, non_blocking=on_cuda), wanted.to(precision.device, non_blocking=on_cuda))
        with nullcontext(network) if together is None else together(index == count - 1) as called:
            with precision.autocast():
                loss = objective.summed_loss(called, example) / max(batch.targets, 1)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total
