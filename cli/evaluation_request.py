"""The `tinylm eval` options that the evaluation modules receive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinylm.run import Run


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate, on which texts, and how."""

    run: Run
    sources: list[str]
    split: str
    checkpoint: str | None
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
    hardest: int = 0
    max_pairs: int | None = None
