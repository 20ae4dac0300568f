"""`tinylm compare`: compare the recipes and held-out results of runs, and test whether their models differ significantly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinylm.errors import InputError
from tinylm.evaluation.metrics import Metric, primary_metric
from tinylm.run import Run

from .console import (
    DEVICE,
    ERRORS,
    FIELD,
    JSON,
    QUIET,
    THREADS,
    ConsoleReporter,
    checked_errors,
    given_options,
    print_fields,
    print_json,
    stderr_console,
    stdout_console,
)

app = typer.Typer(add_completion=False)


@app.command()
def compare(
    ctx: typer.Context,
    runs: list[str] = typer.Argument(..., metavar="RUN RUN...", help="Run folders."),
    on: list[str] | None = typer.Option(
        None,
        "--on",
        metavar="SOURCE",
        help="The text for the comparison. Default: the held-out text, if it is the same for all runs.",
    ),
    stride: int | None = typer.Option(None, "--stride", help="Tokens by which windows advance, as in `tinylm eval`."),
    field: str = FIELD,
    errors: str = ERRORS,
    device: str = DEVICE,
    threads: int | None = THREADS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Compare the first run with each of the others: recipes, held-out results during training, and losses on the same text."""
    checked_errors(errors)
    if len(runs) < 2:
        raise InputError("at least two runs are required", where="RUN")
    if not on and (unused := given_options(ctx, ("field", "errors"))):
        raise InputError("requires --on", where=", ".join(unused))
    opened = [Run.open(path) for path in runs]
    for run in opened:
        run.checkpoint()  # report a missing checkpoint before torch is imported

    from tinylm.device import set_threads
    from tinylm.evaluation.evaluate_run import TextFormat, compare_runs

    set_threads(threads)
    reporter = ConsoleReporter(stderr_console(), quiet=quiet)
    text_format = TextFormat(field, errors)
    comparisons = [
        compare_runs(opened[0], run, on or (), stride=stride, text_format=text_format, device=device, reporter=reporter)
        for run in opened[1:]
    ]
    metric = primary_metric(line for run in opened for line in run.metrics())
    recipes, curves = _recipe_differences(opened), _curves(opened, metric)
    if json:
        document = {
            "runs": [str(run.path) for run in opened],
            "recipes": recipes,
            "curves": curves,
            "curve_metric": metric.name,
            "tests": [
                {"a": str(opened[0].path), "b": str(run.path), **_test_document(asdict(comparison))}
                for run, comparison in zip(opened[1:], comparisons, strict=True)
            ],
        }
        print_json(document)
        return
    console = stdout_console()
    _print_table(console, "recipe", runs, recipes, _formatted)
    _print_table(console, f"{metric.heading} at step{metric.direction}", runs, curves, metric.formatted)
    rows = []
    for run, comparison in zip(opened[1:], comparisons, strict=True):
        low, high = comparison.ci95
        verdict = "significant" if low > 0 or high < 0 else "not significant"
        interval = f"95 % interval {low:+.4f} to {high:+.4f}, p = {comparison.p_value:.4f}"
        rows += [
            ("bits per byte", f"{opened[0].path} {comparison.a:.4f}, {run.path} {comparison.b:.4f}"),
            ("difference", f"{comparison.difference:+.4f}  ({interval}: {verdict})"),
            ("paired over", f"{comparison.pieces:,} {comparison.kind}"),
        ]
    print_fields(console, rows)


def _print_table(
    console: Console, title: str, runs: list[str], rows: list[dict[str, Any]], formatted: Callable[[Any], str]
) -> None:
    if not rows:
        return
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column(title)
    for run in runs:
        table.add_column(run, justify="right")
    for row in rows:
        table.add_row(str(row["name"]), *(Text("" if value is None else formatted(value)) for value in row["values"]))
    console.print(table)
    console.print()


def _formatted(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) and value > 0.01 else f"{value}"


def _test_document(test: dict[str, Any]) -> dict[str, Any]:
    return {"a_bits_per_byte": test.pop("a"), "b_bits_per_byte": test.pop("b"), **test}


def _recipe_differences(runs: list[Run]) -> list[dict[str, Any]]:
    """Return the recipe keys whose values differ, with the value in each run."""
    from tinylm.recipe.schema import flattened

    flat = [flattened(run.recipe.as_dict()) for run in runs]
    keys = list(dict.fromkeys(key for recipe in flat for key in recipe))
    listed = [{"name": key, "values": [recipe.get(key) for recipe in flat]} for key in keys]
    return [row for row in listed if any(a != b for a, b in pairwise(row["values"]))]


def _curves(runs: list[Run], metric: Metric) -> list[dict[str, Any]]:
    """Return the metric of each run at up to twelve steps at which at least one run was evaluated."""
    curves = [{event["step"]: event.get(metric.key) for event in run.metrics() if event["kind"] == "eval"} for run in runs]
    steps = sorted({step for curve in curves for step in curve})
    shown = [step for number, step in enumerate(reversed(steps)) if number % max(1, -(-len(steps) // 12)) == 0][::-1]
    return [{"name": step, "values": [curve.get(step) for curve in curves]} for step in shown]
