"""`tinylm train`: train a model from a recipe, or replay a failed step."""

from __future__ import annotations

import math
import os
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
    StderrConsole,
    parse_duration,
    print_json,
    stderr_console,
    write_stdout,
)
from .recipe_files import find_recipe

if TYPE_CHECKING:
    from tinylm.pipeline import TrainResult
    from tinylm.recipe import EmbeddingRecipe, Recipe
    from tinylm.training.metrics import Observer

app = typer.Typer(add_completion=False)


@app.command()
def train(
    recipe: str | None = typer.Argument(
        None, help="A YAML file, the name of a recipe that ships with tinylm, or a run folder to --resume.", show_default=False
    ),
    set_: list[str] | None = SET,
    out: str | None = typer.Option(None, "--out", help="Run folder. Default: runs/NAME, where NAME is the recipe's name."),
    resume: bool = typer.Option(False, "--resume", help="Continue a run from its newest complete checkpoint."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the run in the run folder."),
    allow_change: list[str] | None = typer.Option(
        None, "--allow-change", metavar="KEY", help="With --resume: accept a changed recipe key or section. Can be repeated."
    ),
    stop_after: str | None = typer.Option(
        None, "--stop-after", metavar="TIME", help="Save and stop after this time, for example 90s, 55m or 2h."
    ),
    replay: str | None = typer.Option(
        None, "--replay", metavar="REPORT", help="Repeat a failed step from the report that the run wrote."
    ),
    seed: int | None = typer.Option(None, "--seed", min=0, help="Random seed. Default: the seed in the recipe."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Check the recipe and show the plan, but do not train."),
    device: str = DEVICE,
    threads: str | None = typer.Option(
        None, "--threads", help="Number of CPU threads, or auto for the fastest number. Default: one per core."
    ),
    workers: int = typer.Option(1, "--workers", min=1, help="Number of processes that encode the text. With 1, threads are used."),
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Train a model. Ctrl-C finishes the current step, saves a checkpoint and stops; --resume continues from there.

    To train with several processes, run: torchrun --nproc-per-node N -m tinylm train RECIPE
    """
    from tinylm.device import resolve
    from tinylm.errors import InputError
    from tinylm.processes import launch_info
    from tinylm.recipe import EmbeddingRecipe
    from tinylm.run import check_run_folder

    if (recipe is None) == (replay is None):
        hint = "`tinylm recipes` lists the recipes that ship with tinylm"
        raise InputError("requires either a RECIPE or --replay REPORT", where="tinylm train", hint=hint)
    thread_count = _parse_threads(threads)
    if recipe is None:
        _replay(str(replay), device, thread_count, json)
        return
    launch = launch_info()
    is_main, distributed = launch.rank == 0, launch.world_size > 1
    if distributed:  # suppress a torch warning that every process would print
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    quiet = quiet or not is_main
    console = stderr_console()
    reporter = ConsoleReporter(console, quiet=quiet)
    overrides = [*(set_ or ()), *([f"seed={seed}"] if seed is not None else [])]
    try:
        loaded, folder = _load(recipe, overrides, out, resume=resume, allow_change=bool(allow_change))
        if is_main:
            check_run_folder(folder, resume, overwrite)
        seconds = parse_duration(stop_after)
        if isinstance(loaded, EmbeddingRecipe):
            _reject_for_embeddings(
                {
                    "--dry-run": dry_run,
                    "--allow-change": bool(allow_change),
                    "--device": device not in ("auto", "cpu"),
                    "--threads auto": thread_count == "auto",
                    "--workers": workers > 1,
                    "torchrun": distributed,
                }
            )
        elif not dry_run or device != "auto":  # a dry run on the default device does not need torch
            resolve(device)  # report a missing device before the slow imports
    except InputError as error:
        if is_main:
            raise
        raise SystemExit(error.exit_code) from None  # the main process prints the same error
    if isinstance(loaded, EmbeddingRecipe):
        from .embed import run_recipe

        run_recipe(loaded, folder, resume, overwrite, seconds, thread_count if thread_count != "auto" else None, json, quiet)
        return
    if dry_run:
        from .plan import plan_recipe, show_plan

        if is_main:
            show_plan(plan_recipe(loaded, reporter), json)
        return
    from tinylm import pipeline

    from .live import TerminalView

    observer = _observer(console, f"tinylm train {loaded.name}", quiet)
    with observer if isinstance(observer, TerminalView) else nullcontext():
        result = pipeline.train(
            loaded,
            folder,
            resume=resume,
            overwrite=overwrite,
            allow_change=allow_change or (),
            device=device,
            threads=thread_count,
            workers=workers,
            stop_after=seconds,
            reporter=reporter,
            observer=observer,
        )
    if is_main:
        _show_result(result, console, json, quiet)
    if result.signal_number is not None:
        raise SystemExit(128 + result.signal_number)


def _load(
    recipe: str, overrides: list[str], out: str | None, *, resume: bool, allow_change: bool
) -> tuple[Recipe | EmbeddingRecipe, Path]:
    """Load the recipe and choose the run folder. Raises `InputError` if the recipe or the options are invalid."""
    from tinylm.errors import InputError
    from tinylm.recipe import EmbeddingRecipe, load_any
    from tinylm.run import RUNS

    from .embed import FOLDER

    file = find_recipe(recipe)
    is_run_folder = file == Path(os.path.expanduser(recipe)) / "recipe.yaml"
    loaded = load_any(file, overrides, check_files=not resume)
    if is_run_folder and out is None:
        if not resume:
            hint = "--resume continues the run; --out trains with its recipe in another folder"
            raise InputError("is a run folder", where=recipe, hint=hint)
        out = recipe
    if allow_change and not resume:
        raise InputError("requires --resume", where="--allow-change")
    default = (FOLDER if isinstance(loaded, EmbeddingRecipe) else RUNS) / loaded.name
    return loaded, default if out is None else Path(out)


def _reject_for_embeddings(used: dict[str, bool]) -> None:
    """Raise `InputError` for the first option that is used. Embeddings are trained by one process on the CPU."""
    from tinylm.errors import InputError

    for option, is_used in used.items():
        if is_used:
            raise InputError("not supported for embeddings", where=option)


def _observer(console: StderrConsole, title: str, quiet: bool) -> Observer:
    """Return an observer that shows a live panel on a terminal and plain lines otherwise. If `quiet`, it shows nothing."""
    from tinylm.training.metrics import Observer

    from .live import PlainView, TerminalView

    if quiet:
        return Observer()
    if console.is_terminal and not console.is_dumb_terminal:
        return TerminalView(console, title)
    return PlainView(console)


def _parse_threads(text: str | None) -> int | Literal["auto"] | None:
    from tinylm.errors import InputError

    if text is None:
        return None
    if text == "auto":
        return "auto"
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"must be a whole number of at least 1, or auto, not {text!r}", where="--threads")
    return int(text)


def _replay(report: str, device: str, threads: int | Literal["auto"] | None, json: bool) -> None:
    """Replay the step in a report, and print how the results compare with the report."""
    from tinylm.errors import InputError

    if threads == "auto":
        hint = "without --threads, a replay uses as many threads as the failed run"
        raise InputError("not supported with --replay", where="--threads auto", hint=hint)
    from tinylm.training.replay import replay

    replayed = replay(report, device=None if device == "auto" else device, threads=threads)
    if json:
        print_json(replayed.as_dict())
        return
    reported, losses = replayed.report, replayed.sequence_losses
    agreement = {"bits": "bit for bit", "rounding": "up to rounding", "different": "no; the results differ"}[replayed.agreement]
    non_finite = f"{len(replayed.non_finite)} of {len(replayed.gradients)} parameters{_first_names(replayed.non_finite)}"
    worst = sorted(range(len(losses)), key=lambda row: _nan_as_infinity(losses[row]), reverse=True)[:3]
    worst_texts = ", ".join(f"sequence {row} (loss {losses[row]:.4g})" for row in worst)
    last_sequence = reported.cursor + len(losses) - 1
    rows = [
        ("reported", f"{reported.reason} (loss {reported.loss:.6g}, gradient norm {reported.grad_norm:.6g})"),
        ("batch", f"step {reported.step:,}: sequences {reported.cursor:,} to {last_sequence:,} of the data"),
        ("replayed", f"loss {replayed.loss:.6g}, gradient norm {replayed.grad_norm:.6g}, in {reported.precision}"),
        ("reproduced", agreement),
        ("non-finite", non_finite),
        ("highest loss", f"{worst_texts}; see texts.txt in the report"),
    ]
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        write_stdout(f"{label:<{width}}  {value}")


def _nan_as_infinity(loss: float) -> float:
    """Return a sort key for a loss. NaN counts as infinity."""
    return math.inf if math.isnan(loss) else loss


def _first_names(names: list[str]) -> str:
    return f": {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""


def _show_result(result: TrainResult, console: StderrConsole, json: bool, quiet: bool) -> None:
    if not quiet:
        from tinylm.run import Run
        from tinylm.training_summary import summarize

        from .train_summary import show_summary

        show_summary(result, summarize(Run.open(result.run), result.seconds), console)
    if json:
        print_json(result.as_dict())
    else:
        write_stdout(result.run)
