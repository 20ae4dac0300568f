"""Run a scaling experiment, fit the law to its runs, predict a larger budget, and compare the prediction with a finished run.

DIR/N/               the run folders; DIR/results and DIR/logs belong to `tinylm.sweep.runner`
DIR/result.json      the document of `tinylm scale --json`. Later versions of tinylm can use it to check the prediction.
DIR/predicted.yaml   the recipe for the larger budget. It is not called recipe.yaml, because that file marks a run folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.cost.micro_batch import USABLE_MEMORY
from tinylm.cost.plan import effective_tokens, make_plan
from tinylm.errors import InputError, WorkError
from tinylm.paths import atomic_write_text
from tinylm.recipe import Recipe
from tinylm.recipe.schema import changes
from tinylm.run import Run
from tinylm.scaling.grid import BASE_FILE, FAMILY, FIXED_KEYS, Cell, Grid, law_parameters, max_tokens, open_grid, resized
from tinylm.scaling.law import PARAMETERS, Array, Estimate, Fit, Points, fit
from tinylm.suggest import EVALUATIONS
from tinylm.sweep.runner import Outcome, Sweep

COMPUTE_FACTOR = 4
"""By default, the prediction is for this multiple of the compute of the largest run."""
OVERFITTING = 1.01
"""A run is left out if its loss is above this factor times that of a shorter run of the same size."""
PREDICTED_FILE, RESULT_FILE = "predicted.yaml", "result.json"
_FINE_SIZES = 200
_FREE_KEYS = ("name", "seed", *FIXED_KEYS, "evaluation.every", "tracking")
_FREE_SECTIONS = ("checkpoint.", "sampling.")
"""Recipe keys that may differ from the experiment's. They do not affect the loss, or the law accounts for their effect."""
_SAME_SECTIONS = ("data.", "tokenizer.", "evaluation.")
"""Losses are comparable only if these sections are the same, apart from `_FREE_KEYS`."""


@dataclass(frozen=True)
class Row:
    """One run of the experiment."""

    cell: Cell
    run: str
    seconds: float | None
    val_loss: float | None
    val_bits_per_byte: float | None
    left_out: str | None
    """Why the law is fitted without this run, or None."""


@dataclass(frozen=True)
class Prediction:
    """A larger run: the best size for its compute, and its predicted loss in nats per token."""

    n_layer: int
    n_embd: int
    steps: int
    parameters: float
    """N, as in `Cell.parameters`."""
    tokens: int
    flops: float
    seconds: float
    """Training time at the speed of the experiment's runs."""
    loss: Estimate
    bits_per_byte: Estimate
    optimal_parameters: Estimate
    """N with the lowest predicted loss, not limited to the sizes in `FAMILY`."""
    overfits: bool
    """Whether the run would repeat the text so often that its loss may be above the prediction."""


@dataclass(frozen=True)
class Result:
    """A finished experiment."""

    folder: Path
    grid: Grid
    rows: tuple[Row, ...]
    fit: Fit
    prediction: Prediction

    @property
    def largest_error(self) -> tuple[Row, float]:
        """The run whose loss differs most from the law, and the law's loss relative to it, minus 1."""
        errors = [
            (row, _fitted_loss(row, self.fit) / row.val_loss - 1)
            for row in self.rows
            if row.left_out is None and row.val_loss is not None
        ]
        return max(errors, key=lambda item: abs(item[1]))

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document of `tinylm scale --json`."""
        fitted = self.fit
        return {
            "folder": str(self.folder),
            "source": list(self.grid.request.source),
            "minutes": self.grid.request.minutes,
            "unique_tokens": self.grid.unique_tokens,
            "rows": [_row_dict(row, fitted) for row in self.rows],
            "law": {
                **{name: fitted.parameter(name).value for name in PARAMETERS},
                **{f"{name}_ci95": list(fitted.parameter(name).ci95) for name in PARAMETERS},
                "repetition_scale": fitted.repetition_scale,
                "repetition_scale_fitted": fitted.fits_repetitions,
            },
            "prediction": _prediction_dict(self.prediction),
            "recipe": str(self.folder / PREDICTED_FILE),
            "seed": fitted.seed,
        }


@dataclass(frozen=True)
class Check:
    """The predicted and the actual loss of a finished run."""

    run: str
    parameters: float
    tokens: int
    val_loss: float
    predicted: Estimate
    differing_keys: tuple[str, ...]
    """Recipe keys other than size and length that differ from the experiment's."""

    @property
    def relative_error(self) -> float:
        """Predicted minus actual loss, relative to the actual loss."""
        return self.predicted.value / self.val_loss - 1

    @property
    def inside_interval(self) -> bool:
        low, high = self.predicted.ci95
        return low <= self.val_loss <= high

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document of `tinylm scale --check --json`."""
        return {
            "run": self.run,
            "parameters": self.parameters,
            "tokens": self.tokens,
            "val_loss": self.val_loss,
            "predicted_loss": self.predicted.value,
            "predicted_loss_ci95": list(self.predicted.ci95),
            "relative_error": self.relative_error,
            "inside_interval": self.inside_interval,
            "differing_keys": list(self.differing_keys),
        }


def sweep(folder: Path, *, device: str = "auto") -> Sweep:
    """Return the sweep that trains the runs of the experiment in a folder. Finished runs are not trained again."""
    return Sweep(folder, folder / BASE_FILE, device=device)


def analyze(
    folder: Path, grid: Grid, base: Recipe, outcomes: Sequence[Outcome], *, predict_minutes: float | None = None, seed: int = 0
) -> Result:
    """Fit the law, choose the best size for the larger budget, and write its recipe.

    The budget is `COMPUTE_FACTOR` times the compute of the largest run, or `predict_minutes` at the speed of the runs. `seed` is
    the bootstrap's. Raises `WorkError` if too few runs can be used.
    """
    rows = rows_of(grid, outcomes)
    fitted = fit_rows(folder, grid, rows, seed=seed)
    prediction = _predict(grid, base, rows, fitted, predict_minutes)
    result = Result(folder, grid, rows, fitted, prediction)
    atomic_write_text(folder / PREDICTED_FILE, _predicted_recipe(grid, base, prediction))
    atomic_write_text(folder / RESULT_FILE, json.dumps(result.as_dict(), ensure_ascii=False, indent=1) + "\n")
    return result


def rows_of(grid: Grid, outcomes: Sequence[Outcome]) -> tuple[Row, ...]:
    """Return one row for each run, in the order of the grid, and mark the runs that the law cannot describe as left out."""
    found = {outcome.name: outcome for outcome in outcomes}
    rows: list[Row] = []
    for cell in grid.cells:
        outcome = found.get(cell.training.name)
        shorter = [row for row in rows if row.cell.n_embd == cell.n_embd and row.cell.steps < cell.steps]
        rows.append(_row(cell, outcome, shorter, grid.vocab_size))
    return tuple(rows)


def _row(cell: Cell, outcome: Outcome | None, shorter: Sequence[Row], vocab_size: int) -> Row:
    if outcome is None:
        return Row(cell, "", None, None, None, "not finished")
    result = outcome.result
    loss, bits = result.get("val_loss"), result.get("val_bits_per_byte")
    row = Row(cell, outcome.run, result.get("train_seconds"), loss, bits, None)
    if outcome.error is not None:
        return replace(row, left_out=f"failed: {outcome.error}")
    if result.get("stopped") != "done":
        return replace(row, left_out="stopped early")
    if loss is None or not math.isfinite(loss) or loss >= math.log(vocab_size):
        return replace(row, left_out="diverged: the loss is not below that of uniform guessing")
    losses = [other.val_loss for other in shorter if other.left_out is None and other.val_loss is not None]
    if losses and loss > OVERFITTING * min(losses):
        return replace(row, left_out=f"overfitted or diverged: a shorter run has a loss of {min(losses):.4f}")
    return row


def fit_rows(folder: Path, grid: Grid, rows: Sequence[Row], *, seed: int = 0) -> Fit:
    """Fit the law to the rows that are not left out. Raises `WorkError` if they do not determine it."""
    used = [row for row in rows if row.left_out is None]
    points = Points(
        np.array([row.cell.parameters for row in used], float),
        np.array([row.cell.tokens for row in used], float),
        np.array([row.val_loss for row in used], float),
        grid.unique_tokens,
    )
    if points.problem is not None:
        reasons = "; ".join(f"{row.cell.training.name}: {row.left_out}" for row in rows if row.left_out is not None)
        hint = "if runs are not finished, run the same command again; otherwise, use a longer text or more time, with another --out"
        raise WorkError(f"{points.problem}. Left out: {reasons}", where=str(folder), hint=hint)
    return fit(points, seed=seed)


def load_fit(folder: Path) -> Fit:
    """Fit the law again to the runs of a finished experiment. Raises `InputError` if the experiment is not finished."""
    file = folder / RESULT_FILE
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        used = [row for row in result["rows"] if row["left_out"] is None]
        parameters, tokens, losses = (np.array([row[key] for row in used], float) for key in ("parameters", "tokens", "val_loss"))
        return fit(Points(parameters, tokens, losses, result["unique_tokens"]), seed=result["seed"])
    except FileNotFoundError:
        hint = "run the `tinylm scale` command of this folder again to finish it"
        raise InputError("the experiment is not finished", where=str(folder), hint=hint) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"cannot be read: {error}", where=str(file)) from None


def _predict(grid: Grid, base: Recipe, rows: Sequence[Row], fitted: Fit, minutes: float | None) -> Prediction:
    used = [row for row in rows if row.left_out is None]
    flops = COMPUTE_FACTOR * max(row.cell.flops for row in used)
    speeds = _speeds(used)

    def tokens_for(parameters: Array) -> Array:
        if minutes is None:
            return flops / (6 * parameters)
        return np.asarray(60 * minutes * _speed(speeds, parameters) / (6 * parameters), np.float64)

    sizes = np.array([law_parameters(resized(base, *size, 1), grid.vocab_size) for size in FAMILY])
    losses = fitted.best.log_losses(sizes, tokens_for(sizes))[0]
    best = next((index for index in losses.argsort().tolist() if _fits_in_memory(grid, base, FAMILY[index])), 0)
    parameters = float(sizes[best])
    steps = max(1, round(float(tokens_for(sizes[[best]])[0]) / grid.tokens_per_step))
    tokens = steps * grid.tokens_per_step
    loss = fitted.predict(parameters, tokens)
    bits = _bits_per_nat(used)
    fine = np.geomspace(sizes[0] / 4, sizes[-1], _FINE_SIZES)
    n_layer, n_embd = FAMILY[best]
    return Prediction(
        n_layer,
        n_embd,
        steps,
        parameters,
        tokens,
        6 * parameters * tokens,
        6 * parameters * tokens / float(_speed(speeds, np.array([parameters]))[0]),
        loss,
        Estimate(bits * loss.value, (bits * loss.ci95[0], bits * loss.ci95[1])),
        fitted.optimal_size(fine, tokens_for(fine)),
        tokens > max_tokens(parameters, grid.unique_tokens),
    )


def _speeds(rows: Sequence[Row]) -> dict[float, float]:
    """Return the FLOP/s of the longest run of each size, by N."""
    longest = {row.cell.parameters: row for row in sorted(rows, key=lambda row: (row.cell.parameters, row.cell.tokens))}
    return {parameters: row.cell.flops / max(row.seconds or 0.0, 1e-9) for parameters, row in longest.items()}


def _speed(speeds: dict[float, float], parameters: Array) -> Array:
    """Interpolate the FLOP/s between the sizes. Outside their range, the speed is that of the nearest size."""
    return np.exp(np.interp(np.log(parameters), np.log(list(speeds)), np.log(list(speeds.values()))))


def _bits_per_nat(rows: Sequence[Row]) -> float:
    """Return the factor from nats per token to bits per byte. It depends only on the tokenizer and the held-out text."""
    return next((row.val_bits_per_byte / row.val_loss for row in rows if row.val_bits_per_byte and row.val_loss), math.nan)


def _fits_in_memory(grid: Grid, base: Recipe, size: tuple[int, int]) -> bool:
    plan = make_plan(resized(base, *size, 1), grid.vocab_size, grid.unique_tokens, accelerator=grid.request.accelerator)
    return plan.memory_bytes.total <= USABLE_MEMORY * plan.device_memory_bytes


def _predicted_recipe(grid: Grid, base: Recipe, prediction: Prediction) -> str:
    """Return the recipe of the larger run as YAML. It is evaluated on the same held-out tokens as the experiment's runs."""
    recipe = resized(base, prediction.n_layer, prediction.n_embd, prediction.steps)
    often = {"every": 1 / EVALUATIONS}
    recipe = recipe.model_copy(
        update={
            "evaluation": recipe.evaluation.model_copy(update=often),
            "checkpoint": recipe.checkpoint.model_copy(update=often),
        }
    )
    low, high = prediction.loss.ci95
    head = (
        f"# The best size for {prediction.flops:.3g} FLOPs on {', '.join(grid.request.source)}, as predicted by `tinylm scale`.\n"
        f"# Predicted held-out loss: {prediction.loss.value:.4f} (95% interval {low:.4f} to {high:.4f}), "
        f"{prediction.bits_per_byte.value:.4f} bits per byte.\n"
    )
    return head + recipe.to_yaml()


def check(folder: Path, run: Run) -> Check:
    """Compare a finished run with the prediction for its size and length by the experiment in `folder`.

    Raises `InputError` if there is no finished experiment, or if the loss is not comparable: the run is not
    finished, or its text, tokenizer or evaluation differ.
    """
    _, base = open_grid(folder)
    fitted = load_fit(folder)
    differing = [
        key
        for key, (expected, _) in changes(base, run.recipe).items()
        if key not in _FREE_KEYS and not key.startswith(_FREE_SECTIONS) and expected != "auto"  # a run stores what `auto` chose
    ]
    where = str(run.path)
    if incomparable := [key for key in differing if key.startswith(_SAME_SECTIONS)]:
        hint = f"train the recipe in {folder / PREDICTED_FILE}"
        raise InputError(
            f"the loss is not comparable, because the run has a different {', '.join(incomparable)}", where=where, hint=hint
        )
    evaluations = [line for line in run.metrics() if line["kind"] == "eval"]
    steps = run.recipe.training.steps
    if not evaluations or (steps is not None and evaluations[-1]["step"] < steps):
        raise InputError("the run is not finished", where=where, hint="continue it with `tinylm train --resume`")
    last = evaluations[-1]
    parameters = law_parameters(run.recipe, run.tokenizer.vocab_size)
    return Check(where, parameters, last["tokens"], last["val_loss"], fitted.predict(parameters, last["tokens"]), tuple(differing))


def _fitted_loss(row: Row, fitted: Fit) -> float:
    """Return the law's loss for the size and length of a run."""
    return float(np.exp(fitted.best.log_losses(np.array([row.cell.parameters]), np.array([row.cell.tokens], float))[0, 0]))


def _row_dict(row: Row, fitted: Fit) -> dict[str, Any]:
    cell, unique = row.cell, fitted.points.unique_tokens
    return {
        "run": row.run,
        "n_layer": cell.n_layer,
        "n_embd": cell.n_embd,
        "steps": cell.steps,
        "parameters": cell.parameters,
        "tokens": cell.tokens,
        "epochs": cell.tokens / unique,
        "effective_tokens": effective_tokens(cell.tokens, unique, fitted.repetition_scale),
        "flops": cell.flops,
        "seconds": row.seconds,
        "val_loss": row.val_loss,
        "val_bits_per_byte": row.val_bits_per_byte,
        "fitted_loss": _fitted_loss(row, fitted),
        "left_out": row.left_out,
    }


def _prediction_dict(prediction: Prediction) -> dict[str, Any]:
    return {
        "n_layer": prediction.n_layer,
        "n_embd": prediction.n_embd,
        "steps": prediction.steps,
        "parameters": prediction.parameters,
        "tokens": prediction.tokens,
        "flops": prediction.flops,
        "seconds": prediction.seconds,
        "val_loss": prediction.loss.value,
        "val_loss_ci95": list(prediction.loss.ci95),
        "val_bits_per_byte": prediction.bits_per_byte.value,
        "val_bits_per_byte_ci95": list(prediction.bits_per_byte.ci95),
        "optimal_parameters": prediction.optimal_parameters.value,
        "optimal_parameters_ci95": list(prediction.optimal_parameters.ci95),
        "overfits": prediction.overfits,
    }
