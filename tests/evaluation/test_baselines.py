"""Test that longer n-grams are better baselines, and that compressors reach plausible sizes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from tinylm.data.shards import Counts, Shard
from tinylm.evaluation.baselines import compressor_bits, kneser_ney_bits

END, VOCAB_SIZE = 0, 12


def _shard(*documents: list[int]) -> Shard:
    tokens = np.array([END, *(id for document in documents for id in (*document, END))], dtype=np.uint16)
    size = sum(map(len, documents))
    return Shard(tokens, Counts(len(documents), size, size, size, 0), END)


def _texts(seed: int, count: int) -> list[list[int]]:
    """Return documents in which each token depends on the two tokens before it."""
    generator = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        document = [1, 2]
        for _ in range(int(generator.integers(0, 40))):
            document.append(1 + int(document[-1] * 2 + document[-2] + generator.integers(0, 3)) % (VOCAB_SIZE - 1))
        documents.append(document)
    return documents


def test_longer_n_grams_predict_dependent_tokens_better() -> None:
    bits = list(kneser_ney_bits(_shard(*_texts(1, 200)), _shard(*_texts(2, 40)), VOCAB_SIZE, 1000).values())
    assert all(longer < shorter for shorter, longer in pairwise(bits[:3]))


def test_compressors_need_few_bits_for_a_text_that_is_in_the_dictionary(english: str) -> None:
    text = english[:40_000].encode()
    known, unknown = compressor_bits(text, text[:20_000]), compressor_bits(b"", text[:20_000])
    assert known.keys() == unknown.keys()
    assert any(name.startswith("xz") for name in known)
    for name in known:
        assert known[name] < 0.1 < 1.5 < unknown[name] < 4
