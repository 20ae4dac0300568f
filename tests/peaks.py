"""Measure the peak size of the tensors that a computation allocates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinylm.recipe.values import ComputeDtype

DTYPES: dict[ComputeDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the peak total size of live storages that were allocated while the context was active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, Any] = {}
        self.peak: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in inputs:
                storage = leaf.untyped_storage()
                owner = torch.multiprocessing.reductions.StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._storages[storage._cdata] = (owner, storage.nbytes())
        self._storages = {key: (owner, size) for key, (owner, size) in self._storages.items() if not owner.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return result


def peak_bytes(work: Callable[[], object]) -> int:
    live = LiveBytes()
    with live:
        work()
    return live.peak
