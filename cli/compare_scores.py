"""`tinylm compare` for classifiers and masked models: the difference in accuracy or masked loss on the same text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinylm.evaluation.metrics import ACCURACY, MASKED_LOSS, Metric
from tinylm.reporting import Reporter

if TYPE_CHECKING:
    from tinylm.ensemble import Ensemble
    from tinylm.evaluation.evaluate_run import TextFormat
    from tinylm.evaluation.intervals import PairedDifference

METRICS = {"classification": ACCURACY, "masked_lm": MASKED_LOSS}
"""The metric by which models with each objective are compared."""


@dataclass(frozen=True)
class ScoreComparison:
    """The scores of all models on the same text. The first model is compared with each of the others."""

    models: Sequence[Ensemble]
    metric: Metric
    differences: Sequence[PairedDifference]
    """The first model minus each of the others."""

    def as_dict(self) -> dict[str, Any]:
        """Return the keys of the JSON document of `tinylm compare`."""
        tests = []
        for model, difference in zip(self.models[1:], self.differences, strict=True):
            values = asdict(difference)
            scores = {f"{key}_{self.metric.name}": values.pop(key) for key in ("a", "b")}
            tests.append({"a": self.models[0].name, "b": model.name, **scores, **values})
        return {"tests": tests}

    def print(self, console: Console, text: str) -> None:
        """Print a table with one row for each model."""
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
        table.add_column(self.metric.label)
        table.add_column("vs. first run", justify="right")
        table.add_column("95% interval", justify="right")
        table.add_column(f"model, on {text}")
        first = self.differences[0].a
        for model, test in zip(self.models, [None, *self.differences], strict=True):
            cells = ["", ""]
            if test is not None:
                low, high = test.ci95
                interval = "" if math.isnan(low) else f"{self._difference(-high)} to {self._difference(-low)}"
                cells = [f"{self._difference(-test.difference)}{' points' * (self.metric is ACCURACY)}", interval]
            score = first if test is None else test.b
            table.add_row(self.metric.formatted(score), *cells, Text(f"{model.name} {model.checkpoint}"))
        console.print(table)

    def _difference(self, value: float) -> str:
        value += 0.0  # -0.0 becomes 0.0
        return f"{100 * value:+.2f}" if self.metric is ACCURACY else f"{value:+.4f}"


def compare(
    models: Sequence[Ensemble],
    sources: Sequence[str],
    *,
    split: str,
    text_format: TextFormat,
    device: str,
    reporter: Reporter,
) -> tuple[ScoreComparison | None, str | None]:
    """Compare models with the same objective, one of `METRICS`. If they cannot be compared, return None and the reason."""
    from tinylm.evaluation.evaluate_classifier import compare_classifiers
    from tinylm.evaluation.evaluate_masked_run import compare_masked_runs, mask_same_tokens

    metric = METRICS[models[0].members[0].run.recipe.objective.name]
    if metric is ACCURACY:
        differences = compare_classifiers(models, sources, split=split, device=device, reporter=reporter)
        return ScoreComparison(models, metric, differences), None
    runs = [model.members[0].run for model in models]
    if not mask_same_tokens(runs):
        return None, "the evaluations of these runs mask different tokens, because their tokenizers or context lengths differ"
    differences = compare_masked_runs(runs, sources, split=split, text_format=text_format, device=device, reporter=reporter)
    return ScoreComparison(models, metric, differences), None
