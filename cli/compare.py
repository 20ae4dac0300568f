"""`tinylm compare`: compare the recipes and held-out results of runs, and test whether their models differ significantly.

Each argument is a run, or an ensemble of several runs, written as `RUN+RUN`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinylm.data.split_text import PART_NAMES
from tinylm.data.training_text import WARN_ABOVE, largest_share, percent
from tinylm.ensemble import Ensemble
from tinylm.errors import InputError
from tinylm.evaluation.curves import comparable_metric
from tinylm.evaluation.metrics import Metric
from tinylm.recipe.notation import yaml_value

from . import compare_scores
from .compare_scores import ScoreComparison
from .console import (
    DEVICE,
    ERRORS,
    FIELD,
    JSON,
    QUIET,
    SPLIT,
    TEMPLATE,
    THREADS,
    ConsoleReporter,
    checked_errors,
    checked_split,
    given_options,
    print_json,
    stderr_console,
    stdout_console,
)

if TYPE_CHECKING:
    from tinylm.evaluation.comparison import Comparison, ModelTest

_UNUSED_OPTIONS = {
    "translation": ("field", "template", "errors", "stride"),
    "classification": ("field", "template", "errors", "stride"),
    "masked_lm": ("stride",),
}
"""The options that have no effect on models that are not language models, by objective."""
_DIFFERENT_TEXTS = "the runs have different held-out texts"
app = typer.Typer(add_completion=False)


@app.command()
def compare(
    ctx: typer.Context,
    runs: list[str] = typer.Argument(..., metavar="RUN RUN...", help="Run folders. RUN+RUN is an ensemble of several runs."),
    on: list[str] | None = typer.Option(
        None,
        "--on",
        metavar="SOURCE",
        help="The text for the comparison. Default: the held-out or test text, if it is the same for all runs.",
    ),
    split: str = SPLIT,
    stride: int | None = typer.Option(None, "--stride", help="Number of tokens between window starts, as in `tinylm eval`."),
    field: str = FIELD,
    template: str | None = TEMPLATE,
    errors: str = ERRORS,
    device: str = DEVICE,
    threads: int | None = THREADS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Compare the first run with each of the others: recipes, held-out results during training, and losses on the same text.

    RUN+RUN compares an ensemble, which predicts the mean of the runs' probabilities.

    The test shows whether the trained models differ on this text. To compare recipes, train each with two or more seeds: runs that
    differ only in the seed are grouped, and their means are compared.
    """
    checked_errors(errors)
    if len(runs) < 2:
        raise InputError("at least two runs are required", where="RUN")
    if not on and (unused := given_options(ctx, ("field", "template", "errors"))):
        raise InputError("requires --on", where=", ".join(unused))
    if on and given_options(ctx, ("split",)):
        raise InputError("mutually exclusive: compare on a split of the runs' own text or on another text", where="--split, --on")
    checked_split(split)
    opened = [Ensemble.open(name) for name in runs]  # reports a missing checkpoint before torch is imported
    every_run = [run for model in opened for run in model.runs]
    metric = comparable_metric(every_run)
    recipes, curves = _recipe_differences(opened), _curves(opened, metric)

    objectives = {run.recipe.objective.name for run in every_run}
    objective = min(objectives) if len(objectives) == 1 else ""
    if unused := given_options(ctx, _UNUSED_OPTIONS.get(objective, ())):
        raise InputError(f"has no effect on models trained with the {objective} objective", where=", ".join(unused))

    from tinylm.device import set_threads

    set_threads(threads)
    reporter = ConsoleReporter(stderr_console(), quiet=quiet)
    document: dict[str, Any] = {
        "runs": [model.name for model in opened],
        "recipes": recipes,
        "curves": curves,
        "curve_metric": metric.name,
    }

    def print_tables() -> Console:
        console = stdout_console()
        _print_table(console, "recipe", runs, recipes, yaml_value)
        _print_table(console, f"{metric.heading} at step{metric.direction}", runs, curves, metric.formatted)
        return console

    if objective == "translation":
        from . import compare_translators

        if not json:
            print_tables()
        compare_translators.compare(every_run, on or [], split, document, device=device, json=json, quiet=quiet)
        return

    from tinylm.evaluation.comparison import compare_runs, share_text
    from tinylm.evaluation.evaluate_run import TextFormat

    text_format = TextFormat(field, template, errors)
    text = ", ".join(on) if on else f"the {PART_NAMES[split]}"
    document |= {"text": text, "split": None if on else split}
    comparison: Comparison | ScoreComparison | None = None
    not_tested = None
    if not objective and objectives & {*_UNUSED_OPTIONS}:
        not_tested = "the runs have different objectives"
    elif not on and not share_text(every_run, split):
        not_tested = _DIFFERENT_TEXTS
    elif objective in compare_scores.METRICS:
        comparison, not_tested = compare_scores.compare(
            opened, on or (), split=split, text_format=text_format, device=device, reporter=reporter
        )
    else:
        comparison = compare_runs(
            opened, on or (), split=split, stride=stride, text_format=text_format, device=device, reporter=reporter
        )
    if comparison is None:  # before the tables, so that it is read first
        hint = ": choose a text with --on" if not_tested == _DIFFERENT_TEXTS else ""
        reporter.warn(f"{not_tested}, so their results are not comparable{hint}")
    if json:
        print_json(document | ({"tests": [], "not_tested": not_tested} if comparison is None else comparison.as_dict()))
    else:
        console = print_tables()
        if isinstance(comparison, ScoreComparison):
            comparison.print(console, text)
        elif comparison is not None:
            _print_comparison(console, comparison, text)
    if comparison is not None and not isinstance(comparison, ScoreComparison):
        leaks = [run.path for run in comparison.runs if (largest_share(run.overlaps) or 0) > WARN_ABOVE]
        if leaks:
            reporter.warn(f"much of the text also occurs in the training text of {', '.join(leaks)}: see the 'overlap' column")


def _print_comparison(console: Console, comparison: Comparison, text: str) -> None:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("bits per byte")
    table.add_column("vs. first run", justify="right")
    table.add_column("95% interval", justify="right")
    table.add_column("p", justify="right")
    table.add_column("overlap", justify="right")
    table.add_column(f"model, on {text}")
    for run, test in zip(comparison.runs, [None, *comparison.model_tests], strict=True):
        cells = ["", "", ""]
        if test is not None:
            low, high = test.result.simultaneous_ci95
            cells = [f"{-test.result.difference:+.4f}", f"{-high:+.4f} to {-low:+.4f}", f"{test.p_corrected:.4f}"]
        share = largest_share(run.overlaps)
        overlap = "unknown" if share is None else percent(share)
        table.add_row(f"{run.bits_per_byte:.4f}", *cells, overlap, Text(f"{run.path} {run.checkpoint}"))
    console.print(table)
    console.print()
    for test in comparison.model_tests:
        console.print(Text(_model_verdict(test)), soft_wrap=True)
    result, count = comparison.model_tests[0].result, len(comparison.model_tests)
    corrected = f", corrected for {count} comparisons" if count > 1 else ""
    console.print(
        Text(
            f"Tested: whether these trained models differ on this text ({result.pieces:,} {result.kind}; paired permutation "
            f"test{corrected}). A different seed also changes the model, so this test does not compare recipes."
        ),
        style="dim",
        soft_wrap=True,
    )
    _print_recipes(console, comparison)


def _model_verdict(test: ModelTest) -> str:
    a, b, better = test.a, test.b, test.better
    if test.same_recipe:
        size = abs(test.result.difference)
        return f"{a.path} and {b.path} differ only in the seed: their difference of {size:.4f} is due to random variation."
    if better is None:
        return f"{a.path} and {b.path} do not differ significantly on this text."
    worse = b if better is a else a
    return f"{better.path} predicts this text better than {worse.path}."


def _print_recipes(console: Console, comparison: Comparison) -> None:
    """Print each recipe's mean and standard deviation over seeds, and the tests between recipes."""
    if all(recipe.deviation is None for recipe in comparison.recipes):
        return
    console.print()
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("mean bits per byte", "standard deviation", "seeds"):
        table.add_column(title, justify="right")
    table.add_column("recipe")
    for recipe in comparison.recipes:
        deviation = "" if recipe.deviation is None else f"{recipe.deviation:.4f}"
        table.add_row(f"{recipe.mean:.4f}", deviation, str(len(recipe.runs)), Text(recipe.name))
    console.print(table)
    console.print()
    for test in comparison.recipe_tests:
        low, high = test.result.ci95
        seeds = f"{len(test.a.runs)} and {len(test.b.runs)} seeds"
        interval = f"95% interval {low:+.4f} to {high:+.4f}, p = {test.p_corrected:.4f}"
        facts = f"{seeds}, difference {test.result.difference:+.4f}, {interval}"
        if test.better is None:
            verdict = f"The recipes of {test.a.name} and {test.b.name} do not differ significantly"
        else:
            worse = test.b if test.better is test.a else test.a
            verdict = f"The recipe of {test.better.name} is better than that of {worse.name}"
        console.print(Text(f"{verdict} ({facts})."), soft_wrap=True)
    if comparison.recipe_tests:
        console.print(Text("Tested: whether the means over seeds differ (Welch's t-test)."), style="dim", soft_wrap=True)


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


def _recipe_differences(models: list[Ensemble]) -> list[dict[str, Any]]:
    """Return the recipe keys whose values differ, with the value in each run.

    For an ensemble, it is the value that all members have in common, or else a list with each member's value.
    """
    from tinylm.recipe.schema import flattened

    flat = [[flattened(run.recipe.as_dict()) for run in model.runs] for model in models]
    keys = list(dict.fromkeys(key for model in flat for recipe in model for key in recipe))

    def value(model: list[dict[str, Any]], key: str) -> Any:
        values = [recipe.get(key) for recipe in model]
        return values[0] if all(a == b for a, b in pairwise(values)) else values

    listed = [{"name": key, "values": [value(model, key) for model in flat]} for key in keys]
    return [row for row in listed if any(a != b for a, b in pairwise(row["values"]))]


def _curves(models: list[Ensemble], metric: Metric) -> list[dict[str, Any]]:
    """Return each run's metric at up to twelve steps at which at least one run was evaluated. An ensemble has no values."""
    curves = [
        {event["step"]: event.get(metric.key) for event in model.runs[0].metrics() if event["kind"] == "eval"}
        if model.is_single
        else {}
        for model in models
    ]
    steps = sorted({step for curve in curves for step in curve})
    shown = [step for number, step in enumerate(reversed(steps)) if number % max(1, -(-len(steps) // 12)) == 0][::-1]
    return [{"name": step, "values": [curve.get(step) for curve in curves]} for step in shown]
