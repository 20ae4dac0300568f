"""Training curves of runs, the metric on which runs can be compared, and groups of replicates. This module does not import
torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinylm.evaluation.metrics import BITS_PER_BYTE, LOSS, PERPLEXITY, Metric, primary_metric
from tinylm.recipe import Recipe
from tinylm.recipe.effects import settings_without_seed
from tinylm.run import EMBEDDINGS_MARKER, Run


@dataclass(frozen=True)
class Curve:
    """A training curve. `values[i]` was logged after training on `tokens[i]` tokens."""

    tokens: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Replicates:
    """Runs whose recipes differ only in the seed. All were trained for the same number of steps on the same text."""

    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """The path of the first run."""
        return str(self.runs[0].path)


def comparable_metric(runs: Sequence[Run]) -> Metric:
    """Return the primary metric, or bits per byte if the primary metric depends on the tokenizer and the tokenizers differ."""
    metric = primary_metric(line for run in runs for line in run.metrics())
    return BITS_PER_BYTE if metric in (LOSS, PERPLEXITY) and tokenizers_differ(runs) else metric


def tokenizers_differ(runs: Sequence[Run]) -> bool:
    """Return whether the tokenizers differ, which makes losses per token incomparable. Runs without a tokenizer are ignored."""
    return len({run.tokenizer.fingerprint for run in runs if (run.path / "tokenizer.json").exists()}) > 1


def curve(run: Run, key: str, kind: str) -> Curve:
    """Return the values of `key` from the lines in metrics.jsonl whose kind is `kind` (`step` or `eval`)."""
    lines = [line for line in run.metrics() if line["kind"] == kind and line.get(key) is not None]
    return Curve(np.array([line["tokens"] for line in lines]), np.array([line[key] for line in lines], dtype=float))


def group_by_recipe(runs: Sequence[Run]) -> list[Replicates]:
    """Group runs that are replicates of each other. Groups are ordered by their first run. A repeated seed starts a new group."""
    groups: dict[str, dict[int, Run]] = {}
    for number, run in enumerate(runs):
        key, seed = _replicate_key(run), _seed(run)
        if seed is None or seed in groups.get(key, {}):
            key = f"{number}"
        groups.setdefault(key, {})[seed or 0] = run
    return [Replicates(tuple(group.values())) for group in groups.values()]


def _seed(run: Run) -> int | None:
    """Return the seed of a language model run, or None for embeddings, which are never grouped."""
    return None if (run.path / EMBEDDINGS_MARKER).exists() else run.recipe.seed


def _replicate_key(run: Run) -> str:
    """Return a key that is equal for runs that differ only in their seed."""
    if _seed(run) is None:
        return str(run.path)
    recipe: Recipe = run.recipe
    saved = run.checkpoints()
    state: dict[str, Any] = saved[-1].state if saved else {}
    settings = {**settings_without_seed(recipe), "step": state.get("step"), "data": state.get("fingerprints")}
    return json.dumps(settings, sort_keys=True, default=str)
