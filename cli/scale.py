"""`tinylm scale`: fit a scaling law to small runs on a text, and predict a larger run."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from .console import (
    DEVICE,
    JSON,
    QUIET,
    SET,
    ConsoleReporter,
    continued_by_same_command,
    format_count,
    format_duration,
    given_options,
    pluralize,
    print_fields,
    print_json,
    stderr_console,
    stdout_console,
)
from .plan import HARDWARE, check_hardware, list_hardware
from .sweep import checked_image

if TYPE_CHECKING:
    from tinylm.scaling.experiment import Check, Result, Row
    from tinylm.scaling.law import Estimate
    from tinylm.sweep.runner import Outcome

app = typer.Typer(add_completion=False)


_LARGE_ERROR = 0.05
"""If the law's loss for one of its runs is off by more than this share, `tinylm scale` prints a warning."""


@app.command()
def scale(
    ctx: typer.Context,
    source: list[str] | None = typer.Argument(None, help="The text: files, folders, globs, URLs or builtin:NAME."),
    minutes_: str = typer.Option(
        "60",
        "--minutes",
        metavar="TIME",
        help="Approximate training time of all runs: a number of minutes, or a duration such as 30m or 2h.",
    ),
    predict_minutes_: str | None = typer.Option(
        None,
        "--predict-minutes",
        metavar="TIME",
        help="Predict a run that trains for this long. Default: a run with 4 times the compute of the largest run in the grid.",
    ),
    check: str | None = typer.Option(
        None,
        "--check",
        metavar="RUN",
        help="Do not train. Compare the loss of this finished run with the prediction of the experiment in --out.",
    ),
    out: str = typer.Option("runs/scale", "--out", help="Folder for the runs and the results."),
    set_: list[str] | None = SET,
    plot: str | None = typer.Option(None, "--plot", metavar="FILE", help="Also plot the runs and the law: .png, .svg or .pdf."),
    seed: int = typer.Option(0, "--seed", min=0, help="Random seed of the bootstrap. For the seed of the runs, use --set seed=N."),
    hardware: str | None = HARDWARE,
    device: str = DEVICE,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Train models of several sizes for several lengths, fit a scaling law, and predict the best size and loss of a larger run.

    Run the same command again to continue an experiment that was stopped. Each model is an ordinary run in the --out folder.
    """
    from tinylm.errors import InputError
    from tinylm.hints import positive_minutes
    from tinylm.scaling import experiment, grid

    if hardware == "list":
        list_hardware(json)
        return
    folder = Path(os.path.expanduser(out))
    if check is not None:
        used = given_options(ctx, ("minutes_", "predict_minutes_", "set_", "plot", "seed", "hardware", "device"))
        if unused := [*(["SOURCE"] if source else []), *used]:
            raise InputError("cannot be combined with --check", where=", ".join(unused), hint="--out selects the experiment")
        _check(folder, check, json=json)
        return
    if not source:
        raise InputError("is required", where="SOURCE", hint="pass a text, or compare a run with --check RUN")
    check_hardware(hardware, None)
    minutes = positive_minutes(minutes_, "--minutes")
    predict_minutes = None if predict_minutes_ is None else positive_minutes(predict_minutes_, "--predict-minutes")
    image = None if plot is None else checked_image(plot)
    console = stderr_console()
    request = grid.Request(tuple(source), minutes, tuple(set_ or ()), hardware)
    opened = grid.open_or_plan(folder, request, reporter=ConsoleReporter(console, quiet=quiet))
    _, base = grid.open_grid(folder)
    if not quiet:
        console.print_line(f"{pluralize(len(opened.cells), 'run')} in {folder}", "dim")
    outcomes: list[Outcome] = []
    with continued_by_same_command():
        for outcome in experiment.sweep(folder, device=device).run(opened.planned):
            outcomes.append(outcome)
            start = f"[{len(outcomes)}/{len(opened.cells)}] {outcome.name}: "
            if outcome.error is not None:
                console.print_line(f"{start}failed: {outcome.error}", "yellow")
            elif not quiet:
                result = outcome.result
                console.print_line(f"{start}loss {result['val_loss']:.4f} ({format_duration(result['seconds'])})", "dim")
    found = experiment.analyze(folder, opened, base, outcomes, predict_minutes=predict_minutes, seed=seed)
    if image is not None:
        from tinylm.scaling.picture import draw

        draw(found, image)
    if json:
        print_json(found.as_dict())
    else:
        _show(found, quiet=quiet)


def _show(found: Result, *, quiet: bool) -> None:
    console, prediction, fitted = stdout_console(), found.prediction, found.fit
    console.print(_table(found))
    rows = [("law", "loss = E + A / N^alpha + B / D^beta")]
    rows += [(name, _interval(fitted.parameter(name), ".4g")) for name in ("E", "A", "alpha", "B", "beta")]
    source = "fitted" if fitted.fits_repetitions else "published value"
    rows.append(("R*", f"{fitted.repetition_scale:g} ({source}; with a larger value, repeated text stays useful for longer)"))
    optimal = prediction.optimal_parameters
    low, high = (format_count(value) for value in optimal.ci95)
    rows += [
        (
            "budget",
            f"{format_count(prediction.flops, space=' ')}FLOP, about {format_duration(prediction.seconds)} at the same speed",
        ),
        ("optimal size", f"N = {format_count(optimal.value)}, 95% interval {low} to {high}"),
        (
            "recipe",
            f"{prediction.n_layer} layers of width {prediction.n_embd} (N = {format_count(prediction.parameters)}), "
            f"{prediction.steps:,} steps, {format_count(prediction.tokens)} tokens",
        ),
        ("predicted loss", _interval(prediction.loss, ".4f")),
        ("bits per byte", _interval(prediction.bits_per_byte, ".4f")),
    ]
    print_fields(console, rows)
    messages = stderr_console()
    left_out = [row for row in found.rows if row.left_out is not None]
    if left_out:
        messages.print_line(f"warning: the law is fitted without {pluralize(len(left_out), 'run')}:", "yellow")
        for row in left_out:
            messages.print_line(f"  {row.cell.training.name}: {row.left_out}", "yellow")
    row, error = found.largest_error
    if abs(error) > _LARGE_ERROR:
        messages.print_line(
            f"warning: the law's loss for {row.cell.training.name} is off by {error:+.0%}, so do not rely on the prediction; "
            "plot that run to see whether it learned",
            "yellow",
        )
    if prediction.overfits:
        messages.print_line(
            "warning: the text is too short for this budget: the larger run may overfit, and its loss may be higher than predicted",
            "yellow",
        )
    if not quiet:
        recipe = shlex.quote(str(found.folder / "predicted.yaml"))
        folder = shlex.quote(str(found.folder))
        messages.print_line(f"next: tinylm train {recipe} --out RUN   tinylm scale --check RUN --out {folder}", "dim")


def _table(found: Result) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("layers", "width", "N", "steps", "D", "epochs", "compute", "loss", "law", "time"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row, document in zip(found.rows, found.as_dict()["rows"], strict=True):
        table.add_row(*_cells(row, document), "" if row.left_out is None else "left out")
    return table


def _cells(row: Row, document: dict[str, object]) -> list[str]:
    cell = row.cell
    return [
        str(cell.n_layer),
        str(cell.n_embd),
        format_count(cell.parameters),
        f"{cell.steps:,}",
        format_count(cell.tokens),
        f"{document['epochs']:.2f}",
        format_count(cell.flops),
        "-" if row.val_loss is None else f"{row.val_loss:.4f}",
        f"{document['fitted_loss']:.4f}",
        "-" if row.seconds is None else format_duration(row.seconds),
    ]


def _interval(estimate: Estimate, form: str) -> str:
    low, high = estimate.ci95
    return f"{estimate.value:{form}}, 95% interval {low:{form}} to {high:{form}}"


def _check(folder: Path, path: str, *, json: bool) -> None:
    from tinylm.run import Run
    from tinylm.scaling import experiment, grid

    grid.open_grid(folder)  # report a wrong --out before a wrong RUN
    checked = experiment.check(folder, Run.open(os.path.expanduser(path)))
    if checked.differing_keys:
        keys = ", ".join(checked.differing_keys)
        message = f"warning: this run differs from those of the experiment in {keys}, so the prediction may not apply"
        stderr_console().print_line(message, "yellow")
    if json:
        print_json(checked.as_dict())
    else:
        print_fields(stdout_console(), _check_rows(checked))


def _check_rows(checked: Check) -> list[tuple[str, str]]:
    inside = "inside" if checked.inside_interval else "outside"
    return [
        ("run", f"{checked.run} (N = {format_count(checked.parameters)}, {format_count(checked.tokens)} tokens)"),
        ("predicted loss", _interval(checked.predicted, ".4f")),
        ("actual loss", f"{checked.val_loss:.4f}, {inside} the interval"),
        ("relative error", f"{checked.relative_error:+.2%}"),
    ]
