"""`tinylm runs`: list the runs in a folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from .console import JSON, format_size, print_json, stderr_console, stdout_console

if TYPE_CHECKING:
    from tinylm.evaluation.metrics import Metric, Metrics
    from tinylm.run import Run

app = typer.Typer(add_completion=False)


@app.command()
def runs(folder: str = typer.Argument("runs", help="The folder that contains the runs."), json: bool = JSON) -> None:
    """List runs with their steps, the held-out metrics of their best step, age and size."""
    from tinylm.errors import InputError
    from tinylm.evaluation.metrics import LANGUAGE_MODEL
    from tinylm.run import all_runs

    if folder != "runs" and not Path(folder).is_dir():
        raise InputError("no such folder", where=folder)
    listed = [(run, *_best_evaluation(run)) for run in all_runs(Path(folder))]
    measured = dict.fromkeys(metric for _, _, metrics in listed if metrics is not None for metric, _ in metrics.items())
    columns = list(measured) or list(LANGUAGE_MODEL)
    rows = [_row(run, best_step, metrics, columns) for run, best_step, metrics in listed]
    if json:
        print_json(rows)
        return
    if not rows:
        stderr_console().print_line(f"no runs in {folder}/ yet: train one with `tinylm train quickstart`", "dim")
        return
    table = Table("name", box=None, pad_edge=False)
    for column in ("steps", *(metric.heading for metric in columns), "age", "size"):
        table.add_column(column, justify="right")
    for row in rows:
        values = [(metric, row[f"best_{metric.key}"]) for metric in columns]
        table.add_row(
            row["name"],
            f"{row['step']:,}",
            *("-" if value is None else metric.formatted(value) for metric, value in values),
            _age(row["age_seconds"]),
            format_size(row["bytes"]),
        )
    console = stdout_console()
    console.width = max(console.width, 80)  # on a narrow terminal, wrapped lines are better than truncated numbers
    console.print(table)


def _best_evaluation(run: Run) -> tuple[int | None, Metrics | None]:
    """Return the step and the metrics of a run's best evaluation, or (None, None) if the run was never evaluated."""
    from tinylm.evaluation.metrics import Metrics, best_index

    lines = [line for line in run.metrics() if line["kind"] == "eval"]
    evaluations = [(line["step"], metrics) for line in lines if (metrics := Metrics.from_dict(line)) is not None]
    index = best_index([metrics for _, metrics in evaluations])
    return (None, None) if index is None else evaluations[index]


def _row(run: Run, best_step: int | None, metrics: Metrics | None, columns: list[Metric]) -> dict[str, Any]:
    values = {} if metrics is None else metrics.values
    return {
        "name": run.name,
        "run": str(run.path),
        "step": max((line["step"] for line in run.metrics()), default=0),
        "best_step": best_step,
        **{f"best_{metric.key}": values.get(metric.name) for metric in columns},
        "age_seconds": time.time() - run.modified_at,
        "bytes": run.size(),
    }


def _age(seconds: float) -> str:
    for step, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= step:
            return f"{seconds / step:.0f} {unit}"
    return f"{seconds:.0f} s"
