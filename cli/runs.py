"""`tinylm runs`: list the runs in a folder."""

from __future__ import annotations

import shlex
import sys
import time
from csv import writer as csv_writer
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from . import run_queries
from .console import JSON, format_size, pluralize, print_json, stderr_console, stdout_console

if TYPE_CHECKING:
    from tinylm.evaluation.metrics import Metric, Metrics
    from tinylm.run import Run

app = typer.Typer(add_completion=False)


@app.command()
def runs(
    folder: str = typer.Argument("runs", help="The folder that contains the runs."),
    sort: str | None = typer.Option(
        None, "--sort", metavar="KEY", help="Sort by a column, a metric or a recipe key, best first. Default: by name."
    ),
    filter_: list[str] | None = typer.Option(
        None,
        "--filter",
        metavar="KEY>=VALUE",
        help="List only the runs that satisfy a condition such as 'model.n_embd>=192'. Can be repeated.",
    ),
    columns_: str | None = typer.Option(
        None,
        "--columns",
        metavar="KEY,KEY",
        help="Comma-separated columns, metrics and recipe keys to show after the name. With --json, they are added to each run.",
    ),
    csv: bool = typer.Option(False, "--csv", help="Print comma-separated values without rounding."),
    json: bool = JSON,
) -> None:
    """List runs with their steps, age and size, and the held-out metrics of their best step.

    The runs of a sweep, ladder or scaling experiment in the folder are listed as NAME/RUN.
    """
    from tinylm.errors import InputError
    from tinylm.evaluation.metrics import LANGUAGE_MODEL, METRICS
    from tinylm.run import all_runs, experiment_runs

    if csv and json:
        raise InputError("these options are mutually exclusive", where="--csv, --json")
    if folder != "runs" and not Path(folder).is_dir():
        raise InputError("no such folder", where=folder)
    found = [*all_runs(Path(folder)), *experiment_runs(Path(folder))]
    path = Path(folder).resolve()
    if not found and path in [run.path for run in all_runs(path.parent)]:
        parent = path.parent if Path(folder).name in ("", "..") else Path(folder).parent
        hint = f"`tinylm runs {shlex.quote(str(parent))}` lists the runs in its folder"
        raise InputError("is a run, not a folder of runs", where=folder, hint=hint)
    listed = [_summary(run) for run in sorted(found, key=lambda run: run.path)]
    measured = dict.fromkeys(metric for summary in listed if summary.best is not None for metric, _ in summary.best.items())
    columns = list(measured) or list(LANGUAGE_MODEL)
    filters = [run_queries.parse_filter(text) for text in filter_ or ()]
    shown = [key.strip() for key in columns_.split(",")] if columns_ is not None else []
    uses_recipes = bool(filters or shown or sort)
    rows = [_row(summary, Path(folder), columns, with_recipe=uses_recipes) for summary in listed]
    run_queries.check_keys(rows, [condition.key for condition in filters], "--filter")
    run_queries.check_keys(rows, shown, "--columns")
    rows = [row for row in rows if all(condition.accepts(row) for condition in filters)]
    if sort is not None:
        run_queries.check_keys(rows, [sort], "--sort")
        metric = METRICS.get(sort.removeprefix("best_").removeprefix("val_"))
        rows = run_queries.sort_rows(rows, sort, higher_is_better=metric is not None and not metric.lower_is_better)
    if json:
        for row in rows:
            row.update({key: run_queries.lookup(row, key)[0] for key in shown})
        print_json([{key: value for key, value in row.items() if key != "recipe"} for row in rows])
        return
    if csv:
        best = [f"best_{metric.key}" for metric in columns]
        _print_csv(rows, shown or ["run", "step", "best_step", *best, "age_seconds", "bytes"])
        return
    if not rows and filters and listed:
        stderr_console().print_line("no run matches the filters", "dim")
        return
    if not rows:
        stderr_console().print_line(f"no runs in {folder}/ yet: train one with `tinylm train quickstart`", "dim")
        return
    if shown:
        _print_columns(rows, shown)
        return
    table = Table("name", box=None, pad_edge=False)
    for column in ("steps", *(metric.heading for metric in columns), "age", "size"):
        table.add_column(column, justify="right")
    for row in rows:
        values = [(metric, row[f"best_{metric.key}"]) for metric in columns]
        table.add_row(
            f"{row['name']} (damaged)" if row["problem"] else row["name"],
            f"{row['step']:,}",
            *("-" if value is None else metric.formatted(value) for metric, value in values),
            _age(row["age_seconds"]),
            format_size(row["bytes"]),
        )
    console = stdout_console()
    console.width = max(console.width, 80)  # on a narrow terminal, wrapped lines are better than truncated numbers
    console.print(table)
    for row in rows:
        if row["problem"]:
            stderr_console().print_line(f"warning: {row['run']}: {row['problem']}", "yellow")


def _print_columns(rows: list[run_queries.Row], keys: list[str]) -> None:
    table = Table("name", box=None, pad_edge=False)
    for key in keys:
        table.add_column(key, justify="right")
    for row in rows:
        table.add_row(row["name"], *(_cell(row, key) for key in keys))
    stdout_console().print(table)


def _cell(row: run_queries.Row, key: str) -> str:
    from tinylm.evaluation.metrics import METRICS

    value, _ = run_queries.lookup(row, key)
    name = run_queries.ALIASES.get(key, key)
    metric = METRICS.get(name.removeprefix("best_").removeprefix("val_"))
    if value is None:
        return "-"
    if name == "age_seconds":
        return _age(value)
    if name == "bytes":
        return format_size(value)
    return metric.formatted(value) if metric is not None else run_queries.as_text(value)


def _print_csv(rows: list[run_queries.Row], keys: list[str]) -> None:
    """Print the name and the values of `keys` without rounding them."""
    writer = csv_writer(sys.stdout, lineterminator="\n")
    writer.writerow(["name", *keys])
    for row in rows:
        writer.writerow([row["name"], *(run_queries.as_text(run_queries.lookup(row, key)[0]) for key in keys)])


@dataclass(frozen=True)
class _Summary:
    """A summary of a run's log."""

    run: Run
    step: int = 0
    best_step: int | None = None
    best: Metrics | None = None
    problem: str | None = None
    """Why the run, or a part of its log, cannot be read."""


def _summary(run: Run) -> _Summary:
    from tinylm.errors import TinylmError

    try:
        step = max((line["step"] for line in run.metrics()), default=0)
        damaged = run.damaged_metrics()
        problem = f"metrics.jsonl has {pluralize(damaged, 'damaged line')}" if damaged else None
        return _Summary(run, step, *_best_evaluation(run), problem)
    except (TinylmError, OSError) as error:
        return _Summary(run, problem=str(error))


def _best_evaluation(run: Run) -> tuple[int | None, Metrics | None]:
    """Return the step and the metrics of a run's best evaluation, or (None, None) if the run was never evaluated."""
    from tinylm.evaluation.metrics import Metrics, best_index

    lines = [line for line in run.metrics() if line["kind"] == "eval"]
    evaluations = [(line["step"], metrics) for line in lines if (metrics := Metrics.from_dict(line)) is not None]
    index = best_index([metrics for _, metrics in evaluations])
    return (None, None) if index is None else evaluations[index]


def _row(summary: _Summary, folder: Path, columns: list[Metric], *, with_recipe: bool) -> run_queries.Row:
    values = {} if summary.best is None else summary.best.values
    run = summary.run
    return {
        "name": run.path.relative_to(folder).as_posix(),
        "run": str(run.path),
        "step": summary.step,
        "best_step": summary.best_step,
        **{f"best_{metric.key}": values.get(metric.name) for metric in columns},
        "age_seconds": max(0.0, time.time() - run.modified_at),  # a copied run may have a time in the future
        "bytes": run.size(),
        "problem": summary.problem,
        "recipe": _recipe_values(run) if with_recipe else {},
    }


def _recipe_values(run: Run) -> dict[str, Any]:
    """Return the values of the run's recipe by dotted key, or an empty dictionary if the recipe cannot be read."""
    from tinylm.errors import TinylmError
    from tinylm.recipe.schema import flattened

    try:
        return flattened(run.recipe.as_dict())
    except (TinylmError, OSError):
        return {}


def _age(seconds: float) -> str:
    for step, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= step:
            return f"{seconds / step:.0f} {unit}"
    return f"{seconds:.0f} s"
