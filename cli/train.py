"""`tinylm train`: a recipe becomes a run folder."""

from __future__ import annotations

import os
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
    seconds_of,
    show_facts,
    size,
    stderr,
)
from .recipe_files import find

if TYPE_CHECKING:
    from tinylm.pipeline import TrainResult
    from tinylm.recipe import EmbeddingRecipe, Recipe

app = typer.Typer(add_completion=False)


@app.command()
def train(
    recipe: str | None = typer.Argument(
        None, help="A YAML file, the name of a recipe that ships, or a run folder to --resume.", show_default=False
    ),
    set_: list[str] | None = SET,
    out_: str | None = typer.Option(None, "--out", help="The run folder; default: runs/NAME, with the recipe's name."),
    resume: bool = typer.Option(False, "--resume", help="Go on from the newest whole checkpoint."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Begin anew where a run is."),
    allow_change: list[str] | None = typer.Option(
        None, "--allow-change", metavar="KEY", help="With --resume: let this key, or section, differ."
    ),
    stop_after: str | None = typer.Option(None, "--stop-after", metavar="TIME", help="Save and stop after 90s, 55m or 2h."),
    replay: str | None = typer.Option(
        None, "--replay", metavar="REPORT", help="Do the step again of which a training left a report."
    ),
    seed: int | None = typer.Option(None, "--seed", min=0, help="Instead of the recipe's."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Check everything and show the plan; train nothing."),
    device: str = DEVICE,
    threads: str | None = typer.Option(
        None, "--threads", help="CPU threads, or auto: as many as are fastest; default: one per core."
    ),
    workers: int = typer.Option(1, "--workers", min=1, help="Processes that encode the text; 1 uses threads."),
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Train a model. Ctrl-C finishes the step, saves, and stops; --resume goes on from there.

    Several processes train one model together: torchrun --nproc-per-node N -m tinylm train RECIPE.
    """
    from tinylm.device import resolve
    from tinylm.errors import InputError
    from tinylm.processes import launched
    from tinylm.recipe import EmbeddingRecipe

    if (recipe is None) == (replay is None):
        raise InputError("give a RECIPE, or a report with --replay", where="tinylm train", hint="`tinylm recipes` lists some")
    wanted_threads = _threads(threads)
    if recipe is None:
        _replay(str(replay), device, wanted_threads, json)
        return
    main, several = launched().rank == 0, launched().count > 1
    if several:  # else torch's own library says in every process how gradients could be exchanged faster
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    quiet = quiet or not main
    console = stderr()
    reporter = ConsoleReporter(console, quiet=quiet)
    overrides = [*(set_ or ()), *([f"seed={seed}"] if seed is not None else [])]
    try:
        loaded, folder = _checked(recipe, overrides, out_, resume, overwrite, allow_change, main)
        seconds = seconds_of(stop_after)
        if isinstance(loaded, EmbeddingRecipe):
            _refuse_for_embeddings(
                {
                    "--dry-run": dry_run,
                    "--allow-change": bool(allow_change),
                    "--device": device not in ("auto", "cpu"),
                    "--threads auto": wanted_threads == "auto",
                    "--workers": workers > 1,
                    "torchrun": several,
                }
            )
        elif not dry_run:
            resolve(device)  # one that is not here is told before torch's models are loaded
    except InputError as error:
        if main:
            raise
        raise SystemExit(error.exit_code) from None  # the main process says the same
    if isinstance(loaded, EmbeddingRecipe):
        from .embed import run_recipe

        run_recipe(
            loaded, Path(folder), resume, overwrite, seconds, wanted_threads if wanted_threads != "auto" else None, json, quiet
        )
        return
    if dry_run:
        from .plan import make, show_plan

        if main:
            show_plan(make(loaded, reporter), json)
        return
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
            workers=workers,
            stop_after=seconds,
            reporter=reporter,
            observer=observer,
        )
    if main:
        _show(result, console, json, quiet)
    if result.signal_number is not None:
        raise SystemExit(128 + result.signal_number)


def _checked(
    recipe: str, overrides: list[str], out_: str | None, resume: bool, overwrite: bool, allow_change: list[str] | None, main: bool
) -> tuple[Recipe | EmbeddingRecipe, str]:
    """The recipe and the run folder that a command line means. Raises `InputError` for what does not go together."""
    from tinylm.errors import InputError
    from tinylm.recipe import EmbeddingRecipe, load_any
    from tinylm.run import RUNS, claim

    from .embed import FOLDER

    file = find(recipe)
    loaded = load_any(file, overrides, check_files=not resume)
    if file == Path(recipe).expanduser() / "recipe.yaml" and out_ is None:
        if not resume:
            raise InputError(
                "this is a run folder", where=recipe, hint="--resume goes on with it; --out trains its recipe elsewhere"
            )
        out_ = recipe
    if allow_change and not resume:
        raise InputError("only means something with --resume", where="--allow-change")
    folder = out_ or str((FOLDER if isinstance(loaded, EmbeddingRecipe) else RUNS) / loaded.name)
    if main:
        claim(Path(folder), resume, overwrite)
    return loaded, folder


def _refuse_for_embeddings(given: dict[str, bool]) -> None:
    """Vectors are learned by one process, on the CPU."""
    from tinylm.errors import InputError

    for option, is_given in given.items():
        if is_given:
            raise InputError("means nothing for embeddings", where=option)


def _replay(report: str, device: str, threads: int | Literal["auto"] | None, json: bool) -> None:
    from tinylm.errors import InputError

    if threads == "auto":
        raise InputError("a replay takes as many as the training had, or a number", where="--threads auto")
    from tinylm.training.replay import replay

    again = replay(report, device=None if device == "auto" else device, threads=threads)
    if json:
        print_json(again.as_dict())
        return
    seen = again.report
    how = {"bits": "to the bit", "rounding": "up to rounding", "different": "not: it comes out differently here"}[again.same]
    worst = sorted(range(len(again.sequence_losses)), key=lambda row: _badness(again.sequence_losses[row]), reverse=True)[:3]
    rows = [
        ("reported", f"{seen.reason} (loss {seen.loss:.6g}, gradient {seen.grad_norm:.6g})"),
        ("batch", f"step {seen.step:,}: sequences {seen.cursor:,} to {seen.cursor + len(again.sequence_losses) - 1:,} of the data"),
        ("computed", f"loss {again.loss:.6g}, gradient {again.grad_norm:.6g}, in {seen.precision}"),
        ("reproduced", how),
        ("not numbers", f"{len(again.broken)} of {len(again.gradients)} parameters{_first_of(again.broken)}"),
        ("worst text", ", ".join(f"sequence {row} (loss {again.sequence_losses[row]:.4g})" for row in worst) + " of texts.txt"),
    ]
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        out(f"{label:<{width}}  {value}")


def _badness(loss: float) -> float:
    return loss if loss == loss else float("inf")


def _first_of(names: list[str]) -> str:
    return f": {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""


def _threads(text: str | None) -> int | Literal["auto"] | None:
    from tinylm.errors import InputError

    if text is None:
        return None
    if text == "auto":
        return "auto"
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"{text!r} is no number of threads", where="--threads", hint="a number of at least 1, or auto")
    return int(text)


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
