"""The `tinylm` command. It imports only the subcommand that runs, and turns errors into messages and exit codes."""

from __future__ import annotations

import importlib
import io
import os
import re
import signal
import sys
import traceback
import warnings
from types import FrameType, TracebackType
from typing import Any

import typer
from typer.core import TyperCommand

import tinylm
from tinylm import hints
from tinylm.errors import InputError, TinylmError, TinylmWarning, WorkError, is_out_of_memory

from .console import CommandGroup

COMMANDS = {
    "train": ("Train", "Train a model from a recipe."),
    "new": ("Train", "Write a recipe for a text, this machine and a time limit."),
    "plan": ("Train", "Predict the cost of a recipe: parameters, memory and time."),
    "recipes": ("Train", "List the recipes that ship with tinylm, or print one."),
    "sample": ("Use", "Generate text with a trained model."),
    "translate": ("Use", "Translate text line by line."),
    "eval": ("Use", "Evaluate a model on a text: perplexity and bits per byte."),
    "explain": ("Use", "Explain a model step by step, from characters to a gradient step."),
    "fill": ("Use", "Predict the masked tokens in a text."),
    "chat": ("Use", "Talk to a model that was fine-tuned on conversations."),
    "classify": ("Use", "Classify texts with a trained classifier."),
    "inspect": ("Use", "Look inside a model: attention, logit lens, and contributions to a prediction."),
    "compare": ("Use", "Compare the recipes and losses of runs, and test whether the differences are significant."),
    "serve": ("Use", "Serve a model over HTTP: an OpenAI-compatible API and a web page."),
    "export": ("Share", "Export a model to Hugging Face, llama.cpp or ONNX and verify it."),
    "import": ("Share", "Import a Hugging Face model, a nanoGPT checkpoint or an ARPA file as a run."),
    "sweep": ("Train", "Train a recipe with many settings and compare the results."),
    "scale": ("Train", "Fit a scaling law to small runs on a text, and predict a larger run."),
    "ladder": ("Train", "Train an n-gram model, older networks and a GPT on the same text and compare them."),
    "runs": ("Use", "List runs with their steps and held-out metrics."),
    "plot": ("Use", "Plot the training curves of runs."),
    "data": ("Text", "Show training examples, and which of their tokens are training targets."),
    "prepare": ("Text", "Clean, filter and deduplicate a large text, and encode it for training."),
    "tokenize": ("Text", "Train, apply and evaluate tokenizers."),
    "embed": ("Text", "Train, query, evaluate and convert embeddings."),
}
"""The help panel and the help text of each command."""
_MODULES = {"eval": "evaluate", "import": "import_"}
"""Module names that differ from the command name."""
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""The base class of Typer's errors for an invalid command line, which has no public name."""


class LazyCommands(CommandGroup):
    """A command group that lists the commands in `COMMANDS` and imports a command's module only when the command runs."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        panel, help_text = COMMANDS[cmd_name]
        return TyperCommand(cmd_name, help=help_text, short_help=help_text, rich_help_panel=panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            hint = hints.command(args[0], COMMANDS) or "`tinylm --help` lists the commands"
            raise InputError(f"no such command {args[0]!r}", hint=hint)
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            command = load_command(name)
            command.name = name
        return name, command, rest


def load_command(name: str) -> Any:
    """Import a command's module and return its Click command."""
    module = importlib.import_module(f".{_MODULES.get(name, name)}", __package__)
    return typer.main.get_command(module.app)


app = typer.Typer(
    cls=LazyCommands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"tinylm {tinylm.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
) -> None:
    """Train small language models on any text, with measurements you can trust.

    Start with [bold]tinylm train quickstart[/bold].
    """


def _replace_closed_streams() -> None:
    """Discard output to stdout or stderr if the stream was already closed when the process started (`>&-`)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  closed when the process ends


def main() -> None:
    """The console script. Exit codes: 0 success, 1 failure, 2 invalid input, 130 or 143 stopped by a signal."""
    _replace_closed_streams()
    _use_utf8()
    debugging = os.environ.get("TINYLM_DEBUG") == "1"
    if not debugging:
        sys.excepthook = _report_bug
        os.environ["RUST_BACKTRACE"] = "0"  # errors from `tokenizers` are reported on one line, like all others
    signal.signal(signal.SIGTERM, _terminate)
    show_other_warning = warnings.showwarning

    def show_warning(message: Warning | str, category: type[Warning], *details: Any, **options: Any) -> None:
        if issubclass(category, TinylmWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            show_other_warning(message, category, *details, **options)

    warnings.showwarning = show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names can contain invalid UTF-8: print such bytes unchanged
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        code = typer.main.get_command(app)(standalone_mode=False)
        sys.stdout.flush()
    except (TinylmError, _UsageError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            code = _on_closed_stdout()
        elif debugging:
            raise
        else:
            code = _print_error(error)
    except (MemoryError, RuntimeError) as error:
        if debugging or not is_out_of_memory(error):
            raise
        hint = "free memory, raise the memory limit, or choose smaller sizes"
        code = _print_error(WorkError(f"out of memory: {' '.join(str(error).split()) or 'an allocation failed'}", hint=hint))
    except SystemExit as exit_request:  # typer and rich raise this from a BrokenPipeError if stdout is closed
        code = _on_closed_stdout() if isinstance(exit_request.__context__, BrokenPipeError) else exit_request.code
    else:
        if code == 130:  # typer returns 130 after Ctrl-C
            print("stopped", file=sys.stderr)
    sys.exit(code)


def _use_utf8() -> None:
    """Restart Python in UTF-8 mode if the locale uses another encoding, so that arguments, file names and stdin are UTF-8."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _print_error(error: Exception) -> int:
    """Print a one-line message and return the exit code."""
    if isinstance(error, TinylmError):
        message, code = str(error), error.exit_code
    elif isinstance(error, OSError):  # for example a full disk or a read-only folder
        where = f"{error.filename}: " if error.filename else ""
        message, code = f"{where}{error.strerror or error}", 1
    else:
        message, code = _usage_message(error), 2
    if message:
        print(f"error: {message}", file=sys.stderr)
    return code


_VALUE_MESSAGES = {
    r"Input should be greater than or equal to (\S+)": r"must be at least \1",
    r"Input should be less than or equal to (\S+)": r"must be at most \1",
    r"Input should be a valid integer\b.*": "must be an integer",
    r"Input should be a valid number\b.*": "must be a number",
}
"""How messages about the value of an option are reworded, by their pattern."""


def _usage_message(error: Any) -> str:
    """Return the message for an invalid command line, with a hint, or "" if Typer already printed the help."""
    message: str = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    if not message:
        return ""
    help_hint = "" if context is None else f"see `{context.command_path} --help`"
    hint = _usage_hint(error, context)
    if hint is not None:
        message = message.partition(" (Possible options")[0].partition(" Did you mean")[0].rstrip(".")
    for theirs, ours in _VALUE_MESSAGES.items():
        message = re.sub(theirs, ours, message)
    listed = "; ".join(part for part in (hint, help_hint) if part)
    return f"{message[0].lower()}{message[1:]}" + (f" ({listed})" if listed else "")


def _usage_hint(error: Any, context: Any) -> str | None:
    """Return a hint about what the user probably meant by an unknown option or an extra argument."""
    if context is None:
        return None
    if (name := getattr(error, "option_name", None)) is not None and "no such option" in error.format_message().lower():
        return hints.option(name, [option for parameter in context.command.params for option in parameter.opts])
    if "extra argument" in error.format_message():
        return hints.ARGUMENTS.get(context.command.name)
    return None


def _on_closed_stdout() -> int:
    """Discard the buffered output and return exit code 0: a closed stdout, for example with `| head`, is not a failure."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _terminate(number: int, frame: FrameType | None) -> None:
    """Raise SystemExit on SIGTERM, so that temporary files are removed. Training installs its own handler."""
    sys.exit(128 + number)


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an unexpected exception on one line, with its location and how to get the traceback."""
    frame = traceback.extract_tb(trace)[-1] if trace else None
    where = f" at {os.path.basename(frame.filename)}:{frame.lineno}" if frame else ""
    message = " ".join(f"{kind.__name__}: {error}".split())
    print(f"error: {message}{where} (a bug in tinylm: set TINYLM_DEBUG=1 for the traceback and report it)", file=sys.stderr)


if __name__ == "__main__":
    main()
