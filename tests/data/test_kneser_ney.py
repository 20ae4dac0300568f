"""Test that n-gram models match a slow implementation with dictionaries, and that their probabilities sum to 1."""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from tinylm.data.kneser_ney import NgramCounts, NgramTables, count_part, count_shard, smooth
from tinylm.data.shards import Counts, Shard
from tinylm.interchange import arpa

END, VOCAB_SIZE = 0, 12
Gram = tuple[int, ...]


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


def _train(shard: Shard, order: int) -> NgramTables:
    return smooth(count_shard(shard, VOCAB_SIZE, order), END)


class SlowKneserNey:
    """Interpolated modified Kneser-Ney smoothing, implemented with dictionaries from its definition."""

    def __init__(self, documents: list[list[int]], order: int) -> None:
        self.order = order
        raw: list[Counter[Gram]] = [Counter() for _ in range(order + 1)]
        for document in documents:
            tokens = [END, *document, END]
            for k in range(1, order + 1):
                raw[k].update(tuple(tokens[i : i + k]) for i in range(len(tokens) - k + 1))
        raw[1][(END,)] = len(documents)  # the end-of-text token at the start of a document is not predicted
        self.counts: list[dict[Gram, int]] = [{} for _ in range(order + 1)]
        self.counts[order] = dict(raw[order])
        for k in range(1, order):
            before: dict[Gram, set[int]] = defaultdict(set)
            for gram in raw[k + 1]:
                before[gram[1:]].add(gram[0])
            self.counts[k] = {gram: raw[k][gram] if gram[0] == END and k > 1 else len(before[gram]) for gram in raw[k]}
        self.discounts = [[0.0] * 4] + [self._discounts(self.counts[k]) for k in range(1, order + 1)]

    @staticmethod
    def _discounts(counts: dict[Gram, int]) -> list[float]:
        n = {times: sum(count == times for count in counts.values()) for times in (1, 2, 3, 4)}
        discounts = {1: 0.5, 2: 1.0, 3: 1.5}  # KenLM's fallback
        for i in discounts:
            if n[1] and n[i] and n[i + 1]:
                discount = i - (i + 1) * n[1] / (n[1] + 2 * n[2]) * n[i + 1] / n[i]
                if 0 < discount <= i:
                    discounts[i] = discount
        return [0.0, *discounts.values()]

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
    fast, slow = _train(_shard(*train), order).logprobs(_shard(*heldout)), SlowKneserNey(train, order)
    expected = [math.nan]
    for document in heldout:
        tokens = [END, *document]
        for i in range(1, len(tokens)):
            expected.append(math.log(slow.probability(tuple(tokens[max(0, i - order + 1) : i]), tokens[i])))
        expected.append(math.nan)
    np.testing.assert_allclose(fast, expected, rtol=1e-6)


@pytest.mark.parametrize("copies", [2, 3, 4, 5, 9])
@pytest.mark.parametrize("order", [2, 3, 5])
def test_unseen_n_grams_have_a_positive_probability_even_if_the_text_is_repeated(copies: int, order: int) -> None:
    """All counts are multiples of the number of copies, so Chen & Goodman's discounts are undefined or out of range."""
    train, heldout = _texts(1, 6) * copies, [[3, 9, 3, 9], [11, 11], *_texts(2, 2)]
    slow = SlowKneserNey(train, order)
    fast = _train(_shard(*train), order).logprobs(_shard(*heldout))
    expected = [math.nan]
    for document in heldout:
        tokens = [END, *document]
        expected += [math.log(slow.probability(tuple(tokens[max(0, i - order + 1) : i]), tokens[i])) for i in range(1, len(tokens))]
        expected.append(math.nan)
    np.testing.assert_allclose(fast, expected, rtol=1e-6)
    assert np.isfinite(fast[~np.isnan(expected)]).all()


_documents = strategies.lists(strategies.lists(strategies.integers(1, VOCAB_SIZE - 2), max_size=12), min_size=1, max_size=8)
"""Small texts, including empty documents. The last token of the vocabulary never occurs."""


@settings(max_examples=60, deadline=None, derandomize=True)
@given(_documents, strategies.integers(1, 5), strategies.lists(strategies.integers(-1, 3), max_size=4))
def test_the_probabilities_over_the_vocabulary_sum_to_one(documents: list[list[int]], order: int, prune: list[int]) -> None:
    thresholds = tuple(int(number) for number in np.maximum.accumulate([0, *prune]))
    shard = _shard(*documents)
    tables = smooth(count_shard(shard, VOCAB_SIZE, order), END, thresholds)
    contexts = np.array([[-1] * 4, [-1, -1, -1, END], [-1, END, 1, 2], [3, 1, 2, 3], [11, 11, 11, 11]])[:, 5 - order :]
    distributions = tables.distributions(contexts)
    np.testing.assert_allclose(distributions.sum(axis=1), 1, atol=1e-6)
    assert (distributions > 0).all()
    tokens = np.asarray(shard.tokens, dtype=np.int64)
    preceding = np.minimum(np.arange(len(tokens)), order - 1)
    padded = np.concatenate((np.full(order - 1, -1), tokens))
    windows = np.lib.stride_tricks.sliding_window_view(padded, order)[:, : order - 1]
    np.testing.assert_allclose(
        tables.token_probabilities(tokens, preceding), tables.distributions(windows)[np.arange(len(tokens)), tokens], rtol=1e-6
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(_documents, strategies.integers(1, 5), strategies.integers(1, 7))
def test_merged_counts_of_parts_equal_the_counts_of_the_whole_text(documents: list[list[int]], order: int, size: int) -> None:
    shard = _shard(*documents)
    whole = count_shard(shard, VOCAB_SIZE, order)
    starts = range(0, len(shard), size)
    parts = [count_part(shard, start, min(start + size, len(shard)), VOCAB_SIZE, order) for start in starts]
    merged = functools.reduce(NgramCounts.merged, parts)
    for one, other in zip((*whole.keys, *whole.counts), (*merged.keys, *merged.counts), strict=True):
        np.testing.assert_array_equal(one, other)


def test_pruning_removes_the_rare_n_grams_and_keeps_the_others() -> None:
    counts = count_shard(_shard(*_texts(1, 60)), VOCAB_SIZE, 3)
    full, pruned = smooth(counts, END), smooth(counts, END, (0, 0, 1))
    assert len(pruned.keys[1]) == int((counts.counts[2] > 1).sum()) < len(full.keys[1])
    np.testing.assert_array_equal(pruned.keys[0], full.keys[0])
    kept = np.isin(full.keys[1], pruned.keys[1])
    np.testing.assert_allclose(pruned.probabilities[2] >= full.probabilities[2][kept], True)


def test_a_text_with_four_lines_has_plausible_probabilities() -> None:
    text = "one fish\ntwo fish\nred fish\nblue fish\n"
    ids = [1 + sorted(set(text)).index(character) for character in text]
    shard = Shard(np.array([0, *ids, 0], dtype=np.uint16), Counts(1, len(ids), len(ids), len(ids), 0), 0)
    tables = smooth(count_shard(shard, 20, 5), 0)
    probabilities = np.exp(tables.logprobs(shard)[1:-1])
    assert (probabilities > 0).all()
    assert probabilities.mean() > 0.3


def test_probabilities_equal_those_of_kenlm() -> None:
    """KenLM 0.3 wrote the reference with `lmplz -o 3 --text text.txt --arpa order3.arpa`."""
    folder = Path(__file__).parent / "kenlm"
    expected, words = arpa.read(folder / "order3.arpa")
    ids = {word: id for id, word in enumerate(words)}
    end = ids[arpa.END]
    lines = [line.split() for line in (folder / "text.txt").read_text(encoding="utf-8").splitlines()]
    tokens = np.array([end, *(id for line in lines for id in (*(ids[word] for word in line), end))], dtype=np.uint16)
    size = len(tokens) - len(lines) - 1
    counts = count_shard(Shard(tokens, Counts(len(lines), size, size, size, 0), end), len(words), 3)
    tables = smooth(counts, end)
    for keys, others in zip(tables.keys, expected.keys, strict=True):
        np.testing.assert_array_equal(keys, others)
    for probabilities, others in zip(tables.probabilities, expected.probabilities, strict=True):
        np.testing.assert_allclose(probabilities, others, rtol=1e-5)
    for backoffs, others in zip(tables.backoffs, expected.backoffs, strict=True):
        np.testing.assert_allclose(backoffs, others, rtol=1e-5)
