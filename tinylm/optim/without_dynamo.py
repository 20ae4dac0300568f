"""Optimizers that do not import `torch._dynamo`, which takes about a second and 100 MB of memory.

torch decorates some methods of optimizers so that `torch.compile` does not look into them, and imports `torch._dynamo` when they
are called. The classes here call the methods without these decorators. tinylm never compiles an optimizer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


def _undecorated(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = inspect.unwrap(getattr(torch.optim.Optimizer, name))
    return function


class WithoutDynamo:
    """A base class of optimizers that must precede torch's class."""

    state_dict = _undecorated("state_dict")
    load_state_dict = _undecorated("load_state_dict")
    zero_grad = _undecorated("zero_grad")
    add_param_group = _undecorated("add_param_group")


class AdamW(WithoutDynamo, torch.optim.AdamW):
    """torch's AdamW without `differentiable`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return inspect.unwrap(torch.optim.AdamW.step)(self, closure)
