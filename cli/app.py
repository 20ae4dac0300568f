"""`tinylm`: the verbs, loaded only when used, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import traceback
from types import FrameType, TracebackType
from typing import Any

import typer
from typer.core import TyperCommand

import tinylm
from tinylm.errors import InputError, TinylmError, did_you_mean

from .console import Verbs

VERBS = {
    "train": ("Train", "Train a model from a recipe."),
    "new": ("Train", "Write a recipe for a text, this machine and so many minutes."),
    "plan": ("Train", "What a recipe will cost: parameters, memory, time."),
    "recipes": ("Train", "The recipes that ship with tinylm."),
    "sample": ("Use", "Write text with a trained model."),
    "eval": ("Use", "Measure a model on a text: perplexity, bits per byte."),
    "compare": ("Use", "Compare runs: recipes, losses, and whether the difference is real."),
    "serve": ("Use", "A model behind an OpenAI-compatible address and a page to play with."),
    "export": ("Share", "A model for Hugging Face, llama.cpp or ONNX, proven to be the same."),
    "import": ("Share", "A run of other people's weights: GPT-2 and Llama folders."),
    "runs": ("Use", "The runs here, with their numbers."),
    "plot": ("Use", "Loss curves of runs as a picture."),
    "tokenize": ("Text", "Train, apply and judge tokenizers."),
    "embed": ("Text", "Learn, ask, judge and reuse embeddings."),
}
_MODULES = {"eval": "evaluate", "import": "import_"}
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Every complaint of typer about a command line; the class itself has no public name."""


class LazyVerbs(Verbs):
    """Knows the verbs' names and one line of help each; imports a verb's module only to run it."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        panel, line = VERBS[cmd_name]
        return TyperCommand(cmd_name, help=line, short_help=line, rich_help_panel=panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in VERBS and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise InputError(f"no such verb {args[0]!r}", hint=did_you_mean(args[0], VERBS) or "`tinylm --help` lists them")
        name, command, rest = super().resolve_command(ctx, args)
        if name in VERBS:
            module = importlib.import_module(f".{_MODULES.get(name, name)}", __package__)
            command = typer.main.get_command(module.app)
            command.name = name
        return name, command, rest


app = typer.Typer(
    cls=LazyVerbs,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tinylm {tinylm.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and exit."),
) -> None:
    """Turn any text into a small language model whose every number can be trusted.

    Start with [bold]tinylm train quickstart[/bold].
    """


def main() -> None:
    """The console script. Exit codes: 0 done, 1 the work failed, 2 the input was wrong, 130/143 stopped by a signal."""
    debugging = os.environ.get("TINYLM_DEBUG") == "1"
    if not debugging:
        sys.excepthook = _report_bug
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text goes out as it came in, file names with odd bytes too
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        code = typer.main.get_command(app)(standalone_mode=False)
        sys.stdout.flush()
    except (TinylmError, _UsageError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            code = _reader_has_gone()
        elif debugging:
            raise
        else:
            code = _complain(error)
    except SystemExit as ending:  # how typer and rich end when a write finds the reader gone
        code = _reader_has_gone() if isinstance(ending.__context__, BrokenPipeError) else ending.code
    else:
        if code == 130:  # Ctrl-C, as typer reports it
            print("stopped", file=sys.stderr)
    sys.exit(code)


def _complain(error: Exception) -> int:
    """One line about what is wrong; the exit code."""
    if isinstance(error, TinylmError):
        message, code = str(error), error.exit_code
    elif isinstance(error, OSError):  # a full disk, a folder that may not be written
        where = f"{error.filename}: " if error.filename else ""
        message, code = f"{where}{error.strerror or error}", 1
    else:
        message, code = _usage(error), 2
    if message:
        print(f"error: {message}", file=sys.stderr)
    return code


def _usage(error: Any) -> str:
    """A wrong command line in one sentence, with the command whose help explains it. Empty when the help was just shown."""
    message: str = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    if not message:
        return ""
    hint = f" (`{context.command_path} --help` explains)" if context is not None else ""
    return f"{message[0].lower()}{message[1:]}{hint}"


def _reader_has_gone() -> int:
    """Whoever read our output has seen enough, as `| head` has: not a failure. What is still buffered goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends the program as an exception, so that temporary files are removed. A training replaces this while it runs."""
    sys.exit(128 + number)


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What no one foresaw, in one line: where it happened, and how to see more."""
    place = traceback.extract_tb(trace)[-1] if trace else None
    where = f" at {os.path.basename(place.filename)}:{place.lineno}" if place else ""
    what = " ".join(f"{kind.__name__}: {error}".split())
    print(f"error: {what}{where} (a mistake in tinylm: TINYLM_DEBUG=1 shows the traceback to report)", file=sys.stderr)


if __name__ == "__main__":
    main()
