"""MinHash keys agree as often as the similarity of two documents predicts."""

from __future__ import annotations

import numpy as np
import pytest

from tinylm.curation import kernels
from tinylm.curation.minhash import MinHash, shingles


def test_pairs_agree_in_a_band_as_often_as_their_similarity_predicts() -> None:
    random = np.random.default_rng(0)
    minhash = MinHash(bands=14, rows=8)
    for shared in (60, 80, 90):  # of 100 shingles in each document
        pairs = 400
        documents = []
        for _ in range(pairs):
            values = random.integers(0, 1 << 64, 200 - shared, dtype=np.uint64)
            documents += [values[:100], values[100 - shared :]]
        keys = minhash.band_keys(documents)
        found = (keys[:, ::2] == keys[:, 1::2]).any(axis=0).mean()
        expected = minhash.probability(shared / (200 - shared))
        assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / pairs) + 0.01


def test_keys_do_not_depend_on_the_other_documents() -> None:
    random = np.random.default_rng(1)
    documents = [random.integers(0, 1 << 64, size, dtype=np.uint64) for size in (1, 70_000, 3, 40_000, 500)]
    minhash = MinHash()
    one_by_one = np.concatenate([minhash.band_keys([document]) for document in documents], axis=1)
    assert (minhash.band_keys(documents) == one_by_one).all()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Hello, World! It is 12 o'clock now.", "hello world it is 34 o clock NOW"),
        ("the caf\u00e9 is open at last today", "the cafe is open at last today"),
        ("a b c d e f", "a b, c d_e\n\nf"),
        ("a b", "A B!"),
    ],
)
def test_case_punctuation_accents_and_digits_are_ignored(first: str, second: str) -> None:
    assert (shingles(first) == shingles(second)).all()


def test_similar_texts_without_spaces_share_shingles() -> None:
    text = "\u4eca\u65e5\u306f\u5929\u6c17\u304c\u826f\u3044\u306e\u3067\u516c\u5712\u306b\u884c\u304d\u307e\u3057\u305f"
    first, second = set(shingles(text).tolist()), set(shingles(text.replace("\u516c", "\u5e84")).tolist())
    assert len(first) == len(text) - 4
    assert len(first & second) == len(first) - 5


def test_a_text_without_words_has_no_shingles() -> None:
    assert len(shingles("... --- !")) == 0


def test_minima_are_those_of_plain_python() -> None:
    values = [0, 1, 5, (1 << 32) - 1, 1 << 32, (1 << 64) - 1]
    factors, offsets = [1, 3, (1 << 64) - 1, 0x9E3779B97F4A7C15], [0, (1 << 64) - 1, 7, 1 << 63]
    expected = [min((x * factor + offset) % 2**64 >> 32 for x in values) for factor, offset in zip(factors, offsets, strict=True)]
    assert kernels.minima(*(np.array(numbers, dtype=np.uint64) for numbers in (values, factors, offsets))).tolist() == expected


def test_documents_with_a_single_shingle_have_different_keys() -> None:
    keys = MinHash().band_keys([np.array([value], dtype=np.uint64) for value in (0x1234567800000001, 0x12345678FFFFFFFF)])
    assert (keys[:, 0] != keys[:, 1]).all()
