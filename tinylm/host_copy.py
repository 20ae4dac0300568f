"""Copy values from a GPU to the host without waiting for the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """A copy of `tensor` on the host. From a CUDA GPU, the copy is queued to pinned memory, and only `tolist` waits for it.

    The tensor on another device must not change before `tolist` is called.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._values = tensor
        self._copied: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> Any:
        """Wait for the copy and return its values, as `Tensor.tolist` does."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy values from the host to a device. The copy to a CUDA GPU is queued and does not wait for earlier work on the GPU."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
