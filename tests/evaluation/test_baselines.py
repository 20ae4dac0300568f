"""Baselines against a slow model made of dictionaries, and against what any compressor must do."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from tinylm.data.shards import Counts, Shard
from tinylm.evaluation.baselines import KneserNey, compressor_bits, kneser_ney_bits

END, VOCABULARY = 0, 12
Gram = tuple[int, ...]


def _shard(*documents: list[int]) -> Shard:
    tokens = np.array([END, *(id for document in documents for id in (*document, END))], dtype=np.uint16)
    size = sum(map(len, documents))
    return Shard(tokens, Counts(len(documents), size, size, size, 0), END)


def _texts(seed: int, count: int) -> list[list[int]]:
    """Documents with habits: each token leans on the two before it."""
    generator = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        document = [1, 2]
        for _ in range(int(generator.integers(0, 40))):
            document.append(1 + int(document[-1] * 2 + document[-2] + generator.integers(0, 3)) % (VOCABULARY - 1))
        documents.append(document)
    return documents


class _Slow:
    """Interpolated modified Kneser-Ney by its definition, with dictionaries; documents are padded with the end of text."""

    def __init__(self, documents: list[list[int]], order: int) -> None:
        self.order = order
        raw: list[Counter[Gram]] = [Counter() for _ in range(order + 1)]
        for document in documents:
            read = [END, *document, END]
            for k in range(1, order + 1):
                raw[k].update(tuple(read[at : at + k]) for at in range(len(read) - k + 1))
        raw[1][(END,)] -= len(documents) - 1  # the end of one document is the beginning of the next
        self.counts: list[dict[Gram, int]] = [{} for _ in range(order + 1)]
        self.counts[order] = dict(raw[order])
        for k in range(1, order):
            before: dict[Gram, set[int]] = defaultdict(set)
            for gram in raw[k + 1]:
                before[gram[1:]].add(gram[0])
            self.counts[k] = {gram: len(before[gram]) for gram in raw[k]}
        self.discounts = [[0.0] * 4] + [self._discounts(self.counts[k]) for k in range(1, order + 1)]

    @staticmethod
    def _discounts(counts: dict[Gram, int]) -> list[float]:
        n = [max(sum(count == times for count in counts.values()), 1) for times in (1, 2, 3, 4)]
        y = n[0] / (n[0] + 2 * n[1])
        return [0.0, *(min(max(i - (i + 1) * y * n[i] / n[i - 1], 0), i) for i in (1, 2, 3))]

    def probability(self, context: Gram, token: int) -> float:
        k = len(context) + 1
        below = 1 / VOCABULARY if k == 1 else self.probability(context[1:], token)
        following = {gram[-1]: count for gram, count in self.counts[k].items() if gram[:-1] == context and count}
        total = sum(following.values())
        if not total:
            return below
        discount = {one: self.discounts[k][min(count, 3)] for one, count in following.items()}
        kept = following.get(token, 0) - discount.get(token, 0.0)
        return (kept + sum(discount.values()) * below) / total


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_is_its_definition(order: int) -> None:
    train, heldout = _texts(1, 25), [*_texts(2, 4), [11, 11, 11]]
    fast, slow = KneserNey(_shard(*train), VOCABULARY, order).logprobs(_shard(*heldout)), _Slow(train, order)
    expected = [math.nan]
    for document in heldout:
        read = [END, *document]
        for at in range(1, len(read)):
            expected.append(math.log(slow.probability(tuple(read[max(0, at - order + 1) : at]), read[at])))
        expected.append(math.nan)
    np.testing.assert_allclose(fast, expected, rtol=1e-9)


@pytest.mark.parametrize("order", [1, 3, 5])
def test_its_probabilities_sum_to_one(order: int) -> None:
    model = KneserNey(_shard(*_texts(1, 25)), VOCABULARY, order)
    for context in ([], [1], [1, 2], [5, 9, 1, 4], [11, 11, 11, 11]):
        total = sum(math.exp(model.logprobs(_shard([*context, token]))[-2]) for token in range(1, VOCABULARY))
        end = _Slow(_texts(1, 25), order).probability(tuple([END, *context][-(order - 1) :] if order > 1 else []), END)
        assert total + end == pytest.approx(1, abs=1e-9)


def test_more_context_helps_on_a_text_that_has_habits() -> None:
    found = list(kneser_ney_bits(_shard(*_texts(1, 200)), _shard(*_texts(2, 40)), VOCABULARY, 1000).values())
    assert all(longer < shorter for shorter, longer in pairwise(found[:3]))


def test_a_compressor_that_has_seen_the_text_needs_almost_nothing(english: str) -> None:
    text = english[:40_000].encode()
    known, unknown = compressor_bits(text, text[:20_000]), compressor_bits(b"", text[:20_000])
    assert known.keys() == unknown.keys()
    assert any(name.startswith("xz") for name in known)
    for name in known:
        assert known[name] < 0.1 < 1.5 < unknown[name] < 4
