"""Test comparisons between runs: replicates are grouped, p-values are corrected for multiple tests, and recipes are compared."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_recipe

from tinylm.evaluation import significance
from tinylm.evaluation.comparison import compare_runs, share_text
from tinylm.evaluation.curves import comparable_metric, group_by_recipe
from tinylm.evaluation.evaluate_run import evaluate_run
from tinylm.evaluation.metrics import BITS_PER_BYTE, LOSS
from tinylm.pipeline import train
from tinylm.run import Run

MakeCopy = Callable[..., Run]


@pytest.fixture(scope="module")
def other_tokenizer_run(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on the same text with another tokenizer and a test split."""
    folder = tmp_path_factory.mktemp("runs") / "other"
    train(tiny_recipe(text_file, "modern", "tokenizer.vocab_size=300", "training.steps=3", "data.test=0.1"), folder, device="cpu")
    return Run.open(folder)


@pytest.fixture
def copy_with(tiny_run: Run, tmp_path: Path) -> MakeCopy:
    """`copy_with("b", seed=3)` copies the tiny run to the folder `b` and changes keys in its recipe."""

    def make(folder: str, **changes: object) -> Run:
        shutil.copytree(tiny_run.path, tmp_path / folder)
        recipe = tiny_run.recipe.model_copy(update=changes)
        (tmp_path / folder / "recipe.yaml").write_text(recipe.to_yaml())
        return Run.open(tmp_path / folder)

    return make


def test_holms_correction_multiplies_the_smallest_p_value_by_the_largest_factor() -> None:
    assert significance.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert significance.holm([0.5, 0.9]) == [1, 1]
    assert significance.holm([0.02]) == [0.02]
    assert significance.holm([]) == []


@pytest.mark.parametrize("sizes", [(2, 2), (3, 5), (8, 3)])
def test_welchs_t_test_between_groups_of_seeds_matches_scipy(sizes: tuple[int, int]) -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(1)
    a, b = (generator.normal(1.5, 0.02, size).tolist() for size in sizes)
    result, expected = significance.compare_seeds(a, b), stats.ttest_ind(a, b, equal_var=False)
    assert result.p_value == pytest.approx(expected.pvalue, rel=1e-4)
    interval = expected.confidence_interval(0.95)
    assert result.ci95 == pytest.approx((interval.low, interval.high), rel=1e-4)


@pytest.mark.parametrize("degrees", [1, 2.5, 40])
@pytest.mark.parametrize("t", [0, 0.3, 2, -9, 200])
def test_the_t_test_matches_scipy(t: float, degrees: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert significance.t_test(t, degrees) == pytest.approx(2 * stats.t.sf(abs(t), degrees), rel=1e-4, abs=1e-300)


def test_runs_that_differ_only_in_seed_and_name_are_grouped(tiny_run: Run, copy_with: MakeCopy) -> None:
    other_recipe = tiny_run.recipe.training.model_copy(update={"clip_grad_norm": 0.5})
    runs = [
        tiny_run,
        copy_with("seed2", seed=2, name="another"),
        copy_with("clip", training=other_recipe),
        copy_with("seed3", seed=3),
        copy_with("again", seed=2),
        copy_with("clip2", seed=2, training=other_recipe),
    ]
    groups = [[run.name for run in group.runs] for group in group_by_recipe(runs)]
    assert groups == [["tiny", "seed2", "seed3"], ["clip", "clip2"], ["again"]]


def test_an_unfinished_run_is_not_a_replicate(tiny_run: Run, copy_with: MakeCopy) -> None:
    shorter = copy_with("shorter", seed=2)
    shutil.rmtree(shorter.checkpoint("last").path)
    assert [len(group.runs) for group in group_by_recipe([tiny_run, shorter])] == [1, 1]


def test_runs_that_differ_only_in_their_seeds_are_marked_and_p_values_are_corrected(tiny_run: Run, copy_with: MakeCopy) -> None:
    clip = tiny_run.recipe.training.model_copy(update={"clip_grad_norm": 0.5})
    runs = [tiny_run, copy_with("b", seed=2), copy_with("c", training=clip), copy_with("d", seed=2, training=clip)]
    result = compare_runs(runs, device="cpu")
    assert [test.same_recipe for test in result.model_tests] == [True, False, False]
    assert all(test.better is None for test in result.model_tests), "the weights of all runs are the same"
    assert [(recipe.mean, recipe.deviation) for recipe in result.recipes] == [(result.runs[0].bits_per_byte, 0)] * 2
    assert [(test.result.difference, test.better) for test in result.recipe_tests] == [(0, None)]
    assert result.runs[0].bits_per_byte == pytest.approx(evaluate_run(tiny_run, device="cpu").perplexity.bits_per_byte)
    document = result.as_dict()
    assert [test["p_corrected"] for test in document["tests"]] == [1, 1, 1]
    assert len(document["recipe_groups"][1]["runs"]) == 2


def test_the_better_model_is_found_with_different_tokenizers(tiny_run: Run, other_tokenizer_run: Run, text_file: Path) -> None:
    (test,) = compare_runs([other_tokenizer_run, tiny_run], [str(text_file)], device="cpu").model_tests
    assert test.better is not None
    assert test.better.is_run(tiny_run)
    assert test.result.simultaneous_ci95 == test.result.ci95
    assert comparable_metric([tiny_run, other_tokenizer_run]) is BITS_PER_BYTE
    assert comparable_metric([tiny_run, tiny_run]) is LOSS


def test_runs_share_a_text_only_if_its_content_is_the_same(tiny_run: Run, other_tokenizer_run: Run) -> None:
    assert share_text([tiny_run, tiny_run], "heldout")
    assert not share_text([tiny_run, other_tokenizer_run], "heldout")
    assert share_text([other_tokenizer_run, other_tokenizer_run], "test")


def test_an_evaluation_reports_its_split_and_the_overlap_with_the_training_text(
    tiny_run: Run, other_tokenizer_run: Run, text_file: Path
) -> None:
    heldout = evaluate_run(other_tokenizer_run, device="cpu").as_dict()
    assert (heldout["split"], heldout["chosen_by_split"], heldout["text"]) == ("heldout", True, "the run's held-out text")
    test = evaluate_run(other_tokenizer_run, split="test", device="cpu").as_dict()
    assert (test["split"], test["chosen_by_split"], test["text"]) == ("test", False, "the run's test text")
    assert test["bytes"] != heldout["bytes"]
    own = evaluate_run(tiny_run, [str(text_file)], device="cpu").as_dict()
    assert own["split"] is None
    assert own["overlap"] > 0.85, "the training text is 90% of the file"
    assert own["trained_on"][0]["share"] == own["overlap"]
