"""Test that vector queries return the same results as gensim and calculations by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tinylm.embedding.vectors import FORMAT, Vectors
from tinylm.errors import InputError


def as_gensim(vectors: Vectors) -> object:
    gensim_models = pytest.importorskip("gensim.models", reason="gensim has no wheel for this Python")
    keyed = gensim_models.KeyedVectors(vectors.dimensions)
    keyed.add_vectors(list(vectors.names), vectors.matrix)
    return keyed


def test_nearest_neighbors_match_a_calculation_by_hand(small: Vectors) -> None:
    neighbors = small.nearest("east", 2)
    assert [neighbor.token for neighbor in neighbors] == ["eastward", "northeast"]
    assert neighbors[0].similarity == pytest.approx(4 / math.sqrt(17))
    assert small.similarity("east", "north") == pytest.approx(0, abs=1e-7)
    assert small.similarity("east", "west") == pytest.approx(-1)


def test_nearest_neighbors_match_gensim(learned: Vectors) -> None:
    keyed = as_gensim(learned)
    for word in ("object", "function", "list"):
        ours = learned.nearest(word, 10)
        theirs = keyed.most_similar(word, topn=10)  # type: ignore[attr-defined]
        assert [neighbor.token for neighbor in ours] == [token for token, _ in theirs]
        np.testing.assert_allclose([neighbor.similarity for neighbor in ours], [score for _, score in theirs], atol=1e-5)


@pytest.mark.parametrize("words", [("function", "functions", "object"), ("list", "lists", "string")])
def test_analogies_match_gensim(learned: Vectors, words: tuple[str, str, str]) -> None:
    a, b, c = words
    keyed = as_gensim(learned)
    added = keyed.most_similar(positive=[b, c], negative=[a], topn=5)  # type: ignore[attr-defined]
    assert [neighbor.token for neighbor in learned.analogy(a, b, c, 5)] == [token for token, _ in added]
    multiplied = keyed.most_similar_cosmul(positive=[b, c], negative=[a], topn=5)  # type: ignore[attr-defined]
    ours = learned.analogy(a, b, c, 5, "3cosmul")
    assert [neighbor.token for neighbor in ours] == [token for token, _ in multiplied]
    # gensim adds 1e-6 to the divisor; tinylm adds 1e-3, as the paper does
    np.testing.assert_allclose([neighbor.similarity for neighbor in ours], [score for _, score in multiplied], rtol=5e-3)
    assert not {neighbor.token for neighbor in ours} & set(words)


def test_the_odd_one_out_matches_gensim(learned: Vectors) -> None:
    words = ["list", "tuple", "string", "module"]
    assert learned.odd_one_out(words)[0].token == as_gensim(learned).doesnt_match(words)  # type: ignore[attr-defined]


def test_asking_for_more_neighbors_than_exist_returns_all(small: Vectors) -> None:
    assert len(small.nearest("east", 100)) == 4
    assert len(small.analogy("east", "north", "west", 100)) == 2


def test_equally_similar_neighbors_are_in_table_order() -> None:
    vectors = Vectors(["a", "b", "c", "d"], np.array([[1, 0], [0, 1], [0, 1], [0, 1]], dtype=np.float32))
    assert [neighbor.token for neighbor in vectors.nearest("a", 2)] == ["b", "c"]


def test_invalid_queries_are_errors(small: Vectors) -> None:
    with pytest.raises(InputError, match="'eats' is not among the 5 vectors \\(did you mean east\\?\\)"):
        small.nearest("eats")
    with pytest.raises(InputError, match="at least three"):
        small.odd_one_out(["east", "west"])
    with pytest.raises(InputError, match="did you mean 3cosadd"):
        small.analogy("east", "west", "north", method="3cosad")


def test_lookup_also_tries_lower_case_and_a_leading_space_for_tokens() -> None:
    assert Vectors(["list"], np.ones((1, 2), np.float32)).find("List") == 0
    tokens = Vectors(["Ġlist", "Ċ", "list"], np.ones((3, 2), np.float32), byte_mapped=True)
    assert [tokens.find(word) for word in (" list", "list", "\n", "Ġlist", "set")] == [0, 2, 1, 0, None]
    assert tokens.display_name(0) == " list"
    assert Vectors(["Ġlist"], np.ones((1, 2), np.float32), byte_mapped=True).find("list") == 0


def test_a_zero_vector_has_similarity_zero() -> None:
    vectors = Vectors(["a", "b"], np.array([[0, 0], [1, 1]], dtype=np.float32))
    assert vectors.similarity("a", "b") == 0


def test_saving_and_loading_restores_every_bit(learned: Vectors, tmp_path: Path) -> None:
    learned.save(tmp_path / "v.safetensors")
    loaded = Vectors.load(tmp_path / "v.safetensors")
    assert list(loaded.names) == list(learned.names)
    assert (loaded.matrix == learned.matrix).all()
    assert learned.counts is not None
    assert loaded.counts is not None
    assert (loaded.counts == learned.counts).all()
    assert loaded.notes["method"] == "skipgram"


@pytest.mark.parametrize("rows", [np.ones((3, 2)), np.ones(2), np.array([[1.0, np.nan], [0, 0]])])
def test_inconsistent_or_non_finite_vectors_are_errors(rows: np.ndarray) -> None:
    with pytest.raises(InputError):
        Vectors(["a", "b"], rows)


@pytest.mark.parametrize(
    "header", ["", "{", "[" * 100_000, "[]", "7", "null", "{}", '{"byte_mapped": 1, "notes": 5}', '{"notes": {}}']
)
def test_vectors_with_damaged_metadata_are_rejected(header: str, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    Vectors(["a", "b"], np.eye(2, dtype=np.float32)).save(path)
    save_file(load_file(path), path, {FORMAT: header})
    with pytest.raises(InputError, match="metadata are damaged"):
        Vectors.load(path)


@pytest.mark.parametrize("ends", [[], [5, 1], [-1, 2], [[1, 2]], [2**62, 2]])
def test_vectors_with_damaged_names_are_rejected(ends: list[object], tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    Vectors(["a", "b"], np.eye(2, dtype=np.float32)).save(path)
    tensors = load_file(path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    save_file({**tensors, "name_ends": np.array(ends)}, path, metadata)
    with pytest.raises(InputError, match=r"do not match|damaged"):
        Vectors.load(path)
