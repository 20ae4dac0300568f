"""N-gram language models with interpolated modified Kneser-Ney smoothing (Chen & Goodman 1999, section 3).

`count_ngrams` counts the n-grams in a part of a text, `NgramCounts.merged` adds the counts from two parts, and `smooth` converts
counts to probabilities (`NgramTables`). The n-gram baselines in evaluations and the `ngram` architecture use these functions. This
module does not import torch.

The n-grams of all orders form a trie. An n-gram is identified by its index among the sorted keys of its order. Its key is
`prefix * vocab_size + last_token`, where `prefix` is the index of the n-gram without its last token. The index of a 1-gram is its
token.

N-grams do not cross document boundaries. The end-of-text token before a document is part of the context of its first tokens, like
`<s>` in KenLM. The end-of-text token after a document is predicted like any other token, like `</s>`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np

from tinylm.data.shards import Shard

FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""KenLM's discounts for counts of 1, 2 and 3 or more, used if the estimate is undefined or out of range."""
_PART = 1 << 20
"""Number of tokens that `count_shard` counts at a time."""


@dataclass(frozen=True)
class NgramCounts:
    """The number of occurrences of each n-gram of orders 1 to `order`."""

    vocab_size: int
    keys: tuple[np.ndarray, ...]
    """The sorted keys (int64) of the n-grams of each order, starting with order 2."""
    counts: tuple[np.ndarray, ...]
    """The number of occurrences (int64) of each n-gram of each order, starting with order 1."""

    @property
    def order(self) -> int:
        return len(self.counts)

    def merged(self, other: NgramCounts) -> NgramCounts:
        """Return the sum of these counts and the counts from another part of the text."""
        own, others = np.arange(self.vocab_size), np.arange(self.vocab_size)  # the new index of each n-gram
        keys, counts = [], [self.counts[0] + other.counts[0]]
        for k in range(2, self.order + 1):
            own_keys = _rekey(self.keys[k - 2], own, self.vocab_size)
            other_keys = _rekey(other.keys[k - 2], others, self.vocab_size)
            merged = np.union1d(own_keys, other_keys)
            own, others = np.searchsorted(merged, own_keys), np.searchsorted(merged, other_keys)
            total = np.zeros(len(merged), dtype=np.int64)
            total[own] += self.counts[k - 1]
            total[others] += other.counts[k - 1]
            keys.append(merged)
            counts.append(total)
        return NgramCounts(self.vocab_size, tuple(keys), tuple(counts))

    def truncated(self, order: int) -> NgramCounts:
        """Return only the counts of n-grams with up to `order` tokens."""
        return NgramCounts(self.vocab_size, self.keys[: order - 1], self.counts[:order])


def _rekey(keys: np.ndarray, new_indices: np.ndarray, vocab_size: int) -> np.ndarray:
    """Replace the prefix index in each key. The order of the keys does not change."""
    prefixes, tokens = np.divmod(keys, vocab_size)
    return np.asarray(new_indices[prefixes] * vocab_size + tokens)


def count_ngrams(tokens: np.ndarray, context: int, *, vocab_size: int, order: int, end_of_text: int) -> NgramCounts:
    """Count the n-grams that end after the first `context` tokens. Those tokens only serve as context.

    To count a long text in parts, include up to `order - 1` tokens before each part. At the start of a text, `context` is 1,
    because the first end-of-text token is not predicted.
    """
    tokens = np.asarray(tokens, dtype=np.int64)
    preceding = _preceding_tokens(tokens, end_of_text)
    ends = tokens  # index of the (k-1)-gram that ends at each position, or -1
    keys, counts = [], [np.bincount(tokens[context:], minlength=vocab_size)]
    for k in range(2, order + 1):
        valid = np.flatnonzero(preceding >= k - 1)
        unique, inverse = np.unique(ends[valid - 1] * vocab_size + tokens[valid], return_inverse=True)
        keys.append(unique)
        counts.append(np.bincount(inverse[valid >= context], minlength=len(unique)))
        ends = np.full(len(tokens), -1, dtype=np.int64)
        ends[valid] = inverse
    return NgramCounts(vocab_size, tuple(keys), tuple(counts))


def count_shard(shard: Shard, vocab_size: int, order: int) -> NgramCounts:
    """Count all n-grams in a text, part by part."""
    parts = (count_part(shard, start, min(start + _PART, len(shard)), vocab_size, order) for start in range(0, len(shard), _PART))
    return reduce(NgramCounts.merged, parts)


def count_part(shard: Shard, start: int, end: int, vocab_size: int, order: int) -> NgramCounts:
    """Count the n-grams that end at positions [start, end) in a text. They can begin before `start`."""
    first = max(0, start - order + 1)
    context = max(start, 1) - first
    return count_ngrams(shard.tokens[first:end], context, vocab_size=vocab_size, order=order, end_of_text=shard.end_of_text)


def _preceding_tokens(tokens: np.ndarray, end_of_text: int) -> np.ndarray:
    """Return the number of tokens before each token in its document, including the end-of-text token before the document."""
    positions = np.arange(len(tokens))
    boundaries = np.flatnonzero(tokens == end_of_text)
    opening = np.searchsorted(boundaries, positions, side="left") - 1
    return np.where(opening >= 0, positions - np.append(boundaries, 0)[opening], positions)


@dataclass(frozen=True)
class NgramTables:
    """The probabilities of an n-gram model, organized as in an ARPA file.

    If the tables contain the n-gram of a context and a token, they contain the token's probability in that context. Otherwise, the
    probability is the backoff weight of the context times the probability in the context without its first token.
    """

    vocab_size: int
    keys: tuple[np.ndarray, ...]
    """The sorted keys (int64) of the n-grams of each order, starting with order 2."""
    probabilities: tuple[np.ndarray, ...]
    """The probability (float32) of each n-gram's last token given the tokens before it, for each order, starting with order 1."""
    backoffs: tuple[np.ndarray, ...]
    """The backoff weight (float32) of each n-gram as a context, for each order except the highest, starting with order 1."""

    @property
    def order(self) -> int:
        return len(self.probabilities)

    def problem(self) -> str | None:
        """Return how the tables are damaged, or None if they are valid."""
        for k, keys in enumerate(self.keys, 2):
            if len(keys) and (keys[0] < 0 or keys[-1] >= len(self.probabilities[k - 2]) * self.vocab_size):
                return f"a {k}-gram has an unknown prefix"
            if (keys[1:] <= keys[:-1]).any():
                return f"the {k}-grams are not sorted"
        if not all(((values >= 0) & (values <= 1)).all() for values in self.probabilities):
            return "a probability is not between 0 and 1"
        if not all((np.isfinite(values) & (values >= 0)).all() for values in self.backoffs):
            return "a backoff weight is negative or not finite"
        return None

    def logprobs(self, shard: Shard) -> np.ndarray:
        """Return the log-probability in nats of each token in a text given the tokens before it, `(tokens,)`.

        The result is NaN for end-of-text tokens.
        """
        tokens = np.asarray(shard.tokens, dtype=np.int64)
        result = self.token_probabilities(tokens, _preceding_tokens(tokens, shard.end_of_text))
        result[tokens == shard.end_of_text] = np.nan
        return np.asarray(np.log(result))

    def token_probabilities(self, tokens: np.ndarray, preceding: np.ndarray) -> np.ndarray:
        """Return the probability of each token given the tokens before it. `preceding` is the number of tokens in its context."""
        probability = self.probabilities[0][tokens].astype(np.float64)
        contexts = tokens  # index of the (k-1)-gram that ends at each position, or -1
        for k in range(2, self.order + 1):
            found = np.full(len(tokens), -1, dtype=np.int64)
            valid = np.flatnonzero(preceding >= k - 1)
            valid = valid[contexts[valid - 1] >= 0]
            before = contexts[valid - 1]
            indices = self.find(k, before, tokens[valid])
            known = indices >= 0
            found[valid] = indices
            probability[valid[~known]] *= self.backoffs[k - 2][before[~known]]
            probability[valid[known]] = self.probabilities[k - 1][indices[known]]
            contexts = found
        return np.asarray(probability)

    def find(self, k: int, prefixes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the index of each k-gram, given the index of its prefix and its last token.

        The result is -1 if the prefix or the k-gram is unknown.
        """
        keys, wanted = self.keys[k - 2], prefixes * self.vocab_size + tokens
        if not len(keys):
            return np.full(len(wanted), -1, dtype=np.int64)
        places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        return np.where((prefixes >= 0) & (tokens >= 0) & (keys[places] == wanted), places, -1)

    def distributions(self, contexts: np.ndarray) -> np.ndarray:
        """Return the probability of each token in the vocabulary after each context, `(N, vocab_size)`.

        `contexts`, `(N, order - 1)`, are the last tokens before the predicted one. Shorter contexts start with negative ids.
        """
        result = np.repeat(self.probabilities[0][None].astype(np.float64), len(contexts), axis=0)
        for k in range(2, self.order + 1):
            indices = self._context_indices(contexts[:, contexts.shape[1] - k + 1 :])
            rows = np.flatnonzero(indices >= 0)
            result[rows] *= self.backoffs[k - 2][indices[rows], None]
            first, last = (np.searchsorted(self.keys[k - 2], (indices[rows] + more) * self.vocab_size) for more in (0, 1))
            children = _ranges(first, last)
            tokens = self.keys[k - 2][children] % self.vocab_size
            result[np.repeat(rows, last - first), tokens] = self.probabilities[k - 1][children]
        return result

    def _context_indices(self, contexts: np.ndarray) -> np.ndarray:
        """Return the index of each n-gram in `contexts`, `(N, n)`, or -1 if it is unknown."""
        indices = contexts[:, 0]
        for k in range(2, contexts.shape[1] + 1):
            indices = self.find(k, indices, contexts[:, k - 1])
        return np.asarray(indices)


def _ranges(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return the concatenated integers of all ranges [first, last)."""
    lengths = last - first
    offsets = np.cumsum(lengths) - lengths
    numbers: np.ndarray = np.arange(int(lengths.sum())) + np.repeat(first - offsets, lengths)
    return numbers


def smooth(counts: NgramCounts, end_of_text: int, prune: tuple[int, ...] = ()) -> NgramTables:
    """Compute the probabilities of an n-gram model from counts.

    `prune` contains a threshold for each order. An n-gram is removed if its count is at most the threshold. The last threshold
    also applies to longer n-grams, and the thresholds must not decrease. The probability mass of removed n-grams goes to shorter
    n-grams. 1-grams are never removed.
    """
    vocab_size, order = counts.vocab_size, counts.order
    suffixes = _suffixes(counts)
    adjusted = _adjusted_counts(counts, suffixes, end_of_text)
    probabilities: list[np.ndarray] = []
    backoffs: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    kept_before = np.arange(vocab_size)  # the indices of the kept (k-1)-grams
    lower = np.full(1, 1 / vocab_size)  # probabilities of the next lower order
    for k in range(1, order + 1):
        occurrences = adjusted[k - 1]
        prefixes = counts.keys[k - 2] // vocab_size if k > 1 else np.zeros(vocab_size, dtype=np.int64)
        removed = counts.counts[k - 1] <= _threshold(prune, k)
        discounts = np.array([0.0, *_discounts([int((occurrences == times).sum()) for times in (1, 2, 3, 4)])])
        discounted = np.where(removed, occurrences, discounts[np.minimum(occurrences, 3)])
        contexts = len(counts.counts[k - 2]) if k > 1 else 1
        total = np.bincount(prefixes, weights=occurrences, minlength=contexts)
        passed_on = np.bincount(prefixes, weights=discounted, minlength=contexts)
        backoff = np.divide(passed_on, total, out=np.ones(contexts), where=total > 0)
        suffix = suffixes[k - 1] if k > 1 else np.zeros(vocab_size, dtype=np.int64)
        kept_mass = np.divide(occurrences - discounted, total[prefixes], out=np.zeros(len(occurrences)), where=total[prefixes] > 0)
        lower = kept_mass + backoff[prefixes] * lower[suffix]
        kept = np.flatnonzero(~removed)
        if k > 1:
            keys.append(_rekey(counts.keys[k - 2][kept], _positions(kept_before, contexts), vocab_size))
            backoffs.append(backoff[kept_before].astype(np.float32))
        probabilities.append(lower[kept].astype(np.float32))
        kept_before = kept
    return NgramTables(vocab_size, tuple(keys), tuple(probabilities), tuple(backoffs))


def _threshold(prune: tuple[int, ...], k: int) -> int:
    """Return the largest count at which k-grams are removed, or -1 if none are removed."""
    if k == 1 or not prune:
        return -1
    return prune[min(k, len(prune)) - 1] or -1


def _positions(selected: np.ndarray, size: int) -> np.ndarray:
    """Return the position in the sorted array `selected` of each integer below `size`."""
    return np.asarray(np.searchsorted(selected, np.arange(size)))


def _suffixes(counts: NgramCounts) -> list[np.ndarray]:
    """Return, for each order, the index of each n-gram without its first token."""
    vocab_size = counts.vocab_size
    suffixes = [np.zeros(vocab_size, dtype=np.int64)]
    for k in range(2, counts.order + 1):
        prefixes, tokens = np.divmod(counts.keys[k - 2], vocab_size)
        suffixes.append(tokens if k == 2 else np.searchsorted(counts.keys[k - 3], suffixes[-1][prefixes] * vocab_size + tokens))
    return suffixes


def _adjusted_counts(counts: NgramCounts, suffixes: list[np.ndarray], end_of_text: int) -> list[np.ndarray]:
    """Return the counts to smooth. For all orders except the highest, they are the number of distinct tokens before an n-gram.

    N-grams at the start of a document have no token before them, so their number of occurrences is used instead.
    """
    adjusted = []
    first_tokens = np.arange(counts.vocab_size)
    for k in range(1, counts.order + 1):
        if k > 1:
            first_tokens = first_tokens[counts.keys[k - 2] // counts.vocab_size]
        if k == counts.order:
            adjusted.append(counts.counts[k - 1])
            continue
        extensions = np.bincount(suffixes[k], minlength=len(counts.counts[k - 1]))
        at_start = (first_tokens == end_of_text) & (k > 1)
        adjusted.append(np.where(at_start, counts.counts[k - 1], extensions))
    return adjusted


def _discounts(n: list[int]) -> list[float]:
    """Return the discounts for counts of 1, 2 and 3 or more, given how many n-grams occur 1, 2, 3 and 4 times.

    The estimate of Chen & Goodman requires n-grams with each of these counts. On tiny or repetitive text, it can be undefined or
    out of range. Without a discount, unseen n-grams would have probability 0. With a discount as large as the count, the n-grams
    would be ignored. In these cases, KenLM's fallback is used instead.
    """
    discounts = []
    for times, fallback in zip((1, 2, 3), FALLBACK_DISCOUNTS, strict=True):
        discount = 0.0
        if n[0] and n[times - 1] and n[times]:
            y = n[0] / (n[0] + 2 * n[1])
            discount = times - (times + 1) * y * n[times] / n[times - 1]
        discounts.append(discount if 0 < discount <= times else fallback)
    return discounts
