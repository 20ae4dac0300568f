"""Use torch's optimizers without importing `torch._dynamo`, which takes about a second and 100 MB of memory.

torch marks these methods so that `torch.compile` does not look into them, and imports `torch._dynamo` when they are called. tinylm
never compiles an optimizer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


class AdamW(torch.optim.AdamW):
    """torch's AdamW. Gradients with respect to the optimizer (`differentiable`) are not supported."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return inspect.unwrap(torch.optim.AdamW.step)(self, closure)


def unmark_methods() -> None:
    """Call the marked methods of `torch.optim.Optimizer` directly from now on."""
    for method in vars(torch.optim.Optimizer).values():
        function = getattr(method, "__wrapped__", None)
        if function is not None:
            # In torch 2.13, this attribute caches what the decorator calls. If another version ignores it, only time is lost.
            setattr(function, "__dynamo_disable", function)


unmark_methods()
