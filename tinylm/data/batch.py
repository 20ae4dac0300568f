"""`Batch` contains the tensors that a model reads and the targets that it predicts.

An objective creates batches from the examples in a dataset (`tinylm.training.objectives`). This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE_INDEX = -100
"""The target at positions that are not predicted."""


@dataclass(frozen=True)
class Batch:
    """Integer tensors with one example per row. `inputs`, `targets` and `segments` have the shape (batch, time)."""

    inputs: Tensor
    """Token ids."""
    targets: Tensor
    """Token ids to predict at each position. Negative ids are ignored."""
    segments: Tensor | None = None
    """Segment numbers, negative for padding. A position attends only to its own segment. If None, each row is one segment."""
    source: Tensor | None = None
    """Token ids (batch, source time) that an encoder reads."""
    source_segments: Tensor | None = None
    """Segments (batch, source time) for `source`, like `segments`."""

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.inputs)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """Return a batch with the tensors on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return a copy in pinned host memory, which a GPU can read asynchronously."""
        return self._map(lambda tensor: tensor.pin_memory())

    def rows(self, selected: slice) -> Batch:
        """Return the selected examples."""
        return self._map(lambda tensor: tensor[selected])

    def split(self, size: int) -> Iterator[Batch]:
        """Yield the examples in batches of `size`. The last batch can be smaller."""
        for start in range(0, len(self), size):
            yield self.rows(slice(start, start + size))

    @property
    def target_count(self) -> int:
        """Number of targets that are not ignored. Reading this synchronizes with the device unless the batch is in host memory."""
        return int((self.targets >= 0).sum())

    @property
    def token_count(self) -> int:
        """Number of tokens that the model reads, excluding padding.

        Reading this synchronizes with the device unless the batch is in host memory.
        """
        source = 0 if self.source is None else _count(self.source, self.source_segments)
        return _count(self.inputs, self.segments) + source

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return Batch(**{name: function(tensor) for name, tensor in tensors.items()})


def _count(tokens: Tensor, segments: Tensor | None) -> int:
    return tokens.numel() if segments is None else int((segments >= 0).sum())
