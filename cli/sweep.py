"""`tinylm sweep`: train models with many settings of a recipe and compare the results."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from .console import (
    DEVICE,
    JSON,
    QUIET,
    checked_output_file,
    continued_by_same_command,
    format_count,
    format_duration,
    pluralize,
    print_json,
    stderr_console,
    stdout_console,
)
from .recipe_files import find_recipe

if TYPE_CHECKING:
    from tinylm.sweep.runner import Outcome, Sweep, Training
    from tinylm.sweep.settings import Axis
    from tinylm.sweep.summary import Group, Summary

app = typer.Typer(add_completion=False)


@app.command()
def sweep(
    recipe: str = typer.Argument(..., help="A YAML file, or the name of a recipe that ships with tinylm."),
    set_: list[str] | None = typer.Option(
        None,
        "--set",
        metavar="KEY=A,B,C",
        help="Try each of these values of a recipe key. A single value applies to all runs. Can be repeated.",
    ),
    trials: int | None = typer.Option(
        None,
        "--trials",
        min=1,
        metavar="N",
        help="Instead of trying every combination, run N trials with settings that Optuna proposes.",
    ),
    range_: list[str] | None = typer.Option(
        None, "--range", metavar="KEY=LOW..HIGH[:log]", help="With --trials: search this range of a recipe key. Can be repeated."
    ),
    seeds: int | None = typer.Option(
        None,
        "--seeds",
        min=1,
        help="Finally, train the best settings with more seeds, until there are this many runs. Default: 3 with --trials, else 1.",
    ),
    jobs: int = typer.Option(
        1, "--jobs", min=1, help="Number of runs to train at the same time. Each run uses an equal share of the cores."
    ),
    out: str | None = typer.Option(None, "--out", help="Folder for the sweep. Default: runs/NAME-sweep."),
    plot: str | None = typer.Option(None, "--plot", metavar="FILE", help="Also plot the results: .png, .svg or .pdf."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Check all recipes and list the runs, but do not train."),
    device: str = DEVICE,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Train a recipe with many settings and compare the results.

    Run the same command again to continue a sweep that was stopped. Each run is an ordinary run folder inside the sweep's folder.
    """
    from tinylm.errors import InputError
    from tinylm.run import RUNS
    from tinylm.sweep import settings
    from tinylm.sweep.runner import Sweep, check_sweep_folder
    from tinylm.sweep.search import check_space, run_trials
    from tinylm.sweep.summary import summarize

    axes = [settings.parse_axis(text) for text in set_ or ()]
    ranges = [settings.parse_range(text) for text in range_ or ()]
    settings.check_keys([axis.key for axis in axes] + [interval.key for interval in ranges])
    if ranges and trials is None:
        raise InputError("requires --trials", where="--range")
    if trials is not None and not ranges and not _swept(axes):
        raise InputError("requires --range KEY=LOW..HIGH, or --set KEY=A,B,C", where="--trials")
    if trials is None and not axes:
        raise InputError("is required", where="--set", hint="for example --set model.n_embd=128,192 --set seed=1,2,3")
    image = None if plot is None else checked_image(plot)
    file = find_recipe(recipe)
    checked = Sweep(Path(), file)
    if trials is None:
        checked.check(settings.grid(axes))
    else:
        check_space(checked, axes, ranges)
    first = checked.recipe({axis.key: axis.values[0] for axis in axes} | {interval.key: interval.bounds[0] for interval in ranges})
    progress = _Progress(quiet=quiet)
    folder = RUNS / f"{first.name}-sweep" if out is None else Path(out)
    runner = Sweep(folder, file, jobs=jobs, device=device, on_start=progress.started)
    check_sweep_folder(runner.folder)
    if trials is None:
        planned = _grid(axes)
        run_all: Callable[[], Iterator[Outcome]] = lambda: runner.run(planned)  # noqa: E731
        count = len(planned)
    else:
        run_all = lambda: run_trials(runner, axes, ranges, trials, first.seed)  # noqa: E731
        planned, count = [], trials
    if dry_run:
        _show_planned(runner, planned, count, json=json)
        return
    progress.announce(count, runner.folder)
    names = [training.name for training in planned]
    n_seeds = seeds or (3 if trials is not None else 1)
    with continued_by_same_command():
        outcomes = sorted(progress.follow(run_all()), key=lambda outcome: (names.index(outcome.name) if names else 0, outcome.name))
        summary = summarize(outcomes)
        # With more seeds, the best setting may become worse than another one, which is then trained with more seeds, too.
        while summary.best is not None and (repeats := _repeats(runner, summary.best, n_seeds)):
            progress.total += len(repeats)
            outcomes += progress.follow(runner.run(repeats))
            summary = summarize(outcomes)
    if image is not None:
        from tinylm.sweep.picture import draw

        draw(summary, image)
    _show(summary, json=json)
    if all(outcome.error for outcome in outcomes):
        raise SystemExit(1)


def _swept(axes: Sequence[Axis]) -> list[str]:
    return [axis.key for axis in axes if len(axis.values) > 1]


def _grid(axes: Sequence[Axis]) -> list[Training]:
    from tinylm.sweep import settings
    from tinylm.sweep.runner import Training

    combinations = settings.grid(axes)
    return [
        Training(name, values) for name, values in zip(settings.run_names(combinations, _swept(axes)), combinations, strict=True)
    ]


def _repeats(runner: Sweep, best: Group, count: int) -> list[Training]:
    """Return runs of the best setting with other seeds, so that it is trained with `count` seeds in total."""
    from tinylm.sweep.runner import Training
    from tinylm.sweep.summary import SEED

    used = {runner.recipe(row.values).seed for row in best.rows}
    free = [seed for seed in range(min(used), min(used) + count) if seed not in used]
    name = Path(best.rows[0].run).name
    return [Training(f"{name},seed={seed}", {**best.values, SEED: str(seed)}) for seed in free[: max(0, count - len(used))]]


class _Progress:
    """Prints one line when a run starts, and one when it is finished."""

    def __init__(self, *, quiet: bool) -> None:
        self.total = 0
        self._finished = 0
        self._quiet = quiet
        self._console = stderr_console()

    def announce(self, total: int, folder: Path) -> None:
        """Print the number of runs and their folder."""
        self.total = total
        if not self._quiet:
            self._console.print_line(f"{pluralize(total, 'run')} in {folder}", "dim")

    def started(self, training: Training) -> None:
        if not self._quiet:
            self._console.print_line(f"{training.name}: started", "dim")

    def follow(self, outcomes: Iterator[Outcome]) -> list[Outcome]:
        from tinylm.sweep.summary import summarize

        found = []
        for outcome in outcomes:
            found.append(outcome)
            self._finished += 1
            summary = summarize([outcome])
            row = summary.rows[0]
            start = f"[{self._finished}/{self.total}] {outcome.name}: "
            if outcome.error:
                self._console.print_line(f"{start}failed: {outcome.error}", "yellow")
            elif not self._quiet:
                result = "stopped early" if row.best is None else summary.metric.described(row.best)
                spent = "" if row.seconds is None else f" ({format_duration(row.seconds)})"
                self._console.print_line(f"{start}{result}{spent}", "dim")
        return found


def _show_planned(runner: Sweep, planned: Sequence[Training], count: int, *, json: bool) -> None:
    runs = [{"run": str(runner.run_folder(training.name)), "values": training.values} for training in planned]
    if json:
        print_json({"folder": str(runner.folder), "runs": runs or None, "count": count})
        return
    stderr_console().print_line(f"{pluralize(count, 'run')} in {runner.folder}", "dim")
    for training in planned:
        stdout_console().print(runner.run_folder(training.name))


def _show(summary: Summary, *, json: bool) -> None:
    if json:
        print_json(summary.as_dict())
        return
    from tinylm.run import Run
    from tinylm.sweep.settings import shortened
    from tinylm.training_summary import task_of

    from .train_summary import first_command

    groups, metric = summary.groups, summary.metric
    varied = [key for key in dict.fromkeys(key for group in groups for key in group.values) if _varies(groups, key)]
    short = shortened(varied)
    repeated = any(len(group.rows) > 1 for group in groups)
    table = Table(box=None, pad_edge=False)
    for key in varied:
        table.add_column(short[key], justify="right")
    for column in (metric.heading, *(("deviation", "seeds") if repeated else ()), "parameters", "time"):
        table.add_column(column, justify="right")
    for group in groups:
        row = group.rows[0]
        cells = ["-" if group.mean is None else metric.formatted(group.mean)]
        if group.mean is None:
            cells = [row.status]
        if repeated:
            cells += ["-" if group.deviation is None else metric.formatted(group.deviation), str(len(group.scores))]
        cells += ["-" if row.parameters is None else format_count(row.parameters)]
        cells += ["-" if row.seconds is None else format_duration(row.seconds)]
        table.add_row(*(group.values.get(key, "-") for key in varied), *cells)
    stdout_console().print(table)
    best = summary.best_row
    if best is not None:
        command = first_command(shlex.quote(str(best.run)), task_of(Run.open(best.run)))
        stderr_console().print_line(f"best: {best.run}   next: {command}", "dim")


def _varies(groups: Sequence[Group], key: str) -> bool:
    return len({group.values.get(key) for group in groups}) > 1


def checked_image(path: str) -> Path:
    from tinylm.errors import InputError, missing_extra

    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise InputError("must end in .png, .svg or .pdf", where="--plot")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise missing_extra("plot", "plotting") from None
    return checked_output_file(path, overwrite=True)
