"""The results of a sweep: one row per run, groups of runs that differ only in their seed, and the best setting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tinylm.evaluation.metrics import LOSS, METRICS, PREFIX, Metric
from tinylm.sweep.runner import Outcome

SEED = "seed"


@dataclass(frozen=True)
class Row:
    """One run. `metrics` maps keys such as `val_loss` to their values at the end of training."""

    run: str
    values: dict[str, str]
    metrics: dict[str, float | None]
    best: float | None
    """The primary metric of the best checkpoint. None if the run failed, was stopped early, or was never evaluated."""
    seconds: float | None
    tokens: int | None
    parameters: int | None
    status: str
    """`done`, `pruned` or `failed`."""
    error: str | None = None

    def as_dict(self, metric: Metric) -> dict[str, Any]:
        return {
            "run": self.run,
            "values": {key: _plain(value) for key, value in self.values.items()},
            **self.metrics,
            f"best_{metric.key}": self.best,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "parameters": self.parameters,
            "status": self.status,
            **({"error": self.error} if self.error else {}),
        }


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    values: dict[str, str]
    rows: list[Row]

    @property
    def scores(self) -> list[float]:
        """The primary metric of each seed. Runs with the same seed are identical, so they count once."""
        by_seed = {row.values.get(SEED): row.best for row in self.rows if row.best is not None and math.isfinite(row.best)}
        return list(by_seed.values())

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation. None for fewer than two runs."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "values": {key: _plain(value) for key, value in self.values.items()},
            "runs": len(self.scores),
            "mean": self.mean,
            "deviation": self.deviation,
        }


@dataclass(frozen=True)
class Summary:
    """All results of a sweep."""

    metric: Metric
    rows: list[Row]
    groups: list[Group] = field(default_factory=list)
    """Best first. Groups without a score come last."""

    @property
    def best(self) -> Group | None:
        return self.groups[0] if self.groups and self.groups[0].mean is not None else None

    @property
    def best_row(self) -> Row | None:
        """The best run in the best group."""
        if self.best is None:
            return None
        scored = [row for row in self.best.rows if row.best is not None and math.isfinite(row.best)]
        return min(scored, key=lambda row: _rank(self.metric, row.best))

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document of `tinylm sweep --json`."""
        best, row = self.best, self.best_row
        return {
            "metric": self.metric.name,
            "rows": [row.as_dict(self.metric) for row in self.rows],
            "groups": [group.as_dict() for group in self.groups],
            "best": None if best is None or row is None else {**row.as_dict(self.metric), **best.as_dict()},
        }


def summarize(outcomes: Sequence[Outcome]) -> Summary:
    """Group and rank the outcomes of a sweep. Outcomes that refer to the same run give one row."""
    metric = _primary_metric(outcomes)
    rows = [_row(outcome, metric) for outcome in {outcome.run: outcome for outcome in outcomes}.values()]
    groups: dict[tuple[tuple[str, str], ...], Group] = {}
    for row in rows:
        values = {key: value for key, value in row.values.items() if key != SEED}
        groups.setdefault(tuple(values.items()), Group(values, [])).rows.append(row)
    return Summary(metric, rows, sorted(groups.values(), key=lambda group: _rank(metric, group.mean)))


def _row(outcome: Outcome, metric: Metric) -> Row:
    result = outcome.result
    return Row(
        outcome.run,
        outcome.values,
        {key: value for key, value in result.items() if key.startswith(PREFIX)},
        None if outcome.pruned else result.get(f"best_{metric.key}"),
        result.get("seconds"),
        result.get("tokens"),
        result.get("parameters"),
        "failed" if outcome.error else "pruned" if outcome.pruned else "done",
        outcome.error,
    )


def _primary_metric(outcomes: Sequence[Outcome]) -> Metric:
    for outcome in outcomes:
        for key in outcome.result:
            name = key.removeprefix(f"best_{PREFIX}")
            if name != key and name in METRICS:
                return METRICS[name]
    return LOSS


def _rank(metric: Metric, value: float | None) -> float:
    """Return a sort key that is lower for better values, and infinite if the value is missing or not finite."""
    if value is None or not math.isfinite(value):
        return math.inf
    return value if metric.lower_is_better else -value


def _plain(value: str) -> Any:
    """Convert the value to a number if possible."""
    for convert in (int, float):
        try:
            return convert(value)
        except ValueError:
            pass
    return value
