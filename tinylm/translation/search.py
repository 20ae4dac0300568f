"""Find translations of source sentences with beam search and a length penalty, or by sampling."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.model.compiled_translation import CompiledTranslation
from tinylm.model.sequence_to_sequence import SequenceToSequence
from tinylm.translation.decoding import Decoding, decoding_mode, padded_length, top_extensions

DEFAULT_BEAMS = 5
DEFAULT_BATCH = 32
_EXTRA_TOKENS = 20
_MAX_LENGTH_PENALTY = 10.0
"""Maximum absolute value. Scores could overflow with larger exponents."""
_TOKENS_PER_SOURCE_TOKEN = 3
_NEVER = float("-inf")


@dataclass(frozen=True)
class SearchOptions:
    """Settings for finding translations. `check` raises `InputError` if a value is out of range."""

    beams: int = DEFAULT_BEAMS
    """Number of partial translations to keep in each step. 1 is greedy decoding."""
    length_penalty: float = 1.0
    """The exponent A in score = log-probability / ((5 + length) / 6) ** A (Wu et al. 2016). The length includes the end token."""
    n_best: int = 1
    """Number of translations to return for each sentence."""
    max_length: int | None = None
    """Maximum number of tokens, including the end token. None means 3 times the source length plus 20."""
    no_repeat_ngram: int = 0
    """Never generate an n-gram of this length twice in a translation. 0 turns this off."""
    temperature: float | None = None
    """Sample translations at this temperature instead of searching for the most likely ones."""
    top_k: int | None = None
    """Sample only from this many of the most likely tokens. None means all tokens."""
    seed: int = 0

    def check(self) -> None:
        limits = (
            ("--beams", self.beams, 1),
            ("-n", self.n_best, 1),
            ("--max-length", self.max_length, 1),
            ("--no-repeat-ngram", self.no_repeat_ngram, 0),
            ("--top-k", self.top_k, 1),
        )
        for option, value, least in limits:
            if value is not None and value < least:
                raise InputError(f"must be at least {least}, not {value}", where=option)
        if self.temperature is None and self.n_best > self.beams:
            raise InputError(f"must be at least -n ({self.n_best})", where="--beams")
        if self.temperature is not None and not self.temperature > 0:
            raise InputError(f"must be above 0, not {self.temperature:g}", where="--temperature")
        if not abs(self.length_penalty) <= _MAX_LENGTH_PENALTY:
            limit = f"between -{_MAX_LENGTH_PENALTY:g} and {_MAX_LENGTH_PENALTY:g}"
            raise InputError(f"must be {limit}, not {self.length_penalty:g}", where="--length-penalty")

    def limit(self, source: np.ndarray, context_length: int) -> int:
        """Return the maximum number of tokens in the translation of a source sentence."""
        limit = self.max_length or _TOKENS_PER_SOURCE_TOKEN * len(source) + _EXTRA_TOKENS
        return min(limit, context_length)


@dataclass(frozen=True)
class Hypothesis:
    """A translation as token ids, without the end token."""

    ids: tuple[int, ...]
    logprob: float
    """Log-probability in nats, including the end token."""
    score: float
    """The log-probability divided by the length penalty."""
    finished: bool = True
    """Whether the translation ended with the end token. Otherwise, it reached the maximum length."""


def penalized(logprob: float, length: int, exponent: float) -> float:
    """Return the score of a translation of `length` tokens, including the end token."""
    return float(logprob / ((5 + length) / 6) ** exponent)


def translate_ids(
    network: SequenceToSequence,
    sources: Sequence[np.ndarray],
    end: int,
    options: SearchOptions,
    *,
    batch_size: int = DEFAULT_BATCH,
    compiled: CompiledTranslation | None = None,
    on_batch: Callable[[int], None] = lambda sentences: None,
) -> list[list[Hypothesis]]:
    """Translate source sentences, passed as ids with control tokens. Returns the best translations of each sentence, best first.

    `end` is the id of the end token. The translations of a sentence do not depend on the other sentences or on `batch_size`.
    `compiled` runs the network's decoder in compiled code, whose scores can differ from PyTorch's in the last bits.
    `on_batch` is called after every batch with the number of sentences translated so far.
    """
    options.check()
    results: list[list[Hypothesis]] = [[] for _ in sources]
    done = 0
    with decoding_mode(network) as threads:
        for indexes in _batches(sources, batch_size, of_one_length=compiled is None):
            batch = [sources[index] for index in indexes]
            limits = [options.limit(source, network.model.context_length) for source in batch]
            decoding = Decoding(network, batch, compiled, threads)
            if options.temperature is None:
                found = _BeamSearch(options, end, limits).run(decoding)
            else:
                found = _sample(decoding, batch, end, options, limits)
            for index, hypotheses in zip(indexes, found, strict=True):
                results[index] = hypotheses
            done += len(indexes)
            on_batch(done)
    return results


def _batches(sources: Sequence[np.ndarray], size: int, *, of_one_length: bool) -> Iterator[list[int]]:
    """Yield lists of at most `size` indices of sentences of similar lengths, or of one padded length."""
    groups: dict[int, list[int]] = {}
    for index, source in enumerate(sources):
        groups.setdefault(padded_length(source) if of_one_length else 0, []).append(index)
    for _, indexes in sorted(groups.items()):
        indexes.sort(key=lambda index: len(sources[index]))
        for start in range(0, len(indexes), size):
            yield indexes[start : start + size]


class _BeamSearch:
    """Beam search for one batch.

    Each step extends all beams of a sentence and keeps the most likely extensions. A translation is finished if its extension by
    the end token is among the `beams` most likely extensions. As in `transformers`, a sentence is done when it has `beams` finished
    translations and no unfinished one has a better score. It is also done when no unfinished translation can become one of the
    `n_best` translations.
    """

    def __init__(self, options: SearchOptions, end: int, limits: Sequence[int]) -> None:
        self._beams, self._options, self._end, self._limits = options.beams, options, end, limits
        self._finished: list[list[Hypothesis]] = [[] for _ in limits]
        self._active = list(range(len(limits)))
        """The indices of sentences that are not done."""
        self._ids: list[list[list[int]]] = [[[]] for _ in limits]
        """The beams of each sentence. At first, there is only the empty translation."""

    def run(self, decoding: Decoding) -> list[list[Hypothesis]]:
        decoding.start()
        totals = torch.zeros(len(self._limits), 1, device=decoding.device)
        for length in range(1, max(self._limits) + 1):
            sentences = len(self._active)
            totals, parents, tokens, kept = self._extend(decoding, totals, length)
            if not kept:
                break
            decoding.step(parents, tokens, None if len(kept) == sentences else kept)
        return [sorted(found, key=lambda each: -each.score)[: self._options.n_best] for found in self._finished]

    def _extend(self, decoding: Decoding, totals: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Extend the beams to `length` tokens.

        Returns the total log-probabilities (sentences, beams), the parents (rows,) and the tokens (rows,) of the sentences that are
        not done, and the places of these sentences among the active ones.
        """
        beams, vocab_size, device = totals.shape[1], decoding.vocab_size, totals.device
        if self._options.no_repeat_ngram:
            values, indexes = top_extensions(self._without_repeated_ngrams(decoding.logprobs()), totals, 2 * self._beams)
        else:
            values, indexes = decoding.top_extensions(totals, 2 * self._beams)
        rows = zip(self._active, values.tolist(), indexes.tolist(), strict=True)
        extended = [
            self._extend_sentence(sentence, best, [divmod(index, vocab_size) for index in extensions], length)
            for sentence, best, extensions in rows
        ]
        places = _without_gaps([kept is not None for kept in extended])
        new_totals, parents, tokens = [], [], []
        for place in places:
            kept = extended[place]
            assert kept is not None
            new_totals.append([total for total, _, _ in kept])
            parents += [place * beams + parent for _, parent, _ in kept]
            tokens += [token for _, _, token in kept]
        self._active = [self._active[place] for place in places]
        return (
            torch.tensor(new_totals, device=device),
            torch.tensor(parents, dtype=torch.long, device=device),
            torch.tensor(tokens, dtype=torch.long, device=device),
            places,
        )

    def _extend_sentence(
        self, sentence: int, values: list[float], extensions: list[tuple[int, int]], length: int
    ) -> list[tuple[float, int, int]] | None:
        """Divide the extensions (beam, token) of a sentence, which are sorted best first, into finished ones and ones to keep.

        Returns (total log-probability, parent, token) for each kept beam, or None if the sentence is done.
        """
        before, finished = self._ids[sentence], self._finished[sentence]
        kept: list[tuple[float, int, int]] = []
        for rank, (total, (parent, token)) in enumerate(zip(values, extensions, strict=True)):
            if total == _NEVER or len(kept) == self._beams:
                break
            if token == self._end:
                if rank < self._beams:
                    finished.append(self._hypothesis(before[parent], total, length))
            else:
                kept.append((total, parent, token))
        ids = [[*before[parent], token] for _, parent, token in kept]
        if length == self._limits[sentence]:
            finished += [self._hypothesis(each, kept[i][0], length, finished=False) for i, each in enumerate(ids)]
        finished.sort(key=lambda each: -each.score)
        del finished[self._beams :]
        if not kept or length == self._limits[sentence] or self._is_complete(sentence, kept[0][0], length):
            return None
        while len(kept) < self._beams:  # a tiny vocabulary has fewer extensions than beams
            kept.append((_NEVER, kept[0][1], kept[0][2]))
            ids.append(ids[0])
        self._ids[sentence] = ids
        return kept

    def _is_complete(self, sentence: int, best: float, length: int) -> bool:
        """Whether the search is done for a sentence whose most likely unfinished translation has log-probability `best`."""
        finished, exponent, wanted = self._finished[sentence], self._options.length_penalty, self._options.n_best
        if len(finished) == self._beams and penalized(best, length, exponent) <= finished[-1].score:
            return True
        # The log-probability of a longer translation is at most `best`, so no translation can have a higher score than this.
        bound = penalized(best, self._limits[sentence] if exponent > 0 else length, exponent)
        return len(finished) >= wanted and bound <= finished[wanted - 1].score

    def _hypothesis(self, ids: list[int], total: float, length: int, *, finished: bool = True) -> Hypothesis:
        return Hypothesis(tuple(ids), total, penalized(total, length, self._options.length_penalty), finished)

    def _without_repeated_ngrams(self, logprobs: Tensor) -> Tensor:
        rows = [ids for sentence in self._active for ids in self._ids[sentence]]
        return without_repeated_ngrams(logprobs, rows, self._options.no_repeat_ngram)


def _without_gaps(kept: Sequence[bool]) -> list[int]:
    """Return the places that are kept. The last ones move into the gaps, so that most places do not change."""
    count = sum(kept)
    moved = (place for place in range(count, len(kept)) if kept[place])
    return [place if kept[place] else next(moved) for place in range(count)]


def without_repeated_ngrams(logprobs: Tensor, rows: Sequence[Sequence[int]], order: int) -> Tensor:
    """Return log-probabilities (R, V) that are -inf for tokens that would repeat an n-gram in the ids of their row."""
    logprobs = logprobs.clone()
    for row, ids in enumerate(rows):
        prefix = tuple(ids[len(ids) - order + 1 :]) if order > 1 else ()
        if len(ids) < order:
            continue
        banned = [ids[i + order - 1] for i in range(len(ids) - order + 1) if tuple(ids[i : i + order - 1]) == prefix]
        logprobs[row, banned] = _NEVER
    return logprobs


def _sample(
    decoding: Decoding, sources: Sequence[np.ndarray], end: int, options: SearchOptions, limits: Sequence[int]
) -> list[list[Hypothesis]]:
    """Sample `n_best` translations of each sentence. The result for a sentence depends only on the seed and on the sentence."""
    count = options.n_best
    generators = [_generator(options.seed, source, number) for source in sources for number in range(count)]
    rows: list[list[int]] = [[] for _ in generators]
    totals, open_rows = [0.0] * len(rows), set(range(len(rows)))
    results: list[Hypothesis | None] = [None] * len(rows)
    decoding.start()
    logprobs = decoding.logprobs().repeat_interleave(count, dim=0)
    everything = torch.arange(len(rows), device=logprobs.device)
    parents = everything // count  # each sentence has only one row at first
    for length in range(1, max(limits) + 1):
        if options.no_repeat_ngram:
            logprobs = without_repeated_ngrams(logprobs, rows, options.no_repeat_ngram)
        tokens = [end] * len(rows)
        for row in sorted(open_rows):
            token = _draw(logprobs[row], options, generators[row])
            totals[row] += float(logprobs[row, token])
            tokens[row] = token
            if token != end:
                rows[row].append(token)
            if token == end or length == limits[row // count]:
                score = penalized(totals[row], length, options.length_penalty)
                results[row] = Hypothesis(tuple(rows[row]), totals[row], score, token == end)
                open_rows.remove(row)
        if not open_rows:
            break
        decoding.step(parents, torch.tensor(tokens, device=logprobs.device))
        logprobs, parents = decoding.logprobs(), everything
    drawn = [hypothesis for hypothesis in results if hypothesis is not None]
    return [sorted(drawn[i : i + count], key=lambda each: -each.score) for i in range(0, len(drawn), count)]


def _generator(seed: int, source: np.ndarray, number: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed} {number} {source.tolist()}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _draw(logprobs: Tensor, options: SearchOptions, generator: np.random.Generator) -> int:
    """Sample a token from log-probabilities (V,) with the temperature and top-k in `options`."""
    assert options.temperature is not None
    values, tokens = logprobs.double().sort(descending=True, stable=True)
    if options.top_k is not None:
        values, tokens = values[: options.top_k], tokens[: options.top_k]
    cumulative = (values / options.temperature).softmax(0).cumsum(0).cpu().numpy()
    place = int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
    return int(tokens[min(place, len(tokens) - 1)])
