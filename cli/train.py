"""`tinylm train`: a recipe becomes a run folder."""

from __future__ import annotations

import re
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from .console import (
    DEVICE,
    JSON,
    QUIET,
    SET,
    ConsoleReporter,
    Conversation,
    count,
    duration,
    out,
    print_json,
    show_facts,
    size,
    stderr,
)
from .recipe_files import find

if TYPE_CHECKING:
    from tinylm.pipeline import TrainResult

app = typer.Typer(add_completion=False)
_TIME = re.compile(r"(\d+(?:\.\d+)?)([smh]?)")


@app.command()
def train(
    recipe: str = typer.Argument(..., help="A YAML file, the name of a recipe that ships, or a run folder to --resume."),
    set_: list[str] | None = SET,
    out_: str | None = typer.Option(None, "--out", help="The run folder; default: runs/NAME, with the recipe's name."),
    resume: bool = typer.Option(False, "--resume", help="Go on from the newest whole checkpoint."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Begin anew where a run is."),
    allow_change: list[str] | None = typer.Option(
        None, "--allow-change", metavar="KEY", help="With --resume: let this key differ."
    ),
    stop_after: str | None = typer.Option(None, "--stop-after", metavar="TIME", help="Save and stop after 90s, 55m or 2h."),
    seed: int | None = typer.Option(None, "--seed", min=0, help="Instead of the recipe's."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Check everything and show the plan; train nothing."),
    device: str = DEVICE,
    threads: str | None = typer.Option(
        None, "--threads", help="CPU threads, or auto: as many as are fastest; default: one per core."
    ),
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Train a model. Ctrl-C finishes the step, saves, and stops; --resume goes on from there."""
    from tinylm.errors import InputError
    from tinylm.recipe import load
    from tinylm.run import claim

    console = stderr()
    reporter = ConsoleReporter(console, quiet=quiet)
    overrides = [*(set_ or ()), *([f"seed={seed}"] if seed is not None else [])]
    file = find(recipe)
    loaded = load(file, overrides, check_files=not resume)
    if file == Path(recipe).expanduser() / "recipe.yaml" and out_ is None:
        if not resume:
            raise InputError(
                "this is a run folder", where=recipe, hint="--resume goes on with it; --out trains its recipe elsewhere"
            )
        out_ = recipe
    if allow_change and not resume:
        raise InputError("only means something with --resume", where="--allow-change")
    seconds = _seconds(stop_after) if stop_after is not None else None
    wanted_threads = _threads(threads)
    folder = out_ or str(Path("runs") / loaded.name)
    claim(Path(folder), resume, overwrite)
    if dry_run:
        from .plan import make, show_plan

        show_plan(make(loaded, reporter), json)
        return

    from tinylm.device import resolve

    resolve(device)  # one that is not here is told before torch's models are loaded
    from tinylm import pipeline
    from tinylm.training.metrics import Observer

    from .live import PlainView, TerminalView

    observer: Observer
    if quiet:
        observer = Observer()
    elif console.is_terminal and not console.is_dumb_terminal:
        observer = TerminalView(console, f"tinylm train {loaded.name}")
    else:
        observer = PlainView(console)
    with observer if isinstance(observer, TerminalView) else nullcontext():
        result = pipeline.train(
            loaded,
            folder,
            resume=resume,
            overwrite=overwrite,
            allow_change=allow_change or (),
            device=device,
            threads=wanted_threads,
            stop_after=seconds,
            reporter=reporter,
            observer=observer,
        )
    _show(result, console, json, quiet)
    if result.signal_number is not None:
        raise SystemExit(128 + result.signal_number)


def _threads(text: str | None) -> int | Literal["auto"] | None:
    from tinylm.errors import InputError

    if text is None:
        return None
    if text == "auto":
        return "auto"
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"{text!r} is no number of threads", where="--threads", hint="a number of at least 1, or auto")
    return int(text)


def _seconds(text: str) -> float:
    """90s, 55m, 2h or plain seconds."""
    from tinylm.errors import InputError

    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{text!r} is not a time", where="--stop-after", hint="like 90s, 55m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _show(result: TrainResult, console: Conversation, json: bool, quiet: bool) -> None:
    from dataclasses import asdict

    if not quiet:
        _summary(result, console)
    if json:
        document = asdict(result)
        del document["signal_number"]
        print_json(document)
    else:
        out(result.run)


def _summary(result: TrainResult, console: Conversation) -> None:
    rows = []
    if result.val_loss is not None:
        held_out = f"loss {result.val_loss:.4f} nats per token, perplexity {result.val_perplexity:.2f}, "
        rows.append(("held-out", f"{held_out}{result.val_bits_per_byte:.4f} bits per byte (best at step {result.best_step:,})"))
    trained = f"{result.step:,} of {result.steps:,} steps, {count(result.tokens)} tokens, {count(result.parameters)} parameters"
    memory = "" if result.peak_memory_bytes is None else f", peak memory {size(result.peak_memory_bytes)}"
    speed = f"{count(result.tokens_per_second)} tokens/s in {result.precision} on {result.device}"
    time = f"{duration(result.train_seconds)} of stepping at {speed}, {duration(result.seconds)} in all{memory}"
    show_facts(console, [*rows, ("trained", trained), ("time", time)])
    run = shlex.quote(result.run)
    if result.stopped == "done":
        console.say(f'next: tinylm sample --run {run} --prompt "..."   tinylm eval --run {run}', "dim")
    else:
        console.say(f"stopped early and saved; go on with: tinylm train {run} --resume", "yellow")
