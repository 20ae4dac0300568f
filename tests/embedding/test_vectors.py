"""Vectors answer questions as a hand computation and gensim do."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError

gensim_models = pytest.importorskip("gensim.models", reason="gensim has no wheel for this Python")


def as_gensim(vectors: Vectors) -> object:
    keyed = gensim_models.KeyedVectors(vectors.dimensions)
    keyed.add_vectors(list(vectors.names), vectors.matrix)
    return keyed


def test_nearest_by_hand(small: Vectors) -> None:
    found = small.nearest("east", 2)
    assert [one.token for one in found] == ["eastward", "northeast"]
    assert found[0].similarity == pytest.approx(4 / math.sqrt(17))
    assert small.similarity("east", "north") == pytest.approx(0, abs=1e-7)
    assert small.similarity("east", "west") == pytest.approx(-1)


def test_nearest_as_gensim_has_it(learned: Vectors) -> None:
    keyed = as_gensim(learned)
    for word in ("object", "function", "list"):
        ours = learned.nearest(word, 10)
        theirs = keyed.most_similar(word, topn=10)  # type: ignore[attr-defined]
        assert [one.token for one in ours] == [token for token, _ in theirs]
        np.testing.assert_allclose([one.similarity for one in ours], [score for _, score in theirs], atol=1e-5)


@pytest.mark.parametrize("words", [("function", "functions", "object"), ("list", "lists", "string")])
def test_analogies_as_gensim_has_them(learned: Vectors, words: tuple[str, str, str]) -> None:
    a, b, c = words
    keyed = as_gensim(learned)
    added = keyed.most_similar(positive=[b, c], negative=[a], topn=5)  # type: ignore[attr-defined]
    assert [one.token for one in learned.analogy(a, b, c, 5)] == [token for token, _ in added]
    multiplied = keyed.most_similar_cosmul(positive=[b, c], negative=[a], topn=5)  # type: ignore[attr-defined]
    ours = learned.analogy(a, b, c, 5, "3cosmul")
    assert [one.token for one in ours] == [token for token, _ in multiplied]
    # gensim adds 1e-6 to the divisor where the paper, and we, add 1e-3
    np.testing.assert_allclose([one.similarity for one in ours], [score for _, score in multiplied], rtol=5e-3)
    assert not {one.token for one in ours} & set(words)


def test_the_odd_one_as_gensim_has_it(learned: Vectors) -> None:
    words = ["list", "tuple", "string", "module"]
    assert learned.odd_one_out(words)[0].token == as_gensim(learned).doesnt_match(words)  # type: ignore[attr-defined]


def test_more_neighbours_than_there_are(small: Vectors) -> None:
    assert len(small.nearest("east", 100)) == 4
    assert len(small.analogy("east", "north", "west", 100)) == 2


def test_equal_neighbours_come_in_the_order_of_the_table() -> None:
    vectors = Vectors(["a", "b", "c", "d"], np.array([[1, 0], [0, 1], [0, 1], [0, 1]], dtype=np.float32))
    assert [one.token for one in vectors.nearest("a", 2)] == ["b", "c"]


def test_what_cannot_be_asked(small: Vectors) -> None:
    with pytest.raises(InputError, match="no vector for 'eats' among 5 \\(did you mean east\\?\\)"):
        small.nearest("eats")
    with pytest.raises(InputError, match="at least three"):
        small.odd_one_out(["east", "west"])
    with pytest.raises(InputError, match="did you mean 3cosadd"):
        small.analogy("east", "west", "north", method="3cosad")


def test_words_are_found_in_lower_case_and_tokens_after_a_space() -> None:
    assert Vectors(["list"], np.ones((1, 2), np.float32)).find("List") == 0
    tokens = Vectors(["Ġlist", "Ċ", "list"], np.ones((3, 2), np.float32), byte_mapped=True)
    assert [tokens.find(word) for word in (" list", "list", "\n", "Ġlist", "set")] == [0, 2, 1, 0, None]
    assert tokens.shown(0) == " list"
    assert Vectors(["Ġlist"], np.ones((1, 2), np.float32), byte_mapped=True).find("list") == 0


def test_a_zero_vector_is_like_nothing() -> None:
    vectors = Vectors(["a", "b"], np.array([[0, 0], [1, 1]], dtype=np.float32))
    assert vectors.similarity("a", "b") == 0


def test_saved_and_loaded_to_the_bit(learned: Vectors, tmp_path: Path) -> None:
    learned.save(tmp_path / "v.safetensors")
    again = Vectors.load(tmp_path / "v.safetensors")
    assert list(again.names) == list(learned.names)
    assert (again.matrix == learned.matrix).all()
    assert learned.counts is not None
    assert again.counts is not None
    assert (again.counts == learned.counts).all()
    assert again.notes["method"] == "skipgram"


@pytest.mark.parametrize("rows", [np.ones((3, 2)), np.ones(2), np.array([[1.0, np.nan], [0, 0]])])
def test_parts_that_do_not_fit(rows: np.ndarray) -> None:
    with pytest.raises(InputError):
        Vectors(["a", "b"], rows)
