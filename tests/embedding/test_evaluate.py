"""Test that evaluation on public test sets returns the same results as gensim and SciPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tinylm.embedding.evaluate import AnalogyResult, SimilarityResult, correlation, evaluate, ranks
from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError


def test_the_results_match_gensim(learned: Vectors) -> None:
    """Use gensim's test sets, and random vectors for the words in them."""
    models = pytest.importorskip("gensim.models", reason="gensim is not installed")
    from gensim.test.utils import datapath

    questions, pairs = datapath("questions-words.txt"), datapath("wordsim353.tsv")
    words = [word for line in Path(questions).read_text().splitlines() if line[0] != ":" for word in line.lower().split()]
    words += [word.lower() for line in Path(pairs).read_text().splitlines() for word in line.split("\t")[:2]]
    names = list(dict.fromkeys(words))[:600]
    matrix = np.random.default_rng(0).standard_normal((len(names), 4)).astype(np.float32)
    keyed = models.KeyedVectors(4)
    keyed.add_vectors(names, matrix)
    vectors = Vectors(names, matrix)

    theirs, sections = keyed.evaluate_word_analogies(questions, dummy4unknown=False)
    ours = evaluate(vectors, Path(questions))
    assert isinstance(ours, AnalogyResult)
    asked = sections[-1]
    assert (ours.correct, ours.covered) == (len(asked["correct"]), len(asked["correct"]) + len(asked["incorrect"]))
    assert ours.correct > 0
    assert ours.accuracy == pytest.approx(theirs)
    assert ours.total == 19_544
    assert ours.coverage == ours.covered / 19_544

    pearson, spearman, unknown = keyed.evaluate_word_pairs(pairs)
    similarity = evaluate(vectors, Path(pairs))
    assert isinstance(similarity, SimilarityResult)
    assert similarity.pairs == 353
    assert similarity.spearman == pytest.approx(spearman[0])
    assert similarity.pearson == pytest.approx(pearson[0], abs=1e-6)
    assert 100 * (1 - similarity.covered / similarity.pairs) == pytest.approx(unknown)


def test_tied_values_share_their_mean_rank() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert correlation(np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.0, 3.0])) is None
    assert correlation(np.array([1.0, 2.0]), np.array([1.0, 2.0])) is None


def test_the_accuracy_is_none_if_no_question_is_covered(small: Vectors, tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text(": capitals\nAthens Greece Oslo Norway\n")
    result = evaluate(small, path)
    assert isinstance(result, AnalogyResult)
    assert (result.accuracy, result.coverage, result.total) == (None, 0, 1)


def test_candidates_can_be_limited_to_the_most_frequent_names(small: Vectors, tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("east west north eastward\n")
    unlimited, limited = evaluate(small, path, max_names=None), evaluate(small, path, max_names=4)
    assert isinstance(unlimited, AnalogyResult)
    assert isinstance(limited, AnalogyResult)
    assert (unlimited.covered, limited.covered) == (1, 0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "the file contains no questions"),
        (": a\n", "the file contains no questions"),
        (": a\none two three\n", ":2: an analogy has four words, not 3"),
        ("one\ttwo\t3\none\ttwo\n", ":2: a line must have two words and a number"),
        ("one,two,three\nfour,five,six\n", ":2: a line must have two words and a number"),
    ],
)
def test_malformed_files_are_errors(small: Vectors, tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "questions.txt"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        evaluate(small, path)
    assert expected in str(error.value)
