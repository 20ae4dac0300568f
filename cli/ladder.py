"""`tinylm ladder`: train one model of each generation on the same text and compare them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from tinylm.recipe.shipped import shipped_recipes

from .console import (
    DEVICE,
    JSON,
    QUIET,
    SET,
    ConsoleReporter,
    continued_by_same_command,
    format_count,
    format_duration,
    print_json,
    stderr_console,
    stdout_console,
)
from .sweep import checked_image

if TYPE_CHECKING:
    from tinylm.ladder import Row

app = typer.Typer(add_completion=False)


@app.command()
def ladder(
    source: list[str] = typer.Argument(..., help="The text: files, folders, globs, URLs or builtin:NAME."),
    minutes_: str = typer.Option(
        "10",
        "--minutes",
        metavar="TIME",
        help="Total training time for all models: a number of minutes, or a duration such as 90s, 5m or 2h.",
    ),
    equal: str = typer.Option(
        "time",
        "--equal",
        help="time: all networks have the same training time. parameters: they also have about as many parameters as the GPT.",
    ),
    models: str | None = typer.Option(
        None,
        "--models",
        metavar="A,B,C",
        help="Comma-separated subset of ngram, window, rnn, lstm, gru and gpt. Default: all except gru.",
    ),
    set_: list[str] | None = SET,
    seed: int | None = typer.Option(None, "--seed", min=0, help="Random seed. Default: the seed in each recipe."),
    out: str = typer.Option("runs/ladder", "--out", help="Folder for the runs."),
    plot: str | None = typer.Option(None, "--plot", metavar="FILE", help="Also plot the results: .png, .svg or .pdf."),
    device: str = DEVICE,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Train an n-gram model, a window network, an RNN, an LSTM and a GPT on the same text, and compare them.

    Run the same command again to resume an interrupted ladder. Each model is saved as an ordinary run in the --out folder.
    """
    from tinylm.errors import InputError
    from tinylm.hints import positive_minutes

    minutes = positive_minutes(minutes_, "--minutes")
    if equal not in ("time", "parameters"):
        raise InputError(f"must be time or parameters, not {equal!r}", where="--equal")
    image = None if plot is None else checked_image(plot)

    from tinylm.ladder import DEFAULT_RUNGS, LadderPlan, as_dict, draw, find_rungs, run_ladder

    names = DEFAULT_RUNGS if models is None else [name.strip() for name in models.split(",")]
    overrides = [*(set_ or ()), *([f"seed={seed}"] if seed is not None else [])]
    plan = LadderPlan(
        folder=Path(out),
        source=tuple(source),
        recipes=shipped_recipes(),
        rungs=find_rungs(names),
        minutes=minutes,
        equal="parameters" if equal == "parameters" else "time",
        overrides=overrides,
        device=device,
    )
    console, rows = stderr_console(), []
    with continued_by_same_command():
        for row in run_ladder(plan, ConsoleReporter(console, quiet=quiet)):
            rows.append(row)
            if not quiet:
                done = f"[{len(rows)}/{len(plan.rungs)}] {row.model}: {row.bits_per_byte:.4f} bits per byte"
                console.print_line(f"{done} ({format_duration(row.seconds)})", "dim")
    if image is not None:
        draw(rows, image)
    if json:
        print_json(as_dict(plan, rows))
        return
    stdout_console().print(_table(rows))


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("model", "year", "parameters", "time", "bits per byte", "95% interval"):
        table.add_column(column, justify="left" if column == "model" else "right")
    table.add_column("sample", no_wrap=True, overflow="ellipsis")
    for row in rows:
        low, high = row.bits_per_byte_ci95
        table.add_row(
            row.model,
            str(row.year),
            format_count(row.parameters),
            format_duration(row.seconds),
            f"{row.bits_per_byte:.4f}",
            "-" if math.isnan(low) else f"{low:.4f} to {high:.4f}",
            Text(row.sample),
        )
    return table
