"""One optimiser step's gradient: a global batch in micro-batches, every target weighing the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tinylm.model.objective import Example, Objective
from tinylm.training.feed import GlobalBatch
from tinylm.training.precision import Precision


def accumulate(
    network: nn.Module,
    objective: Objective,
    batch: GlobalBatch,
    micro_batch_size: int,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    seeds: Iterator[int] | None = None,
) -> Tensor:
    """Add the gradient of the mean loss over all targets of `batch` to `.grad`.

    The mean is over the targets of the whole batch, not of means, so that neither the size of the micro-batches nor
    padding changes it. `seeds`, one per micro-batch, decide dropout. Returns that mean in nats, on the device, so that
    the host need not wait.
    """
    total = torch.zeros((), device=precision.device, dtype=torch.float32)
    on_cuda = precision.device.type == "cuda"
    whole = batch.example
    for inputs, wanted in zip(*(torch.split(each, micro_batch_size) for each in (whole.inputs, whole.targets)), strict=True):
        if seeds is not None:
            torch.manual_seed(next(seeds))
        example = Example(inputs.to(precision.device, non_blocking=on_cuda), wanted.to(precision.device, non_blocking=on_cuda))
        with precision.autocast():
            loss = objective.summed_loss(network, example) / max(batch.targets, 1)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total
