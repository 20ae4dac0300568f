"""`tinylm new`: a commented recipe for a text, a machine and a time budget."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import typer

from .console import ERRORS, FIELD, JSON, QUIET, ConsoleReporter, checked_errors, duration, out, print_json, stderr
from .plan import list_hardware

app = typer.Typer(add_completion=False)


@app.command()
def new(
    source: list[str] = typer.Argument(..., help="The text: files, folders, globs, URLs, builtin:NAME."),
    out_: str | None = typer.Option(None, "--out", "-o", help="The recipe's file; default: print it."),
    minutes: float = typer.Option(10, "--minutes", help="How long the training may take."),
    hardware: str | None = typer.Option(
        None, "--hardware", metavar="NAME", help="An accelerator instead of this machine's CPU, like h100-sxm; list: their names."
    ),
    devices: int | None = typer.Option(None, "--devices", min=1, help="How many of them."),
    name: str | None = typer.Option(None, "--name", help="The recipe's name; default: that of --out or of the text."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the file that is there."),
    field: str = FIELD,
    errors: str = ERRORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Write a recipe for this text, this machine and this many minutes, each choice with its reason."""
    from tinylm.cost import accelerators as sheets
    from tinylm.errors import InputError
    from tinylm.paths import write_whole
    from tinylm.recipe.schema import DataSection
    from tinylm.suggest import Budget, propose

    if hardware == "list":
        list_hardware(json)
        return
    if minutes <= 0 or minutes == float("inf"):
        raise InputError(f"must be above 0, not {minutes:g}", where="--minutes")
    if devices is not None and hardware is None:
        raise InputError("only means something with --hardware", where="--devices")
    if hardware is not None:
        sheets.find(hardware)
    path = None if out_ is None else Path(out_).expanduser()
    if path is not None and path.exists() and not overwrite:
        raise InputError("is already there", where=str(path), hint="--overwrite replaces it")
    console = stderr()
    data = DataSection(train=tuple(source), field=field, errors=checked_errors(errors))  # type: ignore[arg-type]
    chosen = name or _name(path.stem if path is not None else Path(source[0]).stem)
    budget = Budget(minutes, hardware, devices or 1)
    proposal = propose(data, budget, name=chosen, reporter=ConsoleReporter(console, quiet=quiet))
    if path is not None:
        write_whole(path, proposal.yaml)
    if json:
        print_json({"path": None if path is None else str(path), "recipe": proposal.recipe.as_dict(), "plan": proposal.plan})
    elif path is None:
        out(proposal.yaml, end="")
    else:
        out(str(path))
    if path is not None and not quiet:
        plan = proposal.plan
        about = f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens, about {duration(60 * minutes)}"
        console.say(f"next: tinylm train {shlex.quote(str(path))}   ({about})", "dim")


def _name(text: str) -> str:
    """Letters, digits and dashes of it: a folder under runs/ will have this name."""
    return re.sub(r"[^\w.-]+", "-", text.replace("builtin:", "")).strip("-.") or "mine"
