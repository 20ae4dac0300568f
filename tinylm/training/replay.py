"""The report that a training leaves when a step is beyond help, and doing that step again from nothing but the report.

report.json         what was seen: why, where (step, cursor), loss, norms of every weight and gradient, in which numbers
texts.txt           the sequences of the batch, as text
batch.safetensors   the same as tokens
model.safetensors   the weights that the step began with
recipe.yaml         how it was computed
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import tinylm
from tinylm import device as devices
from tinylm.errors import InputError
from tinylm.model import lora
from tinylm.model.objective import CausalObjective, Example
from tinylm.model.transformer import Transformer
from tinylm.paths import sync_folder
from tinylm.recipe import Recipe, load
from tinylm.run import Checkpoint, check_shapes, load_weights
from tinylm.training.feed import GlobalBatch
from tinylm.training.parallel import norms
from tinylm.training.precision import Precision
from tinylm.training.step import accumulate, micro_batch_seeds

_ROUNDING = 1e-3
"""Relative difference below which two results are the same but for the order of sums."""


@dataclass(frozen=True)
class Report:
    """What was seen of a step that went wrong. `cursor` counts the sequences of the training before its batch."""

    reason: str
    step: int
    cursor: int
    loss: float
    grad_norm: float
    micro_batch_size: int
    precision: str
    scale: float
    """By which the loss was multiplied for fp16; 1 otherwise."""
    device: str
    vocab_size: int
    processes: int
    threads: int
    weights: dict[str, float]
    """Norm of each parameter."""
    gradients: dict[str, float]
    """Norm of each gradient, before clipping."""


@dataclass(frozen=True)
class Replay:
    """A reported step done again. `same`: bits, rounding or different."""

    report: Report
    loss: float
    grad_norm: float
    gradients: dict[str, float]
    sequence_losses: list[float]
    """Mean loss of each sequence of the batch by itself, in nats per token, without dropout."""
    same: str

    @property
    def broken(self) -> list[str]:
        """The parameters whose weights or gradients are not numbers, in the order of the model."""
        seen = self.report.weights
        return [name for name, norm in self.gradients.items() if not (math.isfinite(norm) and math.isfinite(seen.get(name, 0.0)))]

    def as_dict(self) -> dict[str, Any]:
        """The keys of `tinylm train --replay --json`."""
        return {
            "reason": self.report.reason,
            "step": self.report.step,
            "cursor": self.report.cursor,
            "loss": self.loss,
            "reported_loss": self.report.loss,
            "grad_norm": self.grad_norm,
            "reported_grad_norm": self.report.grad_norm,
            "same": self.same,
            "broken": self.broken,
            "sequence_losses": self.sequence_losses,
            "layers": {name: {"weight": self.report.weights.get(name), "gradient": norm} for name, norm in self.gradients.items()},
        }


def write_report(
    folder: Path, report: Report, recipe: Recipe, weights: Mapping[str, Tensor], sequences: Tensor, texts: list[str]
) -> None:
    """Make the folder, whole or not at all; one of the same step is replaced."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(dict(weights), partial / "model.safetensors", {"format": "pt"})
    save_file({"tokens": sequences.contiguous()}, partial / "batch.safetensors")
    (partial / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    written = (f"--- sequence {number}\n{text}\n" for number, text in enumerate(texts))
    (partial / "texts.txt").write_text("".join(written), encoding="utf-8", newline="\n")
    note = {"version": tinylm.__version__, **_to_json(asdict(report))}
    (partial / "report.json").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    sync_folder(folder.parent)


def replay(folder: str | Path, *, device: str | None = None, threads: int | None = None) -> Replay:
    """Compute a reported step's loss and gradient again, on the device and threads it was computed on unless told otherwise.

    Raises `InputError` for a folder that is no report or cannot be read.
    """
    folder = Path(folder)
    report, tokens = _read(folder)
    target = devices.resolve(device or report.device.partition(":")[0])
    devices.set_threads(threads or report.threads)
    recipe = load(folder / "recipe.yaml", check_files=False)
    precision = Precision(report.precision, target)
    network = _network(folder, recipe, report.vocab_size).to(target).train()
    objective = CausalObjective()
    example = objective.example(tokens)
    batch = GlobalBatch(example, int((example.targets >= 0).sum()))
    scaler = torch.amp.GradScaler(target.type, init_scale=report.scale, enabled=report.precision == "fp16")
    count = len(tokens) // report.micro_batch_size
    seeds = micro_batch_seeds(recipe.seed, report.step - 1, 0, count) if recipe.model.uses_dropout else None
    with precision.tf32():
        loss = float(accumulate(network, objective, batch, report.micro_batch_size, precision, scaler, seeds))
    gradients = {
        name: parameter.grad / report.scale for name, parameter in network.named_parameters() if parameter.grad is not None
    }
    norm = float(torch.nn.utils.get_total_norm(gradients.values()))
    each = []
    with torch.no_grad(), precision.autocast():
        for row in range(len(tokens)):  # one at a time: their logits would fill the memory
            one = Example(example.inputs[row : row + 1].to(target), example.targets[row : row + 1].to(target))
            each.append(float(objective.losses(network.eval(), one).sum()) / max(int((one.targets >= 0).sum()), 1))
    same = _same((loss, norm), (report.loss, report.grad_norm))
    return Replay(report, loss, norm, norms(gradients.items()), each, same)


def _network(folder: Path, recipe: Recipe, vocab_size: int) -> Transformer:
    weights = Checkpoint(folder)
    check_shapes(recipe, vocab_size, weights)
    network = lora.blank(recipe.model, vocab_size, recipe.training.lora)
    load_weights(network, weights)
    return network


def _read(folder: Path) -> tuple[Report, Tensor]:
    if not (folder / "report.json").is_file():
        raise InputError("is no report: it has no report.json", where=str(folder), hint="a training that gives up names its own")
    try:
        note = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        report = Report(**{name: _from_json(note[name]) for name in Report.__dataclass_fields__})
        tokens = load_file(folder / "batch.safetensors")["tokens"]
        if tokens.ndim != 2 or report.micro_batch_size < 1 or len(tokens) % report.micro_batch_size:
            raise ValueError("the batch does not split into its micro-batches")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", where=str(folder)) from None
    return report, tokens


def _same(again: tuple[float, ...], before: tuple[float, ...]) -> str:
    """How near two results are, where what is no number equals its like."""
    pairs = [(one, two) for one, two in zip(again, before, strict=True) if not (math.isnan(one) and math.isnan(two))]
    if all(one == two for one, two in pairs):
        return "bits"
    return "rounding" if all(math.isclose(one, two, rel_tol=_ROUNDING) for one, two in pairs) else "different"


def _to_json(value: Any) -> Any:
    """Numbers that JSON lacks as words."""
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    return float(value) if value in ("nan", "inf", "-inf") else value
