"""Average the weights during training: an exponential moving average (EMA) of the trained parameters.

Evaluations, samples and the saved model use the averages. Training itself continues with the trained weights, which a checkpoint
stores next to the optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

EMA = "ema"
"""The part of the optimizer state that contains the trained weights. Their names are `ema/PARAMETER/trained`."""


def decay_at(step: int, decay: float) -> float:
    """Return the decay in `step`, counted from 1. It rises to `decay`, so that the initial weights do not dominate a short run."""
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """The moving average of the parameters in `names`. With FSDP, each process averages its shard."""

    def __init__(self, network: nn.Module, names: Mapping[nn.Parameter, str], decay: float) -> None:
        self._network = network
        self._decay = decay
        self._names = dict(names)
        self._averages = {parameter: _local(parameter).clone() for parameter in names}

    @torch.no_grad()
    def update(self, step: int, usable: Tensor | None = None) -> None:
        """Move the averages toward the weights after `step`, or leave them unchanged if `usable` (a boolean scalar) is false."""
        share = 1 - decay_at(step, self._decay)
        if usable is None:
            torch._foreach_lerp_(list(self._averages.values()), [_local(parameter) for parameter in self._averages], share)
            return
        on_device = share * usable.float()  # avoids a host-device synchronization
        for parameter, average in self._averages.items():
            average.lerp_(_local(parameter), on_device.to(average.dtype))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the weights of the network and their averages while the context is active."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for module in self._network.modules():
            reshard: Any = getattr(module, "reshard", None)
            if reshard is not None:  # FSDP would otherwise reuse the weights that it gathered before the swap
                reshard()
        for parameter, average in self._averages.items():
            weight = _local(parameter)
            trained = weight.clone()
            weight.copy_(average)
            average.copy_(trained)

    def state(self) -> dict[str, Tensor]:
        """Return the trained weights, named as in the optimizer state."""
        return {f"{EMA}/{name}/trained": parameter.detach() for parameter, name in self._names.items()}

    @torch.no_grad()
    def restart(self) -> None:
        """Set the averages to the current weights of the network."""
        for parameter, average in self._averages.items():
            average.copy_(_local(parameter))


def _local(parameter: Any) -> Tensor:
    """Return this process's shard of a parameter, which shares its memory."""
    detached: Any = parameter.detach()
    local: Tensor = detached.to_local() if hasattr(detached, "to_local") else detached
    return local
