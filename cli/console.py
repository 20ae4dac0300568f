"""What every verb shares: where words go, how numbers look, which run is meant."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from tinylm.reporting import Advance, Reporter

if TYPE_CHECKING:
    from tinylm.run import Run

JSON = typer.Option(False, "--json", help="Print one JSON document on stdout.")
QUIET = typer.Option(False, "--quiet", "-q", help="Say nothing on stderr but warnings and errors.")
DEVICE = typer.Option("auto", "--device", help="auto, cpu, cuda or mps.")
THREADS = typer.Option(None, "--threads", min=1, help="CPU threads; default: one per core.")
RUN = typer.Option(None, "--run", "-r", help="A run folder or a checkpoint in it; default: TINYLM_RUN, else the newest in runs/.")
CHECKPOINT = typer.Option(None, "--checkpoint", help="best, last or a step; default: best.")
SET = typer.Option(None, "--set", metavar="SECTION.KEY=VALUE", help="Change a key of the recipe; may be repeated.")
FIELD = typer.Option("text", "--field", help="The field of .jsonl or column of .parquet that holds the text.")
ERRORS = typer.Option("strict", "--errors", help="Bytes that are not UTF-8: strict (an error) or replace.")


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def print_json(document: Any) -> None:
    """One JSON document on stdout; dataclasses as objects, numbers that JSON lacks as null."""
    print(json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


class ConsoleReporter(Reporter):
    """Notes in grey, warnings in yellow, progress bars that disappear when done; plain lines off a terminal."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet

    def note(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, style="dim", markup=False)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False)

    @contextmanager
    def progress(self, label: str, total: int | None, unit: str) -> Iterator[Advance]:
        if self.quiet or not self.console.is_terminal:
            yield lambda done: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(show_speed=True),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(label, total=total, rate="")

            def advance(done: int) -> None:
                speed = bar.tasks[0].speed
                bar.update(task, completed=done, rate=f"{count(speed)}{unit}/s" if speed else "")

            yield advance


def count(value: float) -> str:
    """1234567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """Bytes in the units people use."""
    for step, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= step:
            return f"{value / step:.1f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """75 -> 1:15."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def open_run(path: str | None, console: Console, *, quiet: bool) -> Run:
    """The run that --run names, else TINYLM_RUN, else the newest under runs/, which is then said."""
    from tinylm.run import Run

    if path is not None:
        return Run.open(path)
    run = Run.find()
    if not quiet and "TINYLM_RUN" not in os.environ:
        console.print(f"using {run.path}", style="dim", markup=False)
    return run


def out(text: str, *, end: str = "\n") -> None:
    """Text on stdout, exactly as it is."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def checked_errors(value: str) -> str:
    from tinylm.errors import InputError

    if value not in ("strict", "replace"):
        raise InputError(f"must be strict or replace, not {value!r}", where="--errors")
    return value
