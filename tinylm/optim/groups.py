"""Which parameter is updated how: the recipe's optimiser over a model's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tinylm.optim.muon import Muon
from tinylm.recipe.schema import MuonOptimizer, Optimizer


class Optimizers:
    """One or two torch optimisers that step together. Rates follow `set_rate`; state travels as flat named tensors."""

    def __init__(self, parts: Mapping[str, torch.optim.Optimizer], names: Mapping[nn.Parameter, str]) -> None:
        self.parts = dict(parts)
        self._names = dict(names)
        for part in self.parts.values():
            for group in part.param_groups:
                group["peak"] = float(group["lr"])

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of all parts: a gradient scaler judges them together, so that a step which one must skip is skipped by all."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def set_rate(self, multiplier: float) -> None:
        """Set every group's rate to `multiplier` times its peak."""
        for part in self.parts.values():
            for group in part.param_groups:
                group["lr"] = group["peak"] * multiplier

    def zero_grad(self) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def state(self) -> dict[str, Tensor]:
        """`part/parameter/slot` -> tensor, for every tensor the optimisers remember."""
        return {f"{part}/{name}/{slot}": value for part, name, slot, value in self._slots()}

    def _slots(self) -> Iterator[tuple[str, str, str, Tensor]]:
        for part, optimizer in self.parts.items():
            for parameter, name in self._names.items():
                for slot, value in optimizer.state.get(parameter, {}).items():
                    yield part, name, slot, value

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned. Raises `KeyError` for a parameter that is not there."""
        parameters = {name: parameter for parameter, name in self._names.items()}
        for key, value in state.items():
            part, name, slot = key.split("/")
            parameter = parameters[name]
            on_device = value if slot == "step" and not _step_on_device(self.parts[part]) else value.to(parameter.device)
            self.parts[part].state[parameter][slot] = on_device.clone()


def _step_on_device(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)


def build(section: Optimizer, network: nn.Module, stacked: Mapping[str, tuple[int, ...]]) -> Optimizers:
    """The optimiser that `section` describes. Weight decay only on what has two axes.

    `stacked` names parameters that hold several matrices one above the other, with their rows. Fused AdamW on CUDA.
    """
    names = {parameter: name for name, parameter in network.named_parameters()}
    if not isinstance(section, MuonOptimizer):
        return Optimizers({"adamw": _adamw(list(names), section.lr, section, section.weight_decay)}, names)
    matrices = [parameter for parameter, name in names.items() if name.startswith("blocks.") and parameter.ndim == 2]
    inside = set(matrices)
    others = [parameter for parameter in names if parameter not in inside]
    muon = Muon(
        matrices,
        [stacked.get(names[parameter]) for parameter in matrices],
        lr=section.lr,
        momentum=section.momentum,
        steps=section.newton_schulz_steps,
        weight_decay=section.weight_decay,
    )
    return Optimizers({"muon": muon, "adamw": _adamw(others, section.adamw_lr, section, 0.0)}, names)


def _adamw(parameters: list[nn.Parameter], lr: float, section: Any, weight_decay: float) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    device = parameters[0].device.type
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=lr,
        betas=section.betas,
        eps=section.eps,
        fused=device in ("cuda", "cpu"),
    )
