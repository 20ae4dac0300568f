"""Search ranges of values with Optuna: a tree-structured Parzen estimator proposes settings, and bad runs are stopped early."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm.errors import InputError, missing_extra
from tinylm.evaluation.metrics import Metric, Metrics
from tinylm.recipe.loader import RecipeError
from tinylm.sweep.runner import Outcome, Sweep, Training
from tinylm.sweep.settings import Axis, Range, Values

if TYPE_CHECKING:
    import optuna

_STARTUP_TRIALS = 5
"""Number of trials that must finish before any trial is pruned."""
_MARKS_PER_DOUBLING = 2
"""Training runs are compared at fixed token counts, called marks. There are this many marks per doubling of the token count."""


def check_space(sweep: Sweep, axes: Sequence[Axis], ranges: Sequence[Range]) -> None:
    """Raise `InputError` if the recipe is not valid with a value of an axis or a bound of a range, each tried on its own."""
    first = {axis.key: axis.values[0] for axis in axes} | {interval.key: interval.bounds[0] for interval in ranges}
    try:
        for axis in axes:
            sweep.check({**first, axis.key: value} for value in axis.values)
        for interval in ranges:
            for bound in interval.bounds:
                sweep.recipe({**first, interval.key: bound})
    except RecipeError as error:
        options = {f"--set {interval.key}={bound}": f"--range {interval}" for interval in ranges for bound in interval.bounds}
        problems = [problem.partition(": ") for problem in error.problems]
        raise RecipeError([f"{options.get(where, where)}: {message}" for where, _, message in problems]) from None


def run_trials(sweep: Sweep, axes: Sequence[Axis], ranges: Sequence[Range], trials: int, seed: int) -> Iterator[Outcome]:
    """Run `trials` trials and yield the outcome of each. An interrupted search resumes with the remaining trials.

    A trial with the same values as an earlier one is not trained. Its outcome refers to the run of the earlier trial. Raises
    `InputError` if Optuna is missing, or if the folder contains a search over different values.
    """
    with sweep.locked():
        study = _open_study(sweep, axes, ranges, seed)
        finished: dict[str, Outcome] = {}
        for start in range(0, trials, sweep.jobs):
            known = study.get_trials(deepcopy=False)
            asked: dict[str, list[optuna.Trial]] = {}
            for number in range(start, min(start + sweep.jobs, trials)):
                trial = _continue_or_ask(study, known, number, axes, ranges)
                asked.setdefault(_key(trial.user_attrs["values"]), []).append(trial)
            repeated = [finished[key] for key in asked if key in finished]
            new = {_name(trial): trial for key, (trial, *_) in asked.items() if key not in finished}
            monitor = _Pruners({name: _Pruner(trial) for name, trial in new.items()})
            planned = [Training(name, trial.user_attrs["values"]) for name, trial in new.items()]
            for outcome in chain(repeated, sweep.run(planned, monitor)):
                key = _key(outcome.values)
                finished[key] = outcome
                for trial in asked[key]:
                    _tell(study, trial, outcome)
                    yield replace(outcome, name=_name(trial))


def _name(trial: optuna.Trial) -> str:
    return f"trial-{trial.number:03}"


def _key(values: Values) -> str:
    return json.dumps(values, sort_keys=True)


def _open_study(sweep: Sweep, axes: Sequence[Axis], ranges: Sequence[Range], seed: int) -> optuna.Study:
    try:
        import optuna
    except ImportError:
        raise missing_extra("sweep", "searching with --trials") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = f"sqlite:///{sweep.folder / 'optuna.db'}"
    space = json.dumps([[asdict(axis) for axis in axes], [asdict(interval) for interval in ranges]], sort_keys=True)
    study = optuna.create_study(study_name="sweep", storage=storage, direction="minimize", load_if_exists=True)
    # With the same seed, a resumed search would repeat its first proposals.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=_STARTUP_TRIALS)
    if study.user_attrs.get("space", space) != space:
        raise InputError(
            "the folder contains a search over different values", where=str(sweep.folder), hint="choose another folder with --out"
        )
    study.set_user_attr("space", space)
    return study


def _continue_or_ask(
    study: optuna.Study, known: Sequence[Any], number: int, axes: Sequence[Axis], ranges: Sequence[Range]
) -> optuna.Trial:
    """Return the trial with this number, or a new trial. Its settings are in the user attribute `values`."""
    import optuna

    trial = optuna.trial.Trial(study, known[number]._trial_id) if number < len(known) else study.ask()
    if "values" in trial.user_attrs:
        return trial
    values = {axis.key: _suggest_axis(trial, axis) for axis in axes}
    values |= {interval.key: _suggest_range(trial, interval) for interval in ranges}
    trial.set_user_attr("values", values)
    return trial


def _suggest_axis(trial: optuna.Trial, axis: Axis) -> str:
    return axis.values[0] if len(axis.values) == 1 else str(trial.suggest_categorical(axis.key, axis.values))


def _suggest_range(trial: optuna.Trial, interval: Range) -> str:
    if interval.whole:
        return str(trial.suggest_int(interval.key, int(interval.low), int(interval.high), log=interval.log))
    return f"{trial.suggest_float(interval.key, interval.low, interval.high, log=interval.log):.4g}"


def _tell(study: optuna.Study, trial: optuna.Trial, outcome: Outcome) -> None:
    """Record an outcome, unless it is already recorded."""
    import optuna

    state = study.get_trials(deepcopy=False)[trial.number].state
    if state.is_finished():
        return
    if outcome.pruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return
    score = _score(outcome)
    if score is None:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(trial, score)


def _score(outcome: Outcome) -> float | None:
    """Return the primary metric of the best checkpoint, negated if higher is better. None if there is no finite value."""
    from tinylm.sweep.summary import summarize

    summary = summarize([outcome])
    row = summary.rows[0]
    if row.best is None or not math.isfinite(row.best):
        return None
    return _signed(summary.metric, row.best)


def _signed(metric: Metric, value: float) -> float:
    return value if metric.lower_is_better else -value


class _Pruner:
    """Reports a run's primary metric to Optuna at fixed token counts, and decides whether to stop the run."""

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial
        self._next_mark = 0

    def __call__(self, folder: Path) -> bool:
        points = _evaluations(folder / "metrics.jsonl")
        if len(points) < 2:
            return False
        while points[-1][0] >= (tokens := mark_tokens(self._next_mark)):
            if tokens >= points[0][0]:
                self._trial.report(interpolate(points, tokens), self._next_mark)
            self._next_mark += 1
        return self._trial.should_prune()


class _Pruners:
    """The pruners of several training runs, by name."""

    def __init__(self, pruners: dict[str, _Pruner]) -> None:
        self._pruners = pruners

    def __call__(self, training: Training, folder: Path) -> bool:
        return self._pruners[training.name](folder)


def mark_tokens(mark: int) -> float:
    """Return the token count of mark number `mark`."""
    return float(2 ** (mark / _MARKS_PER_DOUBLING))


def interpolate(points: Sequence[tuple[float, float]], tokens: float) -> float:
    """Interpolate linearly between sorted (tokens, value) points. Raises `ValueError` if `tokens` is outside their range."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= tokens <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)
    raise ValueError(f"{tokens} tokens is outside the range of the points")


def _evaluations(file: Path) -> list[tuple[float, float]]:
    """Return (tokens, primary metric) for each evaluation so far. Incomplete lines are skipped."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    points = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        metrics = Metrics.from_dict(event) if isinstance(event, dict) and event.get("kind") == "eval" else None
        if metrics is not None and math.isfinite(metrics.value):
            points.append((float(event["tokens"]), _signed(metrics.metric, metrics.value)))
    return points
