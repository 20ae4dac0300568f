"""Compare runs on the same text: test whether their models differ, and whether recipes with several seeds differ."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tinylm.data.shards import Shard
from tinylm.data.training_text import MeasuredOverlap, largest_share
from tinylm.evaluation import significance
from tinylm.evaluation.breakdown import TokenLosses
from tinylm.evaluation.curves import Replicates, group_by_recipe
from tinylm.evaluation.evaluate_run import TextFormat, measure_overlap, open_shard, score
from tinylm.evaluation.perplexity import EvaluationOptions
from tinylm.evaluation.significance import PairedComparison, SeedComparison
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Run
from tinylm.tokenizer import Tokenizer

SIGNIFICANCE_LEVEL = 0.05
MIN_SEEDS = 2
"""Minimum number of seeds per recipe for a comparison of recipes."""


@dataclass(frozen=True)
class ScoredRun:
    """A run and its result on the text that is used for the comparison."""

    run: Run
    checkpoint: str
    losses: TokenLosses
    bits_per_byte: float
    overlaps: list[MeasuredOverlap]

    @property
    def path(self) -> str:
        return str(self.run.path)


@dataclass(frozen=True)
class ModelTest:
    """A significance test between two models on the same text."""

    a: ScoredRun
    b: ScoredRun
    result: PairedComparison
    p_corrected: float
    """The p-value, corrected for the number of tests."""
    same_recipe: bool
    """Whether the runs differ only in the seed."""

    @property
    def better(self) -> ScoredRun | None:
        """The model with the lower loss, or None if the difference is not significant."""
        return (self.a if self.result.difference < 0 else self.b) if self.p_corrected < SIGNIFICANCE_LEVEL else None

    def as_dict(self) -> dict[str, Any]:
        result = asdict(self.result)
        return {
            "a": self.a.path,
            "b": self.b.path,
            "a_bits_per_byte": result.pop("a"),
            "b_bits_per_byte": result.pop("b"),
            **result,
            "p_corrected": self.p_corrected,
            "better": None if self.better is None else self.better.path,
            "same_recipe": self.same_recipe,
        }


@dataclass(frozen=True)
class ScoredRecipe:
    """A recipe's results for all seeds."""

    name: str
    runs: tuple[ScoredRun, ...]

    @cached_property
    def scores(self) -> list[float]:
        return [run.bits_per_byte for run in self.runs]

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))

    @property
    def deviation(self) -> float | None:
        """The standard deviation over the seeds, or None if there is only one seed."""
        return float(np.std(self.scores, ddof=1)) if len(self.runs) >= MIN_SEEDS else None

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "runs": [run.path for run in self.runs], "mean": self.mean, "deviation": self.deviation}


@dataclass(frozen=True)
class RecipeTest:
    """A significance test between two recipes, each with several seeds."""

    a: ScoredRecipe
    b: ScoredRecipe
    result: SeedComparison
    p_corrected: float

    @property
    def better(self) -> ScoredRecipe | None:
        return (self.a if self.result.difference < 0 else self.b) if self.p_corrected < SIGNIFICANCE_LEVEL else None

    def as_dict(self) -> dict[str, Any]:
        better = None if self.better is None else self.better.name
        return {"a": self.a.name, "b": self.b.name, **asdict(self.result), "p_corrected": self.p_corrected, "better": better}


@dataclass(frozen=True)
class Comparison:
    """The results of all runs on the same text. The first run is tested against each of the others."""

    runs: list[ScoredRun]
    model_tests: list[ModelTest]
    recipes: list[ScoredRecipe]
    recipe_tests: list[RecipeTest]
    """Tests of the first recipe with several seeds against every other such recipe."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "tests": [test.as_dict() for test in self.model_tests],
            "recipe_groups": [recipe.as_dict() for recipe in self.recipes],
            "recipe_tests": [test.as_dict() for test in self.recipe_tests],
            "scores": [
                {
                    "run": run.path,
                    "checkpoint": run.checkpoint,
                    "bits_per_byte": run.bits_per_byte,
                    "overlap": largest_share(run.overlaps),
                    "trained_on": [overlap.as_dict() for overlap in run.overlaps],
                }
                for run in self.runs
            ],
        }


def share_text(runs: Sequence[Run], split: str) -> bool:
    """Whether all runs have the same held-out or test text, even if their tokenizers differ.

    Raises `InputError` if a run has no such text.
    """
    return len({_text_hash(run.heldout(split), run.tokenizer) for run in runs}) == 1


def _text_hash(shard: Shard, tokenizer: Tokenizer) -> str:
    """Return a hash of a shard's text and document boundaries."""
    token_bytes, text = tokenizer.token_bytes, hashlib.sha256()
    for start, end in shard.documents():
        document = b"".join(token_bytes[id] for id in shard.tokens[start:end].tolist())
        text.update(len(document).to_bytes(8, "little") + document)
    return text.hexdigest()


def compare_runs(
    runs: Sequence[Run],
    sources: Sequence[str] = (),
    *,
    split: str = "heldout",
    stride: int | None = None,
    text_format: TextFormat = TextFormat(),
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> Comparison:
    """Compare the best checkpoints of runs on `sources`, or on their common held-out or test text if `sources` is empty.

    Raises `InputError` if the texts differ (see `share_text`) or the text is too short.
    """
    options = EvaluationOptions(stride=stride, confidence_interval=False)
    scored = [_score_run(run, sources, split, text_format, options, device, reporter) for run in runs]
    groups = group_by_recipe(runs)
    recipes = [_scored_recipe(group, scored) for group in groups]
    return Comparison(scored, _test_models(scored, groups), recipes, _test_recipes(recipes))


def _scored_recipe(group: Replicates, scored: Sequence[ScoredRun]) -> ScoredRecipe:
    return ScoredRecipe(group.name, tuple(item for item in scored if any(item.run is run for run in group.runs)))


def _test_models(scored: Sequence[ScoredRun], groups: Sequence[Replicates]) -> list[ModelTest]:
    """Test the first model against each of the others."""
    first, others = scored[0], scored[1:]
    lengths = first.run.tokenizer.token_byte_lengths
    results = [
        significance.compare_losses(
            first.losses, lengths, other.losses, other.run.tokenizer.token_byte_lengths, comparisons=len(others)
        )
        for other in others
    ]
    corrected = significance.holm([result.p_value for result in results])
    replicates = next(group.runs for group in groups if any(run is first.run for run in group.runs))
    return [
        ModelTest(first, other, result, p_value, any(run is other.run for run in replicates))
        for other, result, p_value in zip(others, results, corrected, strict=True)
    ]


def _test_recipes(recipes: Sequence[ScoredRecipe]) -> list[RecipeTest]:
    """Test the first recipe with several seeds against every other such recipe."""
    several = [recipe for recipe in recipes if len(recipe.runs) >= MIN_SEEDS]
    results = [significance.compare_seeds(several[0].scores, other.scores) for other in several[1:]]
    corrected = significance.holm([result.p_value for result in results])
    return [
        RecipeTest(several[0], other, result, p_value)
        for other, result, p_value in zip(several[1:], results, corrected, strict=True)
    ]


def _score_run(
    run: Run,
    sources: Sequence[str],
    split: str,
    text_format: TextFormat,
    options: EvaluationOptions,
    device: str,
    reporter: Reporter,
) -> ScoredRun:
    checkpoint = run.checkpoint()
    with open_shard(run, sources, split, text_format, reporter) as shard:
        losses = TokenLosses(Shard(shard.tokens[:].copy(), shard.counts, shard.end_of_text))
        overlaps = measure_overlap(run, shard, reporter)
        result = score(run, checkpoint, shard, losses, options, weights="fp32", device=device, reporter=reporter)
        del shard  # Windows cannot remove a file while it is mapped
    return ScoredRun(run, checkpoint.name, losses, result.bits_per_byte, overlaps)
