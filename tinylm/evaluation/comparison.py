"""Compare runs or ensembles on the same text: test whether they differ, and whether recipes with several seeds differ."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tinylm.data.shards import Shard
from tinylm.data.training_text import MeasuredOverlap, largest_share
from tinylm.ensemble import Ensemble
from tinylm.evaluation import ensembles, significance
from tinylm.evaluation.breakdown import TokenLosses
from tinylm.evaluation.curves import Replicates, group_by_recipe
from tinylm.evaluation.evaluate_run import (
    TextFormat,
    check_same_text,
    measure_overlaps,
    open_shard,
    score_members,
    summarize_members,
)
from tinylm.evaluation.perplexity import EvaluationOptions
from tinylm.evaluation.significance import PairedComparison, SeedComparison
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Run
from tinylm.tokenizer import Tokenizer

SIGNIFICANCE_LEVEL = 0.05
MIN_SEEDS = 2
"""Minimum number of seeds per recipe for a comparison of recipes."""


@dataclass(frozen=True)
class ScoredModel:
    """A run or an ensemble, and its result on the text that is used for the comparison."""

    model: Ensemble
    losses: TokenLosses
    bits_per_byte: float
    overlaps: list[MeasuredOverlap]

    @property
    def path(self) -> str:
        """The path of the run. The paths of an ensemble's runs are separated by `+`."""
        return self.model.name

    @property
    def checkpoint(self) -> str:
        return self.model.checkpoint

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.members[0].run.tokenizer

    def is_run(self, run: Run) -> bool:
        """Whether this is a single model of `run`."""
        return self.model.is_single and self.model.members[0].run is run


@dataclass(frozen=True)
class ModelTest:
    """A significance test between two models on the same text."""

    a: ScoredModel
    b: ScoredModel
    result: PairedComparison
    p_corrected: float
    """The p-value, corrected for the number of tests."""
    same_recipe: bool
    """Whether the runs differ only in the seed."""

    @property
    def better(self) -> ScoredModel | None:
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
    runs: tuple[ScoredModel, ...]

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

    runs: list[ScoredModel]
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
    runs: Sequence[Run | Ensemble],
    sources: Sequence[str] = (),
    *,
    split: str = "heldout",
    stride: int | None = None,
    text_format: TextFormat = TextFormat(),
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> Comparison:
    """Compare the best checkpoints of runs, or ensembles, on `sources`. If it is empty, use their common held-out or test text.

    Raises `InputError` if the texts differ (see `share_text`) or the text is too short.
    """
    options = EvaluationOptions(stride=stride, confidence_interval=False)
    models = [run if isinstance(run, Ensemble) else Ensemble.of([run]) for run in runs]
    scored = [_score_model(model, sources, split, text_format, options, device, reporter) for model in models]
    groups = group_by_recipe([model.members[0].run for model in models if model.is_single])
    recipes = [_scored_recipe(group, scored) for group in groups]
    return Comparison(scored, _test_models(scored, groups), recipes, _test_recipes(recipes))


def _scored_recipe(group: Replicates, scored: Sequence[ScoredModel]) -> ScoredRecipe:
    return ScoredRecipe(group.name, tuple(item for item in scored if any(map(item.is_run, group.runs))))


def _test_models(scored: Sequence[ScoredModel], groups: Sequence[Replicates]) -> list[ModelTest]:
    """Test the first model against each of the others."""
    first, others = scored[0], scored[1:]
    lengths = first.tokenizer.token_byte_lengths
    results = [
        significance.compare_losses(
            first.losses, lengths, other.losses, other.tokenizer.token_byte_lengths, comparisons=len(others)
        )
        for other in others
    ]
    corrected = significance.holm([result.p_value for result in results])
    replicates = next((group.runs for group in groups if any(map(first.is_run, group.runs))), ())
    return [
        ModelTest(first, other, result, p_value, any(map(other.is_run, replicates)))
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


def _score_model(
    model: Ensemble,
    sources: Sequence[str],
    split: str,
    text_format: TextFormat,
    options: EvaluationOptions,
    device: str,
    reporter: Reporter,
) -> ScoredModel:
    first = model.members[0].run
    with open_shard(first, sources, split, text_format, reporter) as mapped:
        if not sources:
            check_same_text(model, mapped, split)
        shard = Shard(mapped.tokens[:].copy(), mapped.counts, mapped.end_of_text)
        del mapped  # Windows cannot remove a file while it is mapped
    overlaps = measure_overlaps(model, shard, reporter)
    members, member_losses = score_members(model, shard, options, weights="fp32", device=device, reporter=reporter)
    losses = ensembles.average(member_losses)
    result = summarize_members(members, losses, first.tokenizer, options)
    return ScoredModel(model, losses, result.bits_per_byte, overlaps)
