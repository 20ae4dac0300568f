"""Helpers shared by all commands: common options, output to stdout and stderr, number formatting, and argument checks."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from tinylm.errors import InputError
from tinylm.reporting import Advance, Reporter

from . import styles

if TYPE_CHECKING:
    from tinylm.ensemble import Ensemble
    from tinylm.run import Run

JSON = typer.Option(False, "--json", help="Print one JSON document on stdout.")
QUIET = typer.Option(False, "--quiet", "-q", help="Print only warnings and errors on stderr.")
DEVICE = typer.Option("auto", "--device", help="The device: auto, cpu, cuda or mps.")
THREADS = typer.Option(None, "--threads", min=1, help="Number of CPU threads. Default: one per core.")
RUN = typer.Option(
    None, "--run", "-r", help="A run folder or a checkpoint folder. Default: $TINYLM_RUN, or the newest run in runs/."
)
RUNS = typer.Option(
    None,
    "--run",
    "-r",
    help="A run folder or a checkpoint folder. If repeated, the models form an ensemble, which predicts their mean probabilities. "
    "Default: $TINYLM_RUN, or the newest run in runs/.",
)
_DEFAULT_CHECKPOINT = "Default: the checkpoint in --run, or best, or the newest if the run has not been evaluated yet."
CHECKPOINTS = typer.Option(
    None,
    "--checkpoint",
    help=f"The checkpoint: best, last or a step. If repeated, the checkpoints form an ensemble. {_DEFAULT_CHECKPOINT}",
)
CHECKPOINT = typer.Option(None, "--checkpoint", help=f"The checkpoint: best, last or a step. {_DEFAULT_CHECKPOINT}")
SET = typer.Option(None, "--set", metavar="SECTION.KEY=VALUE", help="Set a recipe key. Can be repeated.")
FIELD = typer.Option("text", "--field", help="The field of .jsonl files, or the column of tables, that contains the text.")
TEMPLATE = typer.Option(
    None, "--template", metavar="TEXT", help="Instead of --field: combine several fields, for example '{title}: {body}'."
)
WEIGHTS = typer.Option(
    "fp32", "--weights", help="Weight format: fp32, bf16 or int8. int8 weights take a quarter of the memory of fp32."
)
DECODING_WEIGHTS = typer.Option(
    None,
    "--weights",
    help="Weight format: fp32, bf16 or, on a CPU, int8. Default on a CPU: fp32, but with weights rounded to bf16 if compiled "
    "decoding supports the model. Default on a GPU: bf16 for transformers if the GPU supports it, else fp32.",
)
COMPILE = typer.Option(
    None,
    "--compile/--no-compile",
    help="Compile the decoding step, or use CUDA graphs on a GPU: slower to start, then faster. Default: only if it saves time.",
)
SPLIT = typer.Option(
    "heldout",
    "--split",
    help="Split of the run's own data: heldout, or test (data.test), which training never uses to choose a checkpoint.",
)
ERRORS = typer.Option(
    "strict", "--errors", help="How to handle bytes that are not UTF-8: strict (report an error) or replace (with U+FFFD)."
)


class CommandGroup(TyperGroup):
    """A command group. Without a command, it prints its help to stderr, because stdout is for results."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args:
            return super().parse_args(ctx, args)
        with redirect_stdout(sys.stderr):
            return super().parse_args(ctx, args)


class StderrConsole(Console):
    """A console on stderr. If stderr is closed (for example by `2>&1 | head`), it discards its output instead of failing."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    def print_line(self, text: str, style: str) -> None:
        """Print text verbatim. Wrap it only on a terminal."""
        self.print(text, style=style, markup=False, soft_wrap=not self.is_terminal)


def stderr_console() -> StderrConsole:
    return StderrConsole(stderr=True, highlight=False)


def stdout_console() -> Console:
    """Return a console for tables on stdout. Rows are wrapped only on a terminal, so that programs can read the output."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 1 << 12
    return console


def print_columns(rows: Iterable[Sequence[str]]) -> None:
    """Print rows on stdout as aligned columns, without borders, headings or trailing spaces, for programs to read."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        write_stdout("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_fields(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Print labels and values in two columns. Rows are wrapped only on a terminal."""
    rows = list(rows)
    if not console.is_terminal:
        width = max(len(label) for label, _ in rows)
        for label, value in rows:
            console.print(f"{label:<{width}}  {value}", markup=False, soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, Text(value))
    console.print(table)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout. Dataclasses become objects, and non-finite numbers become null."""
    print(json.dumps(_to_json(document), indent=2, ensure_ascii=False, allow_nan=False))


def _to_json(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _to_json(asdict(value))
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


@contextmanager
def no_echo_of_control_keys() -> Iterator[None]:
    """Keep the terminal from printing `^C` when Ctrl-C is pressed, which would shift a live panel by a line."""
    try:
        import termios

        stdin = sys.stdin.fileno()
        before = termios.tcgetattr(stdin)
    except (ImportError, OSError, ValueError, AttributeError, termios.error):  # Windows, or stdin is not a terminal
        yield
        return
    changed = [*before]
    changed[3] &= ~termios.ECHOCTL
    try:
        termios.tcsetattr(stdin, termios.TCSANOW, changed)
        yield
    finally:
        termios.tcsetattr(stdin, termios.TCSANOW, before)


class ConsoleReporter(Reporter):
    """Prints notes in gray, warnings in orange and, on a terminal, progress bars that disappear when they are complete."""

    def __init__(self, console: StderrConsole, *, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet

    def note(self, text: str) -> None:
        if not self.quiet:
            self.console.print_line(text, "dim")

    def warn(self, text: str) -> None:
        self.console.print_line(f"warning: {text}", styles.WARNING)

    @contextmanager
    def progress(self, label: str, total: int | None, unit: str) -> Iterator[Advance]:
        if self.quiet or not self.console.is_terminal or self.console.is_dumb_terminal:
            yield lambda completed: None
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

            def advance(completed: int) -> None:
                speed = bar.tasks[0].speed
                bar.update(task, completed=completed, rate=f"{format_count(speed)}{unit}/s" if speed else "")

            yield advance


def format_count(value: float, *, space: str = "") -> str:
    """Format 1234567 as 1.23M. `space` is inserted between the number and the letter."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{space}{letter}"
    return f"{value:.3g}{space}"


def format_size(value: float) -> str:
    """Format 1536 as 1.5 KiB."""
    for step, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= step:
            return f"{value / step:.1f} {unit}"
    return f"{value:.0f} B"


def pluralize(number: int, name: str) -> str:
    """Format a number with its noun: 1 document, 2,000 documents."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def format_duration(seconds: float) -> str:
    """Format 75 seconds as 1:15."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def format_step_time(seconds: float) -> str:
    """Return a time such as `21.9 ms` or `1.05 s`."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def parse_duration(text: str | None, option: str = "--stop-after") -> float | None:
    """Convert the value of `option` (90s, 55m, 2h, or a number of seconds) to seconds."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None:
        raise InputError(f"{text!r} is not a duration", where=option, hint="for example 90s, 55m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


@contextmanager
def continued_by_same_command() -> Iterator[None]:
    """If Ctrl-C or SIGTERM stops the command, print that the same command continues the work."""
    try:
        yield
    except KeyboardInterrupt:
        code = 130
    except SystemExit as exit_request:
        if exit_request.code != 128 + signal.SIGTERM:
            raise
        code = 128 + signal.SIGTERM
    else:
        return
    stderr_console().print_line("stopped; run the same command again to continue", "dim")
    raise SystemExit(code)


def open_run(path: str | None, console: StderrConsole, *, quiet: bool) -> Run:
    """Open the run from --run or $TINYLM_RUN. If neither is set, open the newest run in runs/ and print its path to stderr."""
    from tinylm.run import Run

    if path is not None:
        return Run.open(path)
    run = Run.find()
    if not quiet and "TINYLM_RUN" not in os.environ:
        console.print_line(f"using {run.path}", "dim")
    return run


def open_ensemble(
    paths: Sequence[str] | None, checkpoints: Sequence[str] | None, console: StderrConsole, *, quiet: bool
) -> Ensemble:
    """Open the model from --run and --checkpoint. With several runs or checkpoints, it is an ensemble.

    The default run is the same as for `open_run`.
    """
    from tinylm.ensemble import Ensemble
    from tinylm.run import Run

    runs = [Run.open(path) for path in paths] if paths else [open_run(None, console, quiet=quiet)]
    return Ensemble.of(runs, checkpoints or ())


def write_stdout(text: str, *, end: str = "\n") -> None:
    """Write text to stdout verbatim and flush it."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def escaped(text: str) -> str:
    """Escape tabs, line breaks and other non-printable characters, so that the text fits into one cell of a table."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def checked_text(text: str, option: str) -> str:
    """Return a text from the command line. Raises `InputError` if it is not UTF-8 (Python decodes other bytes to surrogates)."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError("not UTF-8", where=option)
    return text


def checked_split(value: str) -> None:
    """Raise `InputError` for an unknown value of --split."""
    if value not in ("heldout", "test"):
        raise InputError(f"must be heldout or test, not {value!r}", where="--split")


def checked_weights(value: str) -> Literal["fp32", "bf16", "int8"]:
    """Return the value of --weights. Raises `InputError` for an unknown format."""
    kinds: tuple[Literal["fp32", "bf16", "int8"], ...] = ("fp32", "bf16", "int8")
    for kind in kinds:
        if value == kind:
            return kind
    raise InputError(f"must be fp32, bf16 or int8, not {value!r}", where="--weights")


def given_options(ctx: typer.Context, names: Iterable[str]) -> list[str]:
    """Return the parameters in `names` that were set on the command line, formatted as `--option`."""
    options = {parameter.name: parameter.opts[0] for parameter in ctx.command.params}
    return [
        options[name] for name in names if (source := ctx.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    ]


def checked_errors(value: str) -> str:
    """Return the value of --errors. Raises `InputError` for an unknown value."""
    if value not in ("strict", "replace"):
        raise InputError(f"must be strict or replace, not {value!r}", where="--errors")
    return value


def checked_output_file(path: str, overwrite: bool) -> Path:
    """Return the path of an output file. Raises `InputError` for a folder, or for an existing file unless `overwrite` is true."""
    file = Path(path)
    if file.is_dir():
        raise InputError("is a folder", where=path, hint="pass the path of a file")
    if file.exists() and not overwrite:
        raise InputError("the file already exists", where=path, hint="--overwrite replaces it")
    return file
