"""Which parameter is updated how: the recipe's optimiser over a model's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tinylm.optim.muon import Muon
from tinylm.recipe.schema import MuonOptimizer, Optimizer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

NGRAM_TABLE = "ngrams.table.weight"
NGRAM_RATE = 6.0
"""The rate of n-gram tables over that of other embeddings: most rows are met too seldom to get anywhere at the same rate."""


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

    def step(self, usable: Tensor | None = None) -> None:
        """Update all parameters. `usable`, a flag on their device, leaves everything as it is where it is false."""
        for part in self.parts.values():
            # The name by which torch's gradient scaler tells fused optimisers the same.
            part.found_inf = None if usable is None else (~usable).float()  # type: ignore[attr-defined]
            part.step()

    def state(self) -> dict[str, Tensor]:
        """`part/parameter/slot` -> tensor, for every tensor the optimisers remember."""
        return {f"{part}/{name}/{slot}": value for part, name, slot, value in self._slots()}

    def _slots(self) -> Iterator[tuple[str, str, str, Tensor]]:
        for part, optimizer in self.parts.items():
            for parameter, name in self._names.items():
                for slot, value in optimizer.state.get(parameter, {}).items():
                    yield part, name, slot, value

    def blank_state(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Zeros to be filled with a saved state, each where its parameter is, and spread as that is.

        `shapes` are the names and shapes of what was saved. Raises `KeyError` for what is of no parameter here, and
        `ValueError` for another shape.
        """
        blank = {}
        for key, shape in shapes.items():
            part, parameter, slot = self._slot(key)
            if slot == "step" and not shape:
                device = parameter.device if _step_on_device(self.parts[part]) else None
                blank[key] = torch.zeros((), device=device)
            elif shape == parameter.shape:
                blank[key] = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            else:
                raise ValueError(f"{key} is {tuple(shape)}, and its parameter {tuple(parameter.shape)}")
        return blank

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned, and nothing else."""
        for part in self.parts.values():
            part.state.clear()
        for key, value in state.items():
            part_name, parameter, slot = self._slot(key)
            self.parts[part_name].state[parameter][slot] = value.clone()

    def _slot(self, key: str) -> tuple[str, nn.Parameter, str]:
        part, _, rest = key.partition("/")
        name, _, slot = rest.partition("/")
        parameters = {name: parameter for parameter, name in self._names.items()}
        parameter = parameters[name]
        if not any(parameter is each for group in self.parts[part].param_groups for each in group["params"]):
            raise KeyError(key)
        return part, parameter, slot


def _step_on_device(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)


def build(
    section: Optimizer, network: nn.Module, stacked: Mapping[str, tuple[int, ...]], mesh: DeviceMesh | None = None
) -> Optimizers:
    """The optimiser that `section` describes, over the parameters that want a gradient.

    Weight decay only on what has two axes. Fused AdamW on CPU and CUDA.

    `stacked` names parameters that hold several matrices one above the other, with their rows; `mesh` the processes that train
    together.
    """
    names = {parameter: name for name, parameter in network.named_parameters() if parameter.requires_grad}
    if not isinstance(section, MuonOptimizer):
        return Optimizers({"adamw": _adamw(names, section.lr, section, section.weight_decay)}, names)
    linears = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    matrices: list[nn.Parameter] = [module.weight for name, module in linears.items() if name != "head"]  # type: ignore[misc]
    inside = set(matrices)
    others = [parameter for parameter in names if parameter not in inside]
    muon = Muon(
        matrices,
        {parameter: stacked[names[parameter]] for parameter in matrices if names[parameter] in stacked},
        lr=section.lr,
        momentum=section.momentum,
        momentum_warmup=section.momentum_warmup,
        steps=section.newton_schulz_steps,
        coefficients=section.newton_schulz,
        weight_decay=section.weight_decay,
        cautious=section.cautious_weight_decay,
        dtype=torch.bfloat16 if orthogonalisation_type(section, matrices[0].device) == "bf16" else torch.float32,
        mesh=mesh,
    )
    adamw = _adamw({parameter: names[parameter] for parameter in others}, section.adamw_lr, section, 0.0)
    return Optimizers({"muon": muon, "adamw": adamw}, names)


def orthogonalisation_type(section: MuonOptimizer, device: torch.device) -> Literal["fp32", "bf16"]:
    """What `newton_schulz_dtype` means on this device."""
    if section.newton_schulz_dtype == "auto":
        return "bf16" if _has_bfloat16_units(device) else "fp32"
    return section.newton_schulz_dtype


def _has_bfloat16_units(device: torch.device) -> bool:
    """Older GPUs only emulate it, and most processors."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def _adamw(names: Mapping[nn.Parameter, str], lr: float, section: Any, weight_decay: float) -> torch.optim.AdamW:
    tables = [parameter for parameter, name in names.items() if name == NGRAM_TABLE]
    others = [parameter for parameter, name in names.items() if name != NGRAM_TABLE]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        {"params": tables, "weight_decay": weight_decay, "lr": lr * NGRAM_RATE},
    ]
    device = others[0].device.type
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=lr,
        betas=section.betas,
        eps=section.eps,
        fused=device in ("cuda", "cpu"),
    )
