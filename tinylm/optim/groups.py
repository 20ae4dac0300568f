"""Build a recipe's optimizers: assign an optimizer, a learning rate and a weight decay to every parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from tinylm.device import has_bf16_units
from tinylm.errors import InputError
from tinylm.optim.ema import EMA, WeightAverage
from tinylm.optim.muon import Muon
from tinylm.optim.without_dynamo import AdamW
from tinylm.recipe.schema import MuonOptimizer, Optimizer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class TrainableNetwork(Protocol):
    """The network methods that `build` calls. All of them use the parameter names from `named_parameters`."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def muon_weights(self) -> list[str]:
        """Return the names of the matrices that Muon updates."""
        ...

    def stacked_matrices(self) -> dict[str, tuple[int, ...]]:
        """Map the name of each parameter that stacks several matrices to the number of rows in each matrix."""
        ...

    def lr_multipliers(self) -> dict[str, float]:
        """Map parameter names to learning-rate multipliers. The default multiplier is 1."""
        ...


class Optimizers:
    """One or two torch optimizers that step together, with a shared learning-rate multiplier and one flat state dictionary.

    They can also average the weights (`keep_average`).
    """

    def __init__(self, parts: Mapping[str, torch.optim.Optimizer], names: Mapping[nn.Parameter, str]) -> None:
        self.parts = dict(parts)
        self._names = dict(names)
        self._average: WeightAverage | None = None
        for group in self.param_groups:
            group["peak"] = float(group["lr"])

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers. A gradient scaler checks them together, so all optimizers skip the same steps."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def scale_lr(self, multiplier: float) -> None:
        """Set the learning rate of every group to `multiplier` times its peak."""
        for group in self.param_groups:
            group["lr"] = group["peak"] * multiplier

    def zero_grad(self) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)

    def step(self, usable: Tensor | None = None) -> None:
        """Update all parameters, or skip the update if `usable` is false.

        `usable` is a boolean scalar on the parameters' device, which avoids a host-device synchronization.
        """
        for part in self.parts.values():
            # torch's gradient scaler passes the same flag to fused optimizers under this name.
            part.found_inf = None if usable is None else (~usable).float()  # type: ignore[attr-defined]
            part.step()

    def keep_average(self, network: nn.Module, decay: float) -> None:
        """Keep an exponential moving average of the weights of `network` from now on."""
        self._average = WeightAverage(network, self._names, decay)

    def update_average(self, step: int, usable: Tensor | None = None) -> None:
        """Update the averages of the weights, if there are any, after `step` steps. `usable` is as in `Optimizers.step`."""
        if self._average is not None:
            self._average.update(step, usable)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Replace the weights of the network with their averages while the context is active, if there are averages."""
        return nullcontext() if self._average is None else self._average.applied()

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of the optimizer state, named `part/parameter/slot`.

        Example: `muon/blocks.0.attention.qkv.weight/momentum`. If the weights are averaged, the state contains the trained weights.
        """
        slots = {f"{part}/{name}/{slot}": value for part, name, slot, value in self._slots()}
        return slots if self._average is None else slots | self._average.state()

    def _slots(self) -> Iterator[tuple[str, str, str, Tensor]]:
        for part, optimizer in self.parts.items():
            for parameter, name in self._names.items():
                for slot, value in optimizer.state.get(parameter, {}).items():
                    yield part, name, slot, value

    def empty_state(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Allocate zero tensors to load a saved state into, with the device and sharding of the parameters.

        `shapes` maps the names of the saved tensors to their shapes. Raises `KeyError` for a name that does not belong to a
        parameter, and `ValueError` for a shape that differs from the parameter's shape.
        """
        tensors = {}
        for key, shape in shapes.items():
            part, parameter, slot = self._find_slot(key)
            if slot == "step" and not shape:
                device = parameter.device if _counts_steps_on_device(self.parts[part]) else None
                tensors[key] = torch.zeros((), device=device)
            elif shape == parameter.shape:
                tensors[key] = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            else:
                raise ValueError(f"{key} has the shape {tuple(shape)}, but its parameter has {tuple(parameter.shape)}")
        return tensors

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace the optimizer state with copies of the tensors in `state`, which are named as in `Optimizers.state`.

        Load the weights of the network first. If they are averages, `state` contains the trained weights, which replace them.
        """
        for part in self.parts.values():
            part.state.clear()
        if self._average is not None:
            self._average.restart()
        for key, value in state.items():
            part_name, parameter, slot = self._find_slot(key)
            if part_name == EMA:
                parameter.detach().copy_(value)
            else:
                self.parts[part_name].state[parameter][slot] = value.clone()

    def _find_slot(self, key: str) -> tuple[str, nn.Parameter, str]:
        """Split `part/parameter/slot` and look up the parameter. Raises `KeyError` if optimizer `part` does not update it."""
        part, _, rest = key.partition("/")
        name, _, slot = rest.partition("/")
        parameters = {name: parameter for parameter, name in self._names.items()}
        parameter = parameters[name]
        if part != EMA and not any(parameter is member for group in self.parts[part].param_groups for member in group["params"]):
            raise KeyError(key)
        return part, parameter, slot


def _counts_steps_on_device(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)


def build(section: Optimizer, network: TrainableNetwork, mesh: DeviceMesh | None = None) -> Optimizers:
    """Build the optimizer that `section` describes, for the parameters that require a gradient.

    AdamW applies weight decay to parameters with two or more dimensions. Muon updates and decays the network's `muon_weights`;
    AdamW then updates the other parameters, without decay. `mesh` contains the processes that train together. Raises `InputError`
    for Muon if the network has no matrices for it.
    """
    names = {parameter: name for name, parameter in network.named_parameters() if parameter.requires_grad}
    multipliers = network.lr_multipliers()
    if not isinstance(section, MuonOptimizer):
        return Optimizers({"adamw": _adamw(names, section.lr, section, section.weight_decay, multipliers)}, names)
    parameters, stacked = dict(network.named_parameters()), network.stacked_matrices()
    matrices = [parameters[name] for name in network.muon_weights()]
    if not matrices:
        raise InputError("Muon updates matrices, and this model has none", where="training.optimizer", hint="use adamw")
    in_muon = set(matrices)
    others = [parameter for parameter in names if parameter not in in_muon]
    section = resolve_muon(section, matrices[0].device)
    assert section.orthogonalization != "auto"
    muon = Muon(
        matrices,
        {parameter: stacked[names[parameter]] for parameter in matrices if names[parameter] in stacked},
        lr=section.lr,
        momentum=section.momentum,
        momentum_warmup=section.momentum_warmup,
        orthogonalization=section.orthogonalization,
        steps=section.newton_schulz_steps,
        coefficients=section.newton_schulz,
        weight_decay=section.weight_decay,
        cautious=section.cautious_weight_decay,
        dtype=torch.bfloat16 if section.computes_in_bf16 else torch.float32,
        mesh=mesh,
    )
    adamw = _adamw({parameter: names[parameter] for parameter in others}, section.adamw_lr, section, 0.0, multipliers)
    return Optimizers({"muon": muon, "adamw": adamw}, names)


def resolve_muon(section: MuonOptimizer, device: torch.device) -> MuonOptimizer:
    """Replace `auto` in `section` with the value for `device`."""
    return section.resolved(device.type, has_bf16_units=has_bf16_units(device))


TRAINED_ROWS = "trained_rows"
"""Name of an attribute that marks parameters with frozen rows. They get no weight decay, which would change the frozen rows."""


def _is_decayed(parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not hasattr(parameter, TRAINED_ROWS)


def _adamw(
    names: Mapping[nn.Parameter, str], lr: float, section: Any, weight_decay: float, multipliers: Mapping[str, float]
) -> torch.optim.AdamW:
    """Build AdamW for the parameters in `names`, fused on CPU and CUDA. Parameters with the same multiplier share a group."""
    others = [parameter for parameter, name in names.items() if name not in multipliers]
    groups = [
        {"params": [p for p in others if _is_decayed(p)], "weight_decay": weight_decay},
        {"params": [p for p in others if not _is_decayed(p)], "weight_decay": 0.0},
    ]
    for multiplier in dict.fromkeys(multipliers.values()):
        chosen = [parameter for parameter, name in names.items() if multipliers.get(name) == multiplier]
        groups.append({"params": chosen, "weight_decay": weight_decay, "lr": lr * multiplier})
    device = next(iter(names)).device.type
    return AdamW(
        [group for group in groups if group["params"]],
        lr=lr,
        betas=section.betas,
        eps=section.eps,
        fused=device in ("cuda", "cpu"),
    )
