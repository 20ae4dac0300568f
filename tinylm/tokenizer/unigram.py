"""The Unigram language model of SentencePiece (Kudo 2018, "Subword Regularization", section 3.2) from counted words.

Frequent substrings are the first pieces. Expectation maximisation gives each piece its probability over all segmentations of all
words; the pieces whose loss would cost the text least go, a quarter at a time, until as many are left as were asked for. All words
are one lattice, and a step handles every word at once, position by position. Nothing depends on threads or on hashing, so the
same words give the same pieces; scores are rounded to six digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

from tinylm.tokenizer.counting import Words

SHRINKING = 0.75
SUB_ITERATIONS = 2
SEEDS_PER_PIECE = 24
_LEAST_SEEDS = 40_000
_LEAST_EXPECTED = 0.5
"""Expected occurrences below which a piece is dropped at once."""


@dataclass
class _Edges:
    """Places where a piece stands: from node `start` to node `end`, `level` characters into its word."""

    start: np.ndarray
    end: np.ndarray
    piece: np.ndarray

    def of(self, kept: np.ndarray) -> _Edges:
        return _Edges(self.start[kept], self.end[kept], self.piece[kept])


class _Lattice:
    """All segmentations of all words. Nodes are the positions between characters; each word has its first and last."""

    def __init__(self, edges: _Edges, levels: np.ndarray, firsts: np.ndarray, lasts: np.ndarray) -> None:
        self.firsts, self.lasts = firsts, lasts
        self.nodes = len(levels)
        order = np.lexsort((edges.end, levels[edges.end]))
        self.edges = edges.of(order)
        self._forward = _groups(self.edges.end, levels[self.edges.end])
        self._backward_order = np.lexsort((self.edges.start, -levels[self.edges.start]))
        start = self.edges.start[self._backward_order]
        self._backward = _groups(start, -levels[start])

    def before(self, scores: np.ndarray, *, best: bool = False) -> np.ndarray:
        """Per node the log of the summed probability of all ways from its word's first node, or of the `best` alone."""
        values = np.full(self.nodes, -np.inf)
        values[self.firsts] = 0.0
        self._sweep(values, self.edges.start, self.edges.end, scores[self.edges.piece], self._forward, best)
        return values

    def after(self, scores: np.ndarray) -> np.ndarray:
        """The same, from each node to its word's last."""
        values = np.full(self.nodes, -np.inf)
        values[self.lasts] = 0.0
        order = self._backward_order
        self._sweep(values, self.edges.end[order], self.edges.start[order], scores[self.edges.piece[order]], self._backward, False)
        return values

    @staticmethod
    def _sweep(
        values: np.ndarray,
        source: np.ndarray,
        target: np.ndarray,
        scores: np.ndarray,
        groups: list[tuple[int, int, np.ndarray]],
        best: bool,
    ) -> None:
        for begin, end, firsts in groups:
            ways = values[source[begin:end]] + scores[begin:end]
            most = np.maximum.reduceat(ways, firsts)
            if not best:
                sizes = np.diff(np.append(firsts, end - begin))
                with np.errstate(invalid="ignore", divide="ignore"):
                    summed = np.add.reduceat(np.exp(ways - np.repeat(most, sizes)), firsts)
                    most = np.where(np.isfinite(most), most + np.log(summed), most)
            values[target[begin:end][firsts]] = most

    def expected(self, scores: np.ndarray, weights: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, float]:
        """How often each piece is expected to be used, and the log likelihood of the text. `owners`: each node's word."""
        alpha, beta = self.before(scores), self.after(scores)
        totals = alpha[self.lasts]
        edges = self.edges
        word = owners[edges.start]
        with np.errstate(invalid="ignore"):
            shares = np.exp(alpha[edges.start] + scores[edges.piece] + beta[edges.end] - totals[word])
        shares = np.nan_to_num(shares)
        return np.bincount(edges.piece, shares * weights[word], minlength=len(scores)), float(totals @ weights)


def _groups(nodes: np.ndarray, levels: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """(begin, end, first edge of each node within) for every level, of edges sorted by level and node."""
    if not len(nodes):
        return []
    borders = [0, *(np.flatnonzero(levels[1:] != levels[:-1]) + 1).tolist(), len(levels)]
    groups = []
    for begin, end in pairwise(borders):
        here = nodes[begin:end]
        groups.append((begin, end, np.flatnonzero(np.concatenate(([True], here[1:] != here[:-1])))))
    return groups


def learn(words: Words, alphabet: list[str], wanted: int, *, longest: int = 16) -> list[tuple[str, float]]:
    """At most `wanted` pieces with their log probabilities, best first; every character of `alphabet` is one of them.

    Characters outside the alphabet are borders. Fewer come back when the text has no more substrings that occur twice.
    """
    codes, levels, owners, ends, weights = _laid_out(words, alphabet)
    strings, edges, counts = _seeds(
        codes, levels, ends, weights[owners], alphabet, max(_LEAST_SEEDS, SEEDS_PER_PIECE * wanted), longest
    )
    lengths = np.array([len(string) for string in strings])
    firsts, lasts = np.flatnonzero(levels == 0), np.unique(ends)
    scores = np.log(np.maximum(counts, 1e-3)) - np.log(counts.sum())
    target = max(wanted, int(wanted * 1.1))
    while True:
        lattice = _Lattice(edges, levels, firsts, lasts)
        for _ in range(SUB_ITERATIONS):
            expected, _ = lattice.expected(scores, weights, owners)
            scores = _maximised(expected)
        keep = (expected >= _LEAST_EXPECTED) | (lengths == 1)
        if keep.sum() > target:
            kept_loss = np.where(keep, _losses(lattice, scores, expected, lengths, levels), -np.inf)
            kept_loss[lengths == 1] = np.inf
            room = max(target, int(SHRINKING * keep.sum()))
            order = np.lexsort((np.arange(len(scores)), -kept_loss))
            keep = np.zeros(len(scores), dtype=bool)
            keep[order[:room]] = True
        finished = keep.sum() <= target
        number = np.cumsum(keep) - 1
        inside = keep[lattice.edges.piece]
        edges = lattice.edges.of(inside)
        edges.piece = number[edges.piece]
        strings = [string for string, kept in zip(strings, keep.tolist(), strict=True) if kept]
        lengths, scores = lengths[keep], scores[keep]
        if finished:
            break
    lattice = _Lattice(edges, levels, firsts, lasts)
    expected, _ = lattice.expected(scores, weights, owners)
    scores = _maximised(expected)
    chosen = sorted(range(len(strings)), key=lambda n: (lengths[n] > 1, -scores[n], strings[n]))[:wanted]
    pieces = [(strings[n], round(float(scores[n]), 6)) for n in chosen]
    return sorted(pieces, key=lambda piece: (-piece[1], piece[0]))


def _laid_out(words: Words, alphabet: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The nodes of all words, cut where a character is not known: what follows (-1 at the end), level, word, the word's last node.

    The fifth is the weight of each word.
    """
    known = set(alphabet)
    parts: list[str] = []
    weighing: list[float] = []
    for word, count in zip(words.texts, words.counts.tolist(), strict=True):
        runs = [word] if known.issuperset(word) else ["".join(run) for inside, run in groupby(word, known.__contains__) if inside]
        parts += runs
        weighing += [count] * len(runs)
    lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts)) + 1
    begins = np.cumsum(lengths) - lengths
    size = int(lengths.sum())
    owners = np.repeat(np.arange(len(parts)), lengths)
    levels = np.arange(size) - begins[owners]
    numbers = {character: index for index, character in enumerate(alphabet)}
    codes = np.full(size, -1, dtype=np.int64)
    inside = np.ones(size, dtype=bool)
    inside[begins + lengths - 1] = False
    codes[inside] = np.fromiter((numbers[c] for part in parts for c in part), dtype=np.int64, count=size - len(parts))
    return codes, levels, owners, (begins + lengths - 1)[owners], np.array(weighing, dtype=np.float64)


def _seeds(
    codes: np.ndarray, levels: np.ndarray, ends: np.ndarray, weights: np.ndarray, alphabet: list[str], most: int, longest: int
) -> tuple[list[str], _Edges, np.ndarray]:
    """The substrings that occur at least twice and cover most text, every single character, where they stand and how often."""
    letters = len(alphabet)
    where, ids = np.flatnonzero(codes >= 0), codes[codes >= 0]
    totals = np.bincount(ids, weights[where], minlength=letters)
    found = [(where, ids, totals, np.zeros(letters, dtype=np.int64))]
    sample = np.full(letters, -1)
    sample[ids[::-1]] = where[::-1]
    places = [sample]
    for length in range(2, longest + 1):
        fits = where + length <= ends[where]
        where, ids = where[fits], ids[fits]
        keys, first, ids = np.unique(ids * letters + codes[where + length - 1], return_index=True, return_inverse=True)
        totals = np.bincount(ids, weights[where], minlength=len(keys))
        often = totals >= 2
        number = np.cumsum(often) - 1
        inside = often[ids]
        places.append(where[first][often])
        where, ids, totals = where[inside], number[ids[inside]], totals[often]
        if not len(where):
            break
        found.append((where, ids, totals, np.full(len(totals), length - 1)))
    gains = np.concatenate([totals * length for length, (_, _, totals, _) in enumerate(found, 1)])
    gains[:letters] = np.inf
    order = np.lexsort((np.arange(len(gains)), -gains))[: max(most, letters)]
    number = np.full(len(gains), -1)
    number[np.sort(order)] = np.arange(len(order))
    strings: list[str] = [*alphabet]
    starts, finishes, pieces, counts, offset = [], [], [], [], 0
    characters = np.array([*alphabet, ""], dtype=object)
    for length, (where, ids, totals, _) in enumerate(found, 1):
        here = number[offset : offset + len(totals)]
        inside = here[ids] >= 0
        starts.append(where[inside])
        finishes.append(where[inside] + length)
        pieces.append(here[ids[inside]])
        chosen = here >= 0
        counts.append(totals[chosen])
        if length > 1:
            strings += ["".join(characters[codes[at : at + length]]) for at in places[length - 1][chosen].tolist()]
        offset += len(totals)
    edges = _Edges(np.concatenate(starts), np.concatenate(finishes), np.concatenate(pieces))
    return strings, edges, np.concatenate(counts)


def _maximised(expected: np.ndarray) -> np.ndarray:
    """Log probabilities from expected counts, in the Bayesian form that favors few pieces (digamma in place of the log)."""
    counts = np.maximum(expected, 1e-3)
    scores: np.ndarray = _digamma(counts) - _digamma(np.array([counts.sum()]))[0]
    return scores


def _digamma(x: np.ndarray) -> np.ndarray:
    """Abramowitz & Stegun 6.3.18 above 7, the recurrence below."""
    result = np.zeros_like(x)
    x = x.copy()
    for _ in range(8):
        small = x < 7
        result[small] -= 1 / x[small]
        x[small] += 1
    square = 1 / (x * x)
    digamma: np.ndarray = result + np.log(x) - 0.5 / x - square * (1 / 12 - square * (1 / 120 - square / 252))
    return digamma


def _losses(lattice: _Lattice, scores: np.ndarray, expected: np.ndarray, lengths: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """What the text's likelihood would lose without each piece: its use times the gap to its best segmentation by others."""
    edges = lattice.edges
    longer = np.flatnonzero(lengths > 1)
    _, first = np.unique(edges.piece, return_index=True)
    place = np.full(len(scores), -1)
    place[edges.piece[first]] = edges.start[first]
    longer = longer[place[longer] >= 0]
    sizes = lengths[longer] + 1
    begins = np.cumsum(sizes) - sizes
    owner = np.repeat(np.arange(len(longer)), sizes)
    level = np.arange(int(sizes.sum())) - begins[owner]
    original = place[longer][owner] + level
    by_start = np.argsort(edges.start, kind="stable")
    first_edge = np.searchsorted(edges.start[by_start], np.arange(lattice.nodes + 1))
    many = first_edge[original + 1] - first_edge[original]
    many[begins + sizes - 1] = 0  # nothing leaves a piece's last node
    source = np.repeat(np.arange(len(level)), many)
    within = np.arange(int(many.sum())) - np.repeat(np.cumsum(many) - many, many)
    edge = by_start[first_edge[original[source]] + within]
    length = edges.end[edge] - edges.start[edge]
    whole = longer[owner[source]]
    inside = (level[source] + length <= lengths[whole]) & (edges.piece[edge] != whole)
    inner = _Edges(source[inside], source[inside] + length[inside], edges.piece[edge[inside]])
    alternatives = _Lattice(inner, level, begins, begins + sizes - 1).before(scores, best=True)[begins + sizes - 1]
    losses = np.full(len(scores), -np.inf)
    losses[longer] = expected[longer] * (scores[longer] - alternatives)
    return losses
