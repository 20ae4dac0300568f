"""The `tinylm eval` options that the evaluation modules receive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinylm.ensemble import Ensemble
    from tinylm.run import Run


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate, on which texts, and how."""

    ensemble: Ensemble
    """Only the evaluation of classifiers accepts more than one member."""
    sources: list[str]
    split: str
    field: str
    template: str | None
    errors: str
    pseudo: bool
    max_tokens: int | None
    mistakes: int
    no_baselines: bool
    plot: Path | None
    device: str
    json: bool
    quiet: bool
    text_field: str | None = None
    """The value of --field, or None if the option was not given."""
    label: str | None = None
    hardest: int = 0
    max_pairs: int | None = None

    @property
    def run(self) -> Run:
        return self.ensemble.members[0].run

    @property
    def checkpoint(self) -> str:
        return self.ensemble.members[0].checkpoint.name
