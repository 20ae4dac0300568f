"""Write a report when training aborts, and recompute the failed step from the report alone.

report.json         reason, position (step, cursor), loss, norms of all weights and gradients, numeric settings
texts.txt           the sequences in the batch, as text
batch.safetensors   the same sequences, as the dataset's arrays
model.safetensors   the weights before the step
recipe.yaml         the recipe
"""

from __future__ import annotations

import errno
import json
import math
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
from tinylm.data.batch import Batch
from tinylm.data.datasets import Examples
from tinylm.errors import InputError
from tinylm.model import registry
from tinylm.model.base import Model
from tinylm.paths import atomic_folder
from tinylm.recipe import Recipe, load
from tinylm.run import Checkpoint, check_shapes, load_weights
from tinylm.training import objectives
from tinylm.training.distillation import Teachers
from tinylm.training.feed import LocalBatch
from tinylm.training.objectives import Objective
from tinylm.training.parallel import tensor_norms
from tinylm.training.precision import Precision
from tinylm.training.step import GradientSettings, accumulate, micro_batch_seeds

_ROUNDING = 1e-3
"""Maximum relative difference that is attributed to rounding. Rounding errors depend on the order of summation."""


@dataclass(frozen=True)
class StepReport:
    """The contents of report.json. `cursor` is the number of sequences consumed before the batch."""

    reason: str
    step: int
    cursor: int
    loss: float
    grad_norm: float
    micro_batch_size: int
    precision: str
    scale: float
    """Loss scale in fp16. It is 1 in other precisions."""
    device: str
    vocab_size: int
    processes: int
    threads: int
    weights: dict[str, float]
    """Norm of each parameter."""
    gradients: dict[str, float]
    """Norm of each gradient before clipping."""


@dataclass(frozen=True)
class Replay:
    """The results of a recomputed step."""

    report: StepReport
    loss: float
    grad_norm: float
    gradients: dict[str, float]
    """Norm of each gradient before clipping."""
    sequence_losses: list[float]
    """Mean loss of each sequence in the batch, in nats per token, without dropout."""
    agreement: str
    """How closely the loss and gradient norm match the report: `bits` (identical), `rounding` or `different`."""

    @property
    def non_finite(self) -> list[str]:
        """The names of parameters with non-finite weights or gradients, in model order."""
        weights = self.report.weights
        return [
            name for name, norm in self.gradients.items() if not (math.isfinite(norm) and math.isfinite(weights.get(name, 0.0)))
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that `tinylm train --replay --json` prints."""
        return {
            "reason": self.report.reason,
            "step": self.report.step,
            "cursor": self.report.cursor,
            "loss": self.loss,
            "reported_loss": self.report.loss,
            "grad_norm": self.grad_norm,
            "reported_grad_norm": self.report.grad_norm,
            "agreement": self.agreement,
            "non_finite": self.non_finite,
            "sequence_losses": self.sequence_losses,
            "layers": {name: {"weight": self.report.weights.get(name), "gradient": norm} for name, norm in self.gradients.items()},
        }


def write_report(
    folder: Path, report: StepReport, recipe: Recipe, weights: Mapping[str, Tensor], examples: Examples, texts: list[str]
) -> None:
    """Write the report folder atomically, and replace an existing one. `examples` and `texts` are those of the global batch.

    Raises `OSError` if the folder cannot be written.
    """
    try:
        with atomic_folder(folder) as partial:
            save_file(dict(weights), partial / "model.safetensors", {"format": "pt"})
            arrays = {name: torch.from_numpy(array).contiguous() for name, array in examples.items()}
            save_file(arrays, partial / "batch.safetensors")
            (partial / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
            lines = (f"--- sequence {number}\n{text}\n" for number, text in enumerate(texts))
            (partial / "texts.txt").write_text("".join(lines), encoding="utf-8", newline="\n")
            document = {"version": tinylm.__version__, **_to_json(asdict(report))}
            (partial / "report.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(folder)) from None


def replay(folder: str | Path, *, device: str | None = None, threads: int | None = None) -> Replay:
    """Recompute the loss and gradient of the step in a report. `device` and `threads` default to the values in the report.

    Raises `InputError` if the folder is not a report or is damaged.
    """
    folder = Path(folder)
    report, examples = _read_report(folder)
    target = devices.resolve(device or report.device.partition(":")[0])
    devices.set_threads(threads or report.threads)
    recipe = load(folder / "recipe.yaml", check_files=False)
    precision = Precision(report.precision, target)
    network = _load_network(folder, recipe, report.vocab_size).to(target).train()
    scaler = torch.amp.GradScaler(target.type, init_scale=report.scale, enabled=report.precision == "fp16")
    objective = objectives.build(recipe.objective)
    if (teachers := Teachers.open(recipe, folder)) is not None:
        objective = teachers.objective(target)
    settings = GradientSettings(report.micro_batch_size, precision, objective, scaler)
    batch = objective.batch(examples, recipe.seed, report.cursor)
    count = len(batch) // report.micro_batch_size
    seeds = micro_batch_seeds(recipe.seed, report.step - 1, 0, count) if recipe.model.uses_dropout else None
    with precision.tf32():
        loss = float(accumulate(network, LocalBatch.whole(batch), settings, seeds).flatten()[0])
    gradients = {
        name: parameter.grad / report.scale for name, parameter in network.named_parameters() if parameter.grad is not None
    }
    norm = float(torch.nn.utils.get_total_norm(gradients.values()))
    agreement = _agreement((loss, norm), (report.loss, report.grad_norm))
    sequence_losses = _sequence_losses(network.eval(), batch, objective, precision)
    return Replay(report, loss, norm, tensor_norms(gradients.items()), sequence_losses, agreement)


@torch.no_grad()
def _sequence_losses(network: Model, batch: Batch, objective: Objective, precision: Precision) -> list[float]:
    """Return the mean loss of each sequence. Sequences are evaluated one at a time, because logits use a lot of memory."""
    losses = []
    with precision.autocast():
        for sequence in batch.split(1):
            total = objective.losses(network, sequence.to(precision.device)).sum()
            losses.append(float(total) / max(sequence.target_count, 1))
    return losses


def _load_network(folder: Path, recipe: Recipe, vocab_size: int) -> Model:
    weights = Checkpoint(folder)
    check_shapes(recipe, vocab_size, weights)
    network = registry.build(recipe.model, vocab_size, None, objective=recipe.objective, with_lora=recipe.training.lora)
    load_weights(network, weights)
    return network


def _read_report(folder: Path) -> tuple[StepReport, Examples]:
    if not (folder / "report.json").is_file():
        hint = "when training aborts, it prints the path of its report"
        raise InputError("not a report: it has no report.json", where=str(folder), hint=hint)
    try:
        document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        report = StepReport(**{name: _from_json(document[name]) for name in StepReport.__dataclass_fields__})
        examples = {name: tensor.numpy() for name, tensor in load_file(folder / "batch.safetensors").items()}
        shape = examples["tokens"].shape
        if len(shape) != 2 or report.micro_batch_size < 1 or shape[0] % report.micro_batch_size:
            raise ValueError("the batch size is not a multiple of the micro-batch size")
        if any(array.shape[:1] != shape[:1] for array in examples.values()):
            raise ValueError("the arrays in the batch differ in length")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", where=str(folder)) from None
    return report, examples


def _agreement(results: tuple[float, ...], expected: tuple[float, ...]) -> str:
    """Compare results with expected values. Returns `bits` (identical), `rounding` or `different`. NaN equals NaN."""
    pairs = [(a, b) for a, b in zip(results, expected, strict=True) if not (math.isnan(a) and math.isnan(b))]
    if all(a == b for a, b in pairs):
        return "bits"
    return "rounding" if all(math.isclose(a, b, rel_tol=_ROUNDING) for a, b in pairs) else "different"


def _to_json(value: Any) -> Any:
    """Replace non-finite numbers, which JSON cannot represent, with strings."""
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    return float(value) if value in ("nan", "inf", "-inf") else value
