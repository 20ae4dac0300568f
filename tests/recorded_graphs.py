"""A `GraphBackend` for the CPU that behaves like CUDA graphs: a replay repeats recorded operations on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NOT_CAPTURABLE = {
    torch.ops.aten._local_scalar_dense.default: "reads a value on the host",
    torch.ops.aten.lift_fresh.default: "copies a value from the host",
    torch.ops.aten.nonzero.default: "has a result of unknown size",
}


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class _Recorder(TorchDispatchMode):
    """Records every operation with its arguments and its result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if reason := _NOT_CAPTURABLE.get(func):
            raise RuntimeError(f"{func} cannot be captured: it {reason}")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, _tensors(result)))
        return result


class RecordedGraphs:
    """Records work like a CUDA graph. A replay writes every result to the tensor that the recorded operation returned.

    Python code does not run in a replay. Work that reads a tensor outside its fixed buffers therefore sees the old tensor.
    """

    def __init__(self) -> None:
        self.captures = 0

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        for _ in range(2):  # work must be repeatable, because CUDA graphs need warm-up runs
            work()
        recorder = _Recorder()
        with recorder:
            work()

        @torch.no_grad()  # the recorded operations include those of the backward pass
        def replay() -> None:
            for func, args, kwargs, results in recorder.calls:
                shared = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
                for old, new in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                    if old.untyped_storage().data_ptr() not in shared:  # else a view, or written in place
                        old.copy_(new)

        return replay


class NoGraphs:
    """Fails to capture, like CUDA when an operation is not supported in a graph."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")
