"""Learn the pieces of a Unigram language model from word counts.

Kudo 2018, "Subword Regularization: Improving Neural Network Translation Models with Multiple Subword Candidates", section 3.2, as
implemented in SentencePiece. The probability of a segmentation is the product of the probabilities of its pieces. For example, if
the pieces `a`, `b` and `ab` have the probabilities 0.3, 0.3 and 0.4, the segmentations of the word `ab` have the probabilities
0.3 x 0.3 = 0.09 (`a` `b`) and 0.4 (`ab`), and the expected count of the piece `ab` in this word is 0.4 / 0.49 = 0.82.

1. The initial pieces are the frequent substrings of words ("seeds") and all characters of the alphabet.
2. Expectation maximization (EM) estimates the probabilities of the pieces from their expected counts in all segmentations.
3. Pruning removes the 25% of the pieces that affect the likelihood least. Steps 2 and 3 repeat until the target size is reached.

All words form one lattice. Array operations process all words at once, one level (position in the word) at a time. The result
does not depend on the number of threads or on hash order. Scores are rounded to six digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

from tinylm.tokenizer.word_counts import WordCounts

KEPT_SHARE = 0.75
"""Fraction of the pieces that each pruning step keeps."""
EM_STEPS = 2
"""Number of EM steps before each pruning step."""
SEEDS_PER_PIECE = 24
_MIN_SEEDS = 40_000
_MIN_EXPECTED = 0.5
"""Pieces with a lower expected count than this are removed in every pruning step."""


@dataclass
class Nodes:
    """The nodes of the lattice: the positions between the characters of all words. A word of n characters has n + 1 nodes."""

    codes: np.ndarray
    """The alphabet index of the character after each node, or -1 at the end of a word."""
    levels: np.ndarray
    """The number of characters between the start of the word and each node."""
    owners: np.ndarray
    """The index of the word that each node belongs to."""
    ends: np.ndarray
    """The last node of each node's word."""
    weights: np.ndarray
    """The count of each word, float64 (words,)."""

    @property
    def firsts(self) -> np.ndarray:
        """The first node of each word."""
        return np.flatnonzero(self.levels == 0)

    @property
    def lasts(self) -> np.ndarray:
        """The last node of each word."""
        return np.unique(self.ends)


@dataclass
class Edges:
    """The edges of the lattice. Edge i is piece number `piece[i]`, from node `start[i]` to node `end[i]`."""

    start: np.ndarray
    end: np.ndarray
    piece: np.ndarray

    def select(self, kept: np.ndarray) -> Edges:
        return Edges(self.start[kept], self.end[kept], self.piece[kept])


class Lattice:
    """All segmentations of all words: the paths from the first node to the last node of each word."""

    def __init__(self, edges: Edges, levels: np.ndarray, firsts: np.ndarray, lasts: np.ndarray) -> None:
        self.firsts, self.lasts = firsts, lasts
        self.n_nodes = len(levels)
        order = np.lexsort((edges.end, levels[edges.end]))
        self.edges = edges.select(order)
        self._forward = _groups(self.edges.end, levels[self.edges.end])
        self._backward_order = np.lexsort((self.edges.start, -levels[self.edges.start]))
        start = self.edges.start[self._backward_order]
        self._backward = _groups(start, -levels[start])

    def forward(self, scores: np.ndarray, *, best_only: bool = False) -> np.ndarray:
        """Return the log of the total probability of all paths from a word's first node to each node, as float64 (nodes,).

        `scores` contains the log probability of each piece. If `best_only` is true, use the most probable path instead of the sum
        over all paths (Viterbi).
        """
        values = np.full(self.n_nodes, -np.inf)
        values[self.firsts] = 0.0
        self._accumulate(values, self.edges.start, self.edges.end, scores[self.edges.piece], self._forward, best_only)
        return values

    def backward(self, scores: np.ndarray) -> np.ndarray:
        """Return the log of the total probability of all paths from each node to its word's last node, as float64 (nodes,)."""
        values = np.full(self.n_nodes, -np.inf)
        values[self.lasts] = 0.0
        order = self._backward_order
        edge_scores = scores[self.edges.piece[order]]
        self._accumulate(values, self.edges.end[order], self.edges.start[order], edge_scores, self._backward, False)
        return values

    @staticmethod
    def _accumulate(
        values: np.ndarray,
        source: np.ndarray,
        target: np.ndarray,
        scores: np.ndarray,
        groups: list[tuple[int, int, np.ndarray]],
        best_only: bool,
    ) -> None:
        """Set the value of each target node, one level at a time.

        The value is the log-sum-exp (or maximum) of source value plus score, over the edges that lead to the node.
        """
        for begin, end, firsts in groups:
            paths = values[source[begin:end]] + scores[begin:end]
            highest = np.maximum.reduceat(paths, firsts)
            if not best_only:
                sizes = np.diff(np.append(firsts, end - begin))
                with np.errstate(invalid="ignore", divide="ignore"):
                    summed = np.add.reduceat(np.exp(paths - np.repeat(highest, sizes)), firsts)
                    highest = np.where(np.isfinite(highest), highest + np.log(summed), highest)
            values[target[begin:end][firsts]] = highest

    def expected_counts(self, scores: np.ndarray, nodes: Nodes) -> tuple[np.ndarray, float]:
        """Return the expected count of each piece, float64 (pieces,), and the log likelihood of the text in nats."""
        alpha, beta = self.forward(scores), self.backward(scores)
        totals = alpha[self.lasts]
        edges = self.edges
        word = nodes.owners[edges.start]
        with np.errstate(invalid="ignore"):
            shares = np.exp(alpha[edges.start] + scores[edges.piece] + beta[edges.end] - totals[word])
        shares = np.nan_to_num(shares)
        expected = np.bincount(edges.piece, shares * nodes.weights[word], minlength=len(scores))
        return expected, float(totals @ nodes.weights)


def _groups(nodes: np.ndarray, levels: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """Return (begin, end, firsts) for each level: the range of edges, and the first edge of each node, relative to `begin`.

    The edges must be sorted by level and node.
    """
    if not len(nodes):
        return []
    bounds = [0, *(np.flatnonzero(levels[1:] != levels[:-1]) + 1).tolist(), len(levels)]
    groups = []
    for begin, end in pairwise(bounds):
        group = nodes[begin:end]
        groups.append((begin, end, np.flatnonzero(np.concatenate(([True], group[1:] != group[:-1])))))
    return groups


def learn(word_counts: WordCounts, alphabet: list[str], n_pieces: int, *, max_token_length: int = 16) -> list[tuple[str, float]]:
    """Return at most `n_pieces` pieces with their log probabilities, most probable first.

    Every character of `alphabet` is a piece, and pieces contain no other characters. The result has fewer than `n_pieces` pieces if
    too few substrings of the text occur at least twice.
    """
    nodes = lay_out(word_counts, alphabet)
    pieces, edges, counts = seed_pieces(nodes, alphabet, max(_MIN_SEEDS, SEEDS_PER_PIECE * n_pieces), max_token_length)
    lengths = np.array([len(piece) for piece in pieces])
    scores = np.log(np.maximum(counts, 1e-3)) - np.log(counts.sum())
    target = max(n_pieces, int(n_pieces * 1.1))
    firsts, lasts = nodes.firsts, nodes.lasts
    finished = False
    while not finished:
        lattice = Lattice(edges, nodes.levels, firsts, lasts)
        for _ in range(EM_STEPS):
            expected, _ = lattice.expected_counts(scores, nodes)
            scores = _maximize(expected)
        keep = (expected >= _MIN_EXPECTED) | (lengths == 1)
        if keep.sum() > target:
            losses = np.where(keep, _losses(lattice, scores, expected, lengths), -np.inf)
            losses[lengths == 1] = np.inf
            n_kept = max(target, int(KEPT_SHARE * keep.sum()))
            order = np.lexsort((np.arange(len(scores)), -losses))
            keep = np.zeros(len(scores), dtype=bool)
            keep[order[:n_kept]] = True
        finished = keep.sum() <= target
        new_number = np.cumsum(keep) - 1
        edges = lattice.edges.select(keep[lattice.edges.piece])
        edges.piece = new_number[edges.piece]
        pieces = [piece for piece, kept in zip(pieces, keep.tolist(), strict=True) if kept]
        lengths, scores = lengths[keep], scores[keep]
    lattice = Lattice(edges, nodes.levels, firsts, lasts)
    expected, _ = lattice.expected_counts(scores, nodes)
    scores = _maximize(expected)
    chosen = sorted(range(len(pieces)), key=lambda n: (lengths[n] > 1, -scores[n], pieces[n]))[:n_pieces]
    scored = [(pieces[n], round(float(scores[n]), 6)) for n in chosen]
    return sorted(scored, key=lambda piece: (-piece[1], piece[0]))


def lay_out(word_counts: WordCounts, alphabet: list[str]) -> Nodes:
    """Create the nodes of all words. Words are split at characters that are not in the alphabet."""
    known = set(alphabet)
    parts: list[str] = []
    weights: list[float] = []
    for word, count in zip(word_counts.words, word_counts.counts.tolist(), strict=True):
        runs = [word] if known.issuperset(word) else ["".join(run) for inside, run in groupby(word, known.__contains__) if inside]
        parts += runs
        weights += [count] * len(runs)
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
    return Nodes(codes, levels, owners, (begins + lengths - 1)[owners], np.array(weights, dtype=np.float64))


def seed_pieces(nodes: Nodes, alphabet: list[str], max_seeds: int, max_token_length: int) -> tuple[list[str], Edges, np.ndarray]:
    """Return the initial pieces, the edges where they occur, and their counts, float64 (pieces,).

    The initial pieces are all characters of the alphabet, and the substrings that cover the most text (count times length) among
    those that occur at least twice.
    """
    codes, ends, weights = nodes.codes, nodes.ends, nodes.weights[nodes.owners]
    n_characters = len(alphabet)
    # For the current length, substring number `ids[i]` begins at node `starts[i]`, and substring n also begins at `example[n]`.
    starts, ids = np.flatnonzero(codes >= 0), codes[codes >= 0]
    totals = np.bincount(ids, weights[starts], minlength=n_characters)
    by_length = [(starts, ids, totals)]
    example = np.full(n_characters, -1)
    example[ids[::-1]] = starts[::-1]
    examples_by_length = [example]
    for length in range(2, max_token_length + 1):
        fits = starts + length <= ends[starts]
        starts, ids = starts[fits], ids[fits]
        keys, first, ids = np.unique(ids * n_characters + codes[starts + length - 1], return_index=True, return_inverse=True)
        totals = np.bincount(ids, weights[starts], minlength=len(keys))
        repeated = totals >= 2
        number = np.cumsum(repeated) - 1
        kept = repeated[ids]
        examples_by_length.append(starts[first][repeated])
        starts, ids, totals = starts[kept], number[ids[kept]], totals[repeated]
        if not len(starts):
            break
        by_length.append((starts, ids, totals))
    coverage = np.concatenate([totals * length for length, (_, _, totals) in enumerate(by_length, 1)])
    coverage[:n_characters] = np.inf
    order = np.lexsort((np.arange(len(coverage)), -coverage))[: max(max_seeds, n_characters)]
    number = np.full(len(coverage), -1)
    number[np.sort(order)] = np.arange(len(order))
    strings: list[str] = [*alphabet]
    edge_starts, edge_ends, edge_pieces, counts, offset = [], [], [], [], 0
    characters = np.array([*alphabet, ""], dtype=object)
    for length, (starts, ids, totals) in enumerate(by_length, 1):
        piece_of = number[offset : offset + len(totals)]
        kept = piece_of[ids] >= 0
        edge_starts.append(starts[kept])
        edge_ends.append(starts[kept] + length)
        edge_pieces.append(piece_of[ids[kept]])
        chosen = piece_of >= 0
        counts.append(totals[chosen])
        if length > 1:
            examples = examples_by_length[length - 1][chosen].tolist()
            strings += ["".join(characters[codes[node : node + length]]) for node in examples]
        offset += len(totals)
    edges = Edges(np.concatenate(edge_starts), np.concatenate(edge_ends), np.concatenate(edge_pieces))
    return strings, edges, np.concatenate(counts)


def _maximize(expected: np.ndarray) -> np.ndarray:
    """Compute log probabilities from expected counts. As in SentencePiece, digamma replaces the log to favor fewer pieces."""
    counts = np.maximum(expected, 1e-3)
    scores: np.ndarray = digamma(counts) - digamma(np.array([counts.sum()]))[0]
    return scores


def digamma(x: np.ndarray) -> np.ndarray:
    """Return the derivative of log gamma: Abramowitz and Stegun 6.3.18 for x >= 7, and the recurrence 6.3.5 for smaller x."""
    result = np.zeros_like(x)
    x = x.copy()
    for _ in range(8):
        small = x < 7
        result[small] -= 1 / x[small]
        x[small] += 1
    square = 1 / (x * x)
    value: np.ndarray = result + np.log(x) - 0.5 / x - square * (1 / 12 - square * (1 / 120 - square / 252))
    return value


def _losses(lattice: Lattice, scores: np.ndarray, expected: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return how much the log likelihood of the text would drop without each piece, float64 (pieces,).

    The drop is the piece's expected count times the difference between its score and the score of its best segmentation into other
    pieces. All these segmentations are computed in a second lattice, with one word for each piece. The result for single characters
    is -inf.
    """
    edges = lattice.edges
    longer = np.flatnonzero(lengths > 1)
    _, first = np.unique(edges.piece, return_index=True)
    example = np.full(len(scores), -1)  # a node where each piece begins in the text
    example[edges.piece[first]] = edges.start[first]
    longer = longer[example[longer] >= 0]
    sizes = lengths[longer] + 1
    begins = np.cumsum(sizes) - sizes
    owner = np.repeat(np.arange(len(longer)), sizes)
    level = np.arange(int(sizes.sum())) - begins[owner]
    original = example[longer][owner] + level  # the node in the first lattice that each node in the second lattice copies
    by_start = np.argsort(edges.start, kind="stable")
    first_edge = np.searchsorted(edges.start[by_start], np.arange(lattice.n_nodes + 1))
    n_edges = first_edge[original + 1] - first_edge[original]
    n_edges[begins + sizes - 1] = 0  # no edge leaves a piece's last node
    source = np.repeat(np.arange(len(level)), n_edges)
    within = np.arange(int(n_edges.sum())) - np.repeat(np.cumsum(n_edges) - n_edges, n_edges)
    edge = by_start[first_edge[original[source]] + within]
    length = edges.end[edge] - edges.start[edge]
    whole = longer[owner[source]]
    inside = (level[source] + length <= lengths[whole]) & (edges.piece[edge] != whole)
    inner = Edges(source[inside], source[inside] + length[inside], edges.piece[edge[inside]])
    best = Lattice(inner, level, begins, begins + sizes - 1).forward(scores, best_only=True)
    losses = np.full(len(scores), -np.inf)
    losses[longer] = expected[longer] * (scores[longer] - best[begins + sizes - 1])
    return losses
