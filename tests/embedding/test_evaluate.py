"""The public tests of vectors, judged as gensim and SciPy judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tinylm.embedding.evaluate import Analogies, Similarities, correlation, evaluate, ranks
from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError


def test_as_gensim_judges(learned: Vectors) -> None:
    """On files that gensim brings along, with vectors of words that are in them."""
    models = pytest.importorskip("gensim.models", reason="gensim has no wheel for this Python")
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
    assert isinstance(ours, Analogies)
    asked = sections[-1]
    assert (ours.correct, ours.covered) == (len(asked["correct"]), len(asked["correct"]) + len(asked["incorrect"]))
    assert ours.correct > 0
    assert ours.accuracy == pytest.approx(theirs)
    assert ours.total == 19_544
    assert ours.coverage == ours.covered / 19_544

    pearson, spearman, unknown = keyed.evaluate_word_pairs(pairs)
    found = evaluate(vectors, Path(pairs))
    assert isinstance(found, Similarities)
    assert found.pairs == 353
    assert found.spearman == pytest.approx(spearman[0])
    assert found.pearson == pytest.approx(pearson[0], abs=1e-6)
    assert 100 * (1 - found.covered / found.pairs) == pytest.approx(unknown)


def test_ranks_share_ties() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert correlation(np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.0, 3.0])) is None
    assert correlation(np.array([1.0, 2.0]), np.array([1.0, 2.0])) is None


def test_nothing_covered(small: Vectors, tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text(": capitals\nAthens Greece Oslo Norway\n")
    found = evaluate(small, path)
    assert isinstance(found, Analogies)
    assert (found.accuracy, found.coverage, found.total) == (None, 0, 1)


def test_answers_can_come_from_the_frequent_names_only(small: Vectors, tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("east west north eastward\n")
    everything, some = evaluate(small, path, most=None), evaluate(small, path, most=4)
    assert isinstance(everything, Analogies)
    assert isinstance(some, Analogies)
    assert (everything.covered, some.covered) == (1, 0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "no questions in this file"),
        (": a\n", "no questions in this file"),
        (": a\none two three\n", ":2: an analogy has four words, not 3"),
        ("one\ttwo\t3\none\ttwo\n", ":2: wants two words and a number"),
        ("one,two,three\nfour,five,six\n", ":2: wants two words and a number"),
    ],
)
def test_files_that_ask_nothing(small: Vectors, tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "questions.txt"
    path.write_text(content)
    with pytest.raises(InputError) as told:
        evaluate(small, path)
    assert expected in str(told.value)
