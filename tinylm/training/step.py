"""One optimiser step's gradient: a global batch in micro-batches, every target weighing the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tinylm.model.objective import IGNORED, Objective
from tinylm.training.precision import Precision


def accumulate(
    network: nn.Module,
    objective: Objective,
    sequences: Tensor,
    micro_batch_size: int,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    seeds: Iterator[int] | None = None,
) -> Tensor:
    """Add the gradient of the mean loss over all targets of `sequences` (batch, time + 1; on the CPU) to `.grad`.

    The mean is over the targets of the whole batch, not of means, so that neither the size of the micro-batches nor
    padding changes it. `seeds`, one per micro-batch, decide dropout. Returns that mean in nats, on the device, so that
    the host need not wait.
    """
    targets = int((objective.targets(sequences) != IGNORED).sum())
    total = torch.zeros((), device=precision.device, dtype=torch.float32)
    for micro in torch.split(sequences, micro_batch_size):
        if seeds is not None:
            torch.manual_seed(next(seeds))
        if precision.device.type == "cuda":
            micro = micro.pin_memory().to(precision.device, non_blocking=True)
        else:
            micro = micro.to(precision.device)
        with precision.autocast():
            losses = objective.losses(network, micro)
        loss = losses.sum() / max(targets, 1)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total
