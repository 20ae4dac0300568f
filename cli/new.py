"""`tinylm new`: write a commented recipe for a text, a machine and a time limit."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import typer

from .console import (
    ERRORS,
    FIELD,
    JSON,
    QUIET,
    TEMPLATE,
    ConsoleReporter,
    checked_errors,
    format_duration,
    given_options,
    print_json,
    stderr_console,
    write_stdout,
)
from .plan import HARDWARE, check_hardware, duration_text, list_hardware, steps_text

app = typer.Typer(add_completion=False)


@app.command()
def new(
    ctx: typer.Context,
    source: list[str] | None = typer.Argument(None, help="The text: files, folders, globs, URLs or builtin:NAME."),
    chat: list[str] | None = typer.Option(
        None, "--chat", metavar="FILE", help="Instead of a text: conversations for fine-tuning the --from run. Can be repeated."
    ),
    from_: str | None = typer.Option(None, "--from", metavar="RUN", help="With --chat: the run to fine-tune."),
    layout: str = typer.Option(
        "messages", "--layout", help="With --chat: the layout of a record: messages, prompt_response or alpaca (see data.layout)."
    ),
    out_: str | None = typer.Option(None, "--out", "-o", help="The file to write. Default: stdout."),
    minutes_: str = typer.Option(
        "10",
        "--minutes",
        metavar="TIME",
        help="Training time: a number of minutes, or a duration such as 90s, 5m or 2h. Default with --chat: a few epochs.",
    ),
    hardware: str | None = HARDWARE,
    devices: int | None = typer.Option(None, "--devices", min=1, help="Number of accelerators."),
    name: str | None = typer.Option(None, "--name", help="Name of the recipe. Default: the name of the --out or SOURCE file."),
    for_: str | None = typer.Option(None, "--for", metavar="gguf", help="Use only model parts that this export format supports."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing file."),
    field: str = FIELD,
    template: str | None = TEMPLATE,
    errors: str = ERRORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Write a recipe for a text, a machine and a time limit, with a reason for each choice.

    With --chat FILE --from RUN, the recipe fine-tunes a run on conversations.
    """
    from tinylm.errors import InputError
    from tinylm.hints import positive_minutes
    from tinylm.paths import atomic_write_text
    from tinylm.recipe.schema import DataSection
    from tinylm.suggest import Budget, suggest_recipe

    if hardware == "list":
        list_hardware(json)
        return
    minutes = positive_minutes(minutes_, "--minutes")
    if for_ not in (None, "gguf"):
        raise InputError(f"must be gguf, not {for_!r}", where="--for", hint="other exports support every model")
    check_hardware(hardware, devices)
    _check_options(ctx, source or [], chat, from_)
    path = None if out_ is None else Path(os.path.expanduser(out_))
    if path is not None and path.exists() and not overwrite:
        raise InputError("already exists", where=str(path), hint="--overwrite replaces it")
    console = stderr_console()
    if chat is not None:
        by_clock = bool(given_options(ctx, ("minutes_",)))
        run_name = name or _run_name(path.stem if path is not None else Path(chat[0]).stem)
        request = _ChatRequest(chat, str(from_), layout, checked_errors(errors), run_name, minutes if by_clock else None)
        _write_chat_recipe(request, path, json=json, quiet=quiet)
        return
    assert source is not None
    data = DataSection(train=tuple(source), field=field, template=template, errors=checked_errors(errors))  # type: ignore[arg-type]
    run_name = name or _run_name(path.stem if path is not None else Path(source[0]).stem)
    budget = Budget(minutes, hardware, devices or 1)
    reporter = ConsoleReporter(console, quiet=quiet)
    suggestion = suggest_recipe(data, budget, name=run_name, for_gguf=for_ == "gguf", reporter=reporter)
    if path is not None:
        atomic_write_text(path, suggestion.yaml)
    if json:
        print_json({"path": None if path is None else str(path), "recipe": suggestion.recipe.as_dict(), "plan": suggestion.plan})
    elif path is None:
        write_stdout(suggestion.yaml, end="")
    else:
        write_stdout(str(path))
    if path is not None and not quiet:
        plan = suggestion.plan
        by_clock = suggestion.recipe.training.minutes is not None
        duration = format_duration(60 * minutes) if by_clock else duration_text(plan.seconds_range)
        cost = f"{steps_text(plan)} of {plan.tokens_per_step:,} tokens, about {duration}"
        console.print_line(f"next: tinylm train {shlex.quote(str(path))}   ({cost})", "dim")


def _check_options(ctx: typer.Context, source: list[str], chat: list[str] | None, from_: str | None) -> None:
    """Raise `InputError` for options that are incompatible or would have no effect."""
    from tinylm.errors import InputError

    if chat is None:
        if not source:
            raise InputError("missing", where="SOURCE", hint="pass a text, or conversations with --chat FILE --from RUN")
        if unused := given_options(ctx, ("from_", "layout")):
            raise InputError("requires --chat", where=", ".join(unused))
        return
    if source:
        raise InputError("cannot be combined with --chat", where="SOURCE", hint="repeat --chat for several files")
    if from_ is None:
        raise InputError("requires --from RUN, the run to fine-tune", where="--chat")
    if unused := given_options(ctx, ("hardware", "devices", "for_", "field", "template")):
        raise InputError("cannot be combined with --chat", where=", ".join(unused))


@dataclass(frozen=True)
class _ChatRequest:
    """The arguments of `tinylm new --chat`."""

    sources: list[str]
    run: str
    layout: str
    errors: str
    name: str
    minutes: float | None


def _write_chat_recipe(request: _ChatRequest, path: Path | None, *, json: bool, quiet: bool) -> None:
    """Suggest a recipe for conversations and write it to `path` or stdout."""
    from tinylm.errors import InputError
    from tinylm.paths import atomic_write_text
    from tinylm.recipe.chat import ChatSection
    from tinylm.run import Run
    from tinylm.suggest_chat import suggest_chat_recipe

    if request.layout not in ("messages", "prompt_response", "alpaca"):
        raise InputError(f"must be messages, prompt_response or alpaca, not {request.layout!r}", where="--layout")
    values = {"train": tuple(request.sources), "layout": request.layout, "errors": request.errors}
    console = stderr_console()
    run = Run.open(os.path.expanduser(request.run))
    data, reporter = ChatSection.model_validate(values), ConsoleReporter(console, quiet=quiet)
    suggestion = suggest_chat_recipe(data, run, name=request.name, minutes=request.minutes, reporter=reporter)
    if path is not None:
        atomic_write_text(path, suggestion.yaml)
    if json:
        recipe = suggestion.recipe.as_dict()
        print_json({"path": None if path is None else str(path), "recipe": recipe, "sequences": suggestion.sequences})
    elif path is None:
        write_stdout(suggestion.yaml, end="")
    else:
        write_stdout(str(path))
    if path is not None and not quiet:
        quoted = shlex.quote(str(path))
        console.print_line(f"next: tinylm data show {quoted}   tinylm train {quoted}", "dim")


def _run_name(text: str) -> str:
    """Convert `text` to the name of a run folder. Characters other than letters, digits, `_`, `.` and `-` become dashes."""
    return re.sub(r"[^\w.-]+", "-", text.replace("builtin:", "")).strip("-.") or "mine"
