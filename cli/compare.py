"""`tinylm compare`: two or more runs, what differs between their recipes, and whether their models differ."""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise
from typing import Any

import typer
from rich.table import Table
from rich.text import Text

from tinylm.errors import InputError
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
    given,
    print_json,
    show_facts,
    stderr,
    stdout,
)

app = typer.Typer(add_completion=False)


@app.command()
def compare(
    ctx: typer.Context,
    runs: list[str] = typer.Argument(..., metavar="RUN RUN...", help="Run folders."),
    on: list[str] | None = typer.Option(
        None, "--on", metavar="SOURCE", help="The text; default: what the runs held out, if it is the same."
    ),
    stride: int | None = typer.Option(None, "--stride", help="Tokens between windows, as in `tinylm eval`."),
    field: str = FIELD,
    errors: str = ERRORS,
    device: str = DEVICE,
    threads: int | None = THREADS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Compare runs: recipes, losses along the way, and each with the first on the same text, piece by piece."""
    checked_errors(errors)
    if len(runs) < 2:
        raise InputError("name two runs or more", where="RUN")
    if not on and (useless := given(ctx, ("field", "errors"))):
        raise InputError("only means something with --on", where=", ".join(useless))
    opened = [Run.open(path) for path in runs]
    for run in opened:
        run.checkpoint()

    from tinylm.device import set_threads
    from tinylm.evaluation.measure import compare as compared

    set_threads(threads)
    reporter = ConsoleReporter(stderr(), quiet=quiet)
    tests = [
        compared(opened[0], run, on or (), stride=stride, field=field, errors=errors, device=device, reporter=reporter)
        for run in opened[1:]
    ]
    recipes, curves = _recipes(opened), _curves(opened)
    if json:
        document = {
            "runs": [str(run.path) for run in opened],
            "recipes": recipes,
            "curves": curves,
            "tests": [
                {"a": str(opened[0].path), "b": str(run.path), **_named(asdict(test))}
                for run, test in zip(opened[1:], tests, strict=True)
            ],
        }
        print_json(document)
        return
    console = stdout()
    for title, rows in (("recipe", recipes), ("held-out loss at step", curves)):
        if rows:
            table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
            for column in (title, *runs):
                table.add_column(column, justify="left" if column == title else "right")
            for row in rows:
                table.add_row(str(row["name"]), *(Text(_shown(value)) for value in row["values"]))
            console.print(table)
            console.print()
    facts = []
    for run, test in zip(opened[1:], tests, strict=True):
        low, high = test.ci95
        real = "real" if low > 0 or high < 0 else "not told apart"
        facts += [
            ("bits per byte", f"{opened[0].path} {test.a:.4f}, {run.path} {test.b:.4f}"),
            ("difference", f"{test.difference:+.4f}  (95 % interval {low:+.4f} to {high:+.4f}, p = {test.p_value:.4f}: {real})"),
            ("paired over", f"{test.pieces:,} {test.kind}"),
        ]
    show_facts(console, facts)


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) and value > 0.01 else f"{value}"


def _named(test: dict[str, Any]) -> dict[str, Any]:
    return {"a_bits_per_byte": test.pop("a"), "b_bits_per_byte": test.pop("b"), **test}


def _recipes(runs: list[Run]) -> list[dict[str, Any]]:
    """The keys in which the recipes differ."""
    from tinylm.recipe.schema import flattened

    flat = [flattened(run.recipe.as_dict()) for run in runs]
    keys = list(dict.fromkeys(key for recipe in flat for key in recipe))
    listed = [{"name": key, "values": [recipe.get(key) for recipe in flat]} for key in keys]
    return [row for row in listed if any(a != b for a, b in pairwise(row["values"]))]


def _curves(runs: list[Run]) -> list[dict[str, Any]]:
    """Held-out losses at the steps where any was measured, at most twelve of them, the last always."""
    losses = [{event["step"]: event.get("val_loss") for event in run.metrics() if event["kind"] == "eval"} for run in runs]
    steps = sorted({step for one in losses for step in one})
    shown = [step for number, step in enumerate(reversed(steps)) if number % max(1, -(-len(steps) // 12)) == 0][::-1]
    return [{"name": step, "values": [one.get(step) for one in losses]} for step in shown]
