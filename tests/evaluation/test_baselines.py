"""N-gram models match a slow implementation that uses dictionaries, and the compressors pass sanity checks."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from tinylm.data.shards import Counts, Shard
from tinylm.evaluation.baselines import KneserNey, compressor_bits, kneser_ney_bits

END, VOCAB_SIZE = 0, 12
Gram = tuple[int, ...]


def _shard(*documents: list[int]) -> Shard:
    tokens = np.array([END, *(id for document in documents for id in (*document, END))], dtype=np.uint16)
    size = sum(map(len, documents))
    return Shard(tokens, Counts(len(documents), size, size, size, 0), END)


def _texts(seed: int, count: int) -> list[list[int]]:
    """Documents in which each token depends on the two before it."""
    generator = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        document = [1, 2]
        for _ in range(int(generator.integers(0, 40))):
            document.append(1 + int(document[-1] * 2 + document[-2] + generator.integers(0, 3)) % (VOCAB_SIZE - 1))
        documents.append(document)
    return documents


class _SlowKneserNey:
    """Interpolated modified Kneser-Ney smoothing, implemented with dictionaries from its definition."""

    def __init__(self, documents: list[list[int]], order: int) -> None:
        self.order = order
        raw: list[Counter[Gram]] = [Counter() for _ in range(order + 1)]
        for document in documents:
            tokens = [END, *document, END]
            for k in range(1, order + 1):
                raw[k].update(tuple(tokens[i : i + k]) for i in range(len(tokens) - k + 1))
        raw[1][(END,)] -= len(documents) - 1  # one end-of-text token closes a document and opens the next
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
        lower = 1 / VOCAB_SIZE if k == 1 else self.probability(context[1:], token)
        following = {gram[-1]: count for gram, count in self.counts[k].items() if gram[:-1] == context and count}
        total = sum(following.values())
        if not total:
            return lower
        discounts = {next_token: self.discounts[k][min(count, 3)] for next_token, count in following.items()}
        kept = following.get(token, 0) - discounts.get(token, 0.0)
        return (kept + sum(discounts.values()) * lower) / total


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_matches_its_definition(order: int) -> None:
    train, heldout = _texts(1, 25), [*_texts(2, 4), [11, 11, 11]]
    fast, slow = KneserNey(_shard(*train), VOCAB_SIZE, order).logprobs(_shard(*heldout)), _SlowKneserNey(train, order)
    expected = [math.nan]
    for document in heldout:
        tokens = [END, *document]
        for i in range(1, len(tokens)):
            expected.append(math.log(slow.probability(tuple(tokens[max(0, i - order + 1) : i]), tokens[i])))
        expected.append(math.nan)
    np.testing.assert_allclose(fast, expected, rtol=1e-9)


@pytest.mark.parametrize("order", [1, 3, 5])
def test_probabilities_sum_to_one(order: int) -> None:
    model = KneserNey(_shard(*_texts(1, 25)), VOCAB_SIZE, order)
    for context in ([], [1], [1, 2], [5, 9, 1, 4], [11, 11, 11, 11]):
        total = sum(math.exp(model.logprobs(_shard([*context, token]))[-2]) for token in range(1, VOCAB_SIZE))
        end = _SlowKneserNey(_texts(1, 25), order).probability(tuple([END, *context][-(order - 1) :] if order > 1 else []), END)
        assert total + end == pytest.approx(1, abs=1e-9)


def test_longer_n_grams_predict_dependent_tokens_better() -> None:
    bits = list(kneser_ney_bits(_shard(*_texts(1, 200)), _shard(*_texts(2, 40)), VOCAB_SIZE, 1000).values())
    assert all(longer < shorter for shorter, longer in pairwise(bits[:3]))


def test_compressors_use_few_bits_for_a_text_in_the_dictionary(english: str) -> None:
    text = english[:40_000].encode()
    known, unknown = compressor_bits(text, text[:20_000]), compressor_bits(b"", text[:20_000])
    assert known.keys() == unknown.keys()
    assert any(name.startswith("xz") for name in known)
    for name in known:
        assert known[name] < 0.1 < 1.5 < unknown[name] < 4
