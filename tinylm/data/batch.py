"""`Batch`: the tensors that a model reads and the targets that it predicts, for training, trials and evaluation.

An objective creates batches from the examples of a dataset (`tinylm.training.objectives`). This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE_INDEX = -100
"""The target of positions that are not predicted."""


@dataclass(frozen=True)
class Batch:
    """Integer tensors with one example per row. `inputs`, `targets` and `segments` are (batch, time)."""

    inputs: Tensor
    """Token ids."""
    targets: Tensor
    """Token ids to predict at each position. Negative ids are ignored."""
    segments: Tensor | None = None
    """A position attends only to positions with the same number. Negative numbers are padding. None: each row is one segment."""
    source: Tensor | None = None
    """(batch, source time): token ids that an encoder reads."""
    source_segments: Tensor | None = None
    """(batch, source time): like `segments`, for `source`."""

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.inputs)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """Copy the tensors to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Copy the tensors to pinned host memory, which a GPU can read asynchronously."""
        return self._map(lambda tensor: tensor.pin_memory())

    def rows(self, selected: slice) -> Batch:
        """Return the selected examples."""
        return self._map(lambda tensor: tensor[selected])

    def split(self, size: int) -> Iterator[Batch]:
        """Yield the examples in batches of `size`; the last one may be smaller."""
        for start in range(0, len(self), size):
            yield self.rows(slice(start, start + size))

    @property
    def target_count(self) -> int:
        """Number of targets that are not ignored. Synchronizes with the device unless the batch is in host memory."""
        return int((self.targets >= 0).sum())

    @property
    def token_count(self) -> int:
        """Number of tokens that the model reads, without padding.

        Synchronizes with the device unless the batch is in host memory.
        """
        source = 0 if self.source is None else _count(self.source, self.source_segments)
        return _count(self.inputs, self.segments) + source

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return Batch(**{name: function(tensor) for name, tensor in tensors.items()})


def _count(tokens: Tensor, segments: Tensor | None) -> int:
    return tokens.numel() if segments is None else int((segments >= 0).sum())
