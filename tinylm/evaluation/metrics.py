"""Metrics on held-out data: the definition of each metric, and the values from one evaluation.

The objective determines which metrics an evaluation computes and which one is the primary metric. The primary metric selects the
best checkpoint, and every view shows it first. Files and `--json` store a metric under the key `val_` plus its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PREFIX = "val_"
BY_SOURCE = "by_source"
"""The key of the metrics on each source of a mixture."""


@dataclass(frozen=True)
class Metric:
    """The definition of a metric."""

    name: str
    label: str
    """The name shown to users."""
    unit: str
    """The unit. Empty if the metric has no unit, and equal to the label if the label is a unit, such as `bits per byte`."""
    lower_is_better: bool
    format: str
    """Format specification for values, such as `.4f`."""

    @property
    def key(self) -> str:
        """The key in metrics.jsonl, state.json and `tinylm train --json`."""
        return PREFIX + self.name

    def formatted(self, value: float) -> str:
        return format(value, self.format)

    def described(self, value: float, *, unit: bool = False) -> str:
        """Format a value with its label and optionally its unit: `loss 2.5000 nats per token`, `1.2000 bits per byte`."""
        text = self.formatted(value)
        if self.unit == self.label:
            return f"{text} {self.label}"
        return f"{self.label} {text}" + (f" {self.unit}" if unit and self.unit else "")

    @property
    def heading(self) -> str:
        """The heading for a column of values."""
        return self.label if self.unit == self.label else f"held-out {self.label}"

    @property
    def axis(self) -> str:
        """The label for a plot axis: the unit, or the metric's label if there is no unit."""
        return f"{self.unit or self.label}{self.direction}"

    @property
    def direction(self) -> str:
        """A note to append to titles. Empty if lower is better, as for losses."""
        return "" if self.lower_is_better else " (higher is better)"

    def better(self, value: float, other: float | None) -> bool:
        """Whether `value` is better than `other`. Any finite value is better than None. An equal value is not better."""
        if other is None or not math.isfinite(value):
            return math.isfinite(value)
        return value < other if self.lower_is_better else value > other


LOSS = Metric("loss", "loss", "nats per token", lower_is_better=True, format=".4f")
BITS_PER_BYTE = Metric("bits_per_byte", "bits per byte", "bits per byte", lower_is_better=True, format=".4f")
PERPLEXITY = Metric("perplexity", "perplexity", "", lower_is_better=True, format=".2f")

MASKED_LOSS = Metric("masked_loss", "masked loss", "nats per masked token", lower_is_better=True, format=".4f")
MASKED_ACCURACY = Metric("masked_accuracy", "masked accuracy", "", lower_is_better=False, format=".2%")
LABEL_LOSS = Metric("label_loss", "label loss", "nats per text", lower_is_better=True, format=".4f")
ACCURACY = Metric("accuracy", "accuracy", "", lower_is_better=False, format=".2%")
MACRO_F1 = Metric("macro_f1", "macro F1", "", lower_is_better=False, format=".4f")
PREFERENCE_LOSS = Metric("preference_loss", "preference loss", "nats per pair", lower_is_better=True, format=".4f")
REWARD_MARGIN = Metric("reward_margin", "reward margin", "", lower_is_better=False, format=".4f")
BLEU = Metric("bleu", "BLEU", "", lower_is_better=False, format=".2f")

_ALL = (
    LOSS,
    BITS_PER_BYTE,
    PERPLEXITY,
    MASKED_LOSS,
    MASKED_ACCURACY,
    LABEL_LOSS,
    ACCURACY,
    MACRO_F1,
    BLEU,
    PREFERENCE_LOSS,
    REWARD_MARGIN,
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
"""All metrics by name. Everything that displays metrics uses these labels, directions and formats."""

LANGUAGE_MODEL = (LOSS, BITS_PER_BYTE)
"""The metrics of language models during training, primary metric first."""
MASKED_LM = (MASKED_LOSS, MASKED_ACCURACY)
"""The metrics of masked language models."""
TRANSLATION = (LOSS,)
"""The metrics of translation models if the loss selects the best checkpoint."""
TRANSLATION_BY_BLEU = (BLEU, LOSS)
"""The metrics of translation models if BLEU selects the best checkpoint."""
CLASSIFIER = (ACCURACY, LABEL_LOSS, MACRO_F1)
"""The metrics of classifiers."""
PREFERENCE = (PREFERENCE_LOSS, ACCURACY, REWARD_MARGIN)
"""The metrics of models that are trained on preferences. The accuracy is the share of pairs whose chosen answer has the larger
reward."""


@dataclass(frozen=True)
class Metrics:
    """The values from one evaluation by metric name. All names are keys of `METRICS`."""

    primary: str
    values: Mapping[str, float]
    by_source: Mapping[str, Metrics] = field(default_factory=dict)
    """If the held-out data is a mixture: the metrics on each source."""

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    @property
    def metric(self) -> Metric:
        """The primary metric."""
        return METRICS[self.primary]

    @property
    def value(self) -> float:
        """The value of the primary metric."""
        return self.values[self.primary]

    def items(self) -> list[tuple[Metric, float]]:
        """Return the metrics with their values, primary metric first."""
        others = [name for name in self.values if name != self.primary]
        return [(METRICS[name], self.values[name]) for name in (self.primary, *others)]

    def as_dict(self) -> dict[str, Any]:
        """Return the values by key (`val_` plus name), primary metric first, and `by_source` if the held-out data is a mixture."""
        values: dict[str, Any] = {metric.key: value for metric, value in self.items()}
        return values | ({BY_SOURCE: {name: part.as_dict() for name, part in self.by_source.items()}} if self.by_source else {})

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Metrics | None:
        """Read metrics from a dictionary with keys such as `val_loss`. Returns None if the dictionary contains no metrics.

        The first key is the primary metric. Unknown metrics are skipped. None stands for a non-finite number and becomes NaN.
        """
        values = {
            key.removeprefix(PREFIX): math.nan if value is None else float(value)
            for key, value in document.items()
            if key.startswith(PREFIX) and key.removeprefix(PREFIX) in METRICS
        }
        if not values:
            return None
        parts = {name: cls.from_dict(part) for name, part in document.get(BY_SOURCE, {}).items()}
        return cls(next(iter(values)), values, {name: part for name, part in parts.items() if part is not None})


def best_index(evaluations: Sequence[Metrics]) -> int | None:
    """Return the index of the first evaluation with the best value of the primary metric, or None if no value is finite.

    The last evaluation determines the primary metric. Evaluations with a different primary metric are ignored.
    """
    chosen: int | None = None
    for index, metrics in enumerate(evaluations):
        comparable = metrics.primary == evaluations[-1].primary
        if comparable and metrics.metric.better(metrics.value, None if chosen is None else evaluations[chosen].value):
            chosen = index
    return chosen


def primary_metric(lines: Iterable[Mapping[str, Any]]) -> Metric:
    """Return the primary metric in the first line of metrics.jsonl that contains metrics, or the loss if there is no such line."""
    evaluations = (metrics for line in lines if (metrics := Metrics.from_dict(line)) is not None)
    return next((metrics.metric for metrics in evaluations), LOSS)


def perplexity_of(loss: float) -> float:
    """Return the perplexity for a loss in nats per token. Losses above 700 are clamped to 700 to avoid overflow."""
    return math.exp(min(loss, 700.0))
