"""What every verb shares: where words go, how numbers look, which run is meant."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from tinylm.errors import InputError
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
WEIGHTS = typer.Option("fp32", "--weights", help="fp32, bf16 or int8: int8 reads a quarter of the bytes for each token.")
COMPILE = typer.Option(
    None, "--compile/--no-compile", help="Compile the decoding step: later to start, faster then. Default: on a CPU where it pays."
)
ERRORS = typer.Option("strict", "--errors", help="Bytes that are not UTF-8: strict (an error) or replace.")


class Verbs(TyperGroup):
    """A group of verbs. Without one it shows its help on stderr, as a mistake and not as an answer."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args:
            return super().parse_args(ctx, args)
        with redirect_stdout(sys.stderr):
            return super().parse_args(ctx, args)


class Conversation(Console):
    """stderr. Nobody listening any more (`2>&1 | head`) silences it, and must not end a training."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    def say(self, text: str, style: str) -> None:
        """Text as it is; broken into lines only where a person reads it."""
        self.print(text, style=style, markup=False, soft_wrap=not self.is_terminal)


def stderr() -> Conversation:
    return Conversation(stderr=True, highlight=False)


def stdout() -> Console:
    """For tables. Off a terminal they are as wide as they need to be: a program reads their lines."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 1 << 12
    return console


def show_facts(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Labels and what they say, in two columns; off a terminal each row stays on its line."""
    listed = list(rows)
    if not console.is_terminal:
        width = max(len(label) for label, _ in listed)
        for label, value in listed:
            console.print(f"{label:<{width}}  {value}", markup=False, soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in listed:
        table.add_row(label, Text(value))
    console.print(table)


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

    def __init__(self, console: Conversation, *, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet

    def note(self, text: str) -> None:
        if not self.quiet:
            self.console.say(text, "dim")

    def warn(self, text: str) -> None:
        self.console.say(f"warning: {text}", "yellow")

    @contextmanager
    def progress(self, label: str, total: int | None, unit: str) -> Iterator[Advance]:
        if self.quiet or not self.console.is_terminal or self.console.is_dumb_terminal:
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


def count(value: float, *, space: str = "") -> str:
    """1234567 -> 1.23M; `space` goes before the letter."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{space}{letter}"
    return f"{value:.3g}{space}"


def size(value: float) -> str:
    """Bytes in the units people use."""
    for step, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= step:
            return f"{value / step:.1f} {unit}"
    return f"{value:.0f} B"


def things(number: int, name: str) -> str:
    """1 document, 2,000 documents."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """75 -> 1:15."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def seconds_of(text: str | None) -> float | None:
    """What --stop-after says: 90s, 55m, 2h or plain seconds."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None:
        raise InputError(f"{text!r} is not a time", where="--stop-after", hint="like 90s, 55m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def open_run(path: str | None, console: Conversation, *, quiet: bool) -> Run:
    """The run that --run names, else TINYLM_RUN, else the newest under runs/, which is then said."""
    from tinylm.run import Run

    if path is not None:
        return Run.open(path)
    run = Run.find()
    if not quiet and "TINYLM_RUN" not in os.environ:
        console.say(f"using {run.path}", "dim")
    return run


def out(text: str, *, end: str = "\n") -> None:
    """Text on stdout, exactly as it is."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def checked_text(text: str, option: str) -> str:
    """Text from the command line; bytes in it that are not UTF-8 arrive as surrogates and are refused."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError("is not UTF-8", where=option)
    return text


def checked_weights(value: str) -> Literal["fp32", "bf16", "int8"]:
    kinds: tuple[Literal["fp32", "bf16", "int8"], ...] = ("fp32", "bf16", "int8")
    for kind in kinds:
        if value == kind:
            return kind
    raise InputError(f"must be fp32, bf16 or int8, not {value!r}", where="--weights")


def given(ctx: typer.Context, names: Iterable[str]) -> list[str]:
    """Those of these parameters that stand on the command line, as they are written there."""
    options = {parameter.name: parameter.opts[0] for parameter in ctx.command.params}
    return [
        options[name] for name in names if (source := ctx.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    ]


def checked_errors(value: str) -> str:
    if value not in ("strict", "replace"):
        raise InputError(f"must be strict or replace, not {value!r}", where="--errors")
    return value
