"""Baselines for translation models: a copy of the source, the most similar training sentence, and a word-by-word translation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from tinylm.text.pairs import SentencePair

_WORDS = re.compile(r"\w+|[^\w\s]")
_ITERATIONS = 6
_SPACE_BEFORE_PUNCTUATION = re.compile(r"\s+([^\w\s])(?=\s|$)")


def words(text: str) -> list[str]:
    """Return the words and punctuation marks in a sentence."""
    return _WORDS.findall(text)


class TranslationMemory:
    """Returns the translation of the most similar training sentence, by cosine similarity of TF-IDF vectors."""

    def __init__(self, pairs: Sequence[SentencePair]) -> None:
        self._pairs = pairs
        counts = [Counter(words(pair.source.lower())) for pair in pairs]
        frequency = Counter(word for counted in counts for word in counted)
        self._idf = {word: float(np.log(len(pairs) / count) + 1) for word, count in frequency.items()}
        places: dict[str, list[int]] = {word: [] for word in frequency}
        weights: dict[str, list[float]] = {word: [] for word in frequency}
        for index, counted in enumerate(counts):
            vector = {word: count * self._idf[word] for word, count in counted.items()}
            norm = float(np.sqrt(sum(value**2 for value in vector.values()))) or 1.0
            for word, value in vector.items():
                places[word].append(index)
                weights[word].append(value / norm)
        self._postings = {word: (np.array(places[word]), np.array(weights[word])) for word in frequency}

    def translate(self, source: str) -> str:
        scores = np.zeros(len(self._pairs))
        for word, count in Counter(words(source.lower())).items():
            if word in self._postings:
                indexes, weights = self._postings[word]
                scores[indexes] += count * self._idf[word] * weights
        return self._pairs[int(scores.argmax())].target if scores.any() else source


class WordByWord:
    """Replaces each word with its most likely translation according to IBM Model 1 (Brown et al. 1993). Keeps unknown words."""

    def __init__(self, pairs: Sequence[SentencePair]) -> None:
        sources, targets = _Vocabulary(), _Vocabulary()
        source_ids = [np.unique([sources.id(word) for word in words(pair.source)]) for pair in pairs]
        target_ids = [np.unique([targets.id(word) for word in words(pair.target)]) for pair in pairs]
        # One entry for each combination of a source word and a target word in the same pair
        source = np.concatenate([np.repeat(s, len(t)) for s, t in zip(source_ids, target_ids, strict=True)])
        target = np.concatenate([np.tile(t, len(s)) for s, t in zip(source_ids, target_ids, strict=True)])
        number = np.repeat(np.arange(len(pairs)), [len(s) * len(t) for s, t in zip(source_ids, target_ids, strict=True)])
        types, entry = np.unique(source * len(targets) + target, return_inverse=True)
        type_source = types // len(targets)
        _, group = np.unique(number * len(targets) + target, return_inverse=True)
        table: np.ndarray = np.ones(len(types))
        for _ in range(_ITERATIONS):
            expected: np.ndarray = table[entry]
            expected = expected / np.bincount(group, weights=expected)[group]
            table = np.bincount(entry, weights=expected, minlength=len(types))
            table = table / np.bincount(type_source, weights=table, minlength=len(sources))[type_source]
        order = np.lexsort((-table, type_source))
        first = np.unique(type_source[order], return_index=True)
        best = dict(zip(first[0].tolist(), (types[order[first[1]]] % len(targets)).tolist(), strict=True))
        source_words, target_words = sources.words, targets.words
        self._translations = {source_words[source_id]: target_words[target_id] for source_id, target_id in best.items()}

    def translate(self, source: str) -> str:
        text = " ".join(self._translations.get(word, word) for word in words(source))
        return _SPACE_BEFORE_PUNCTUATION.sub(r"\1", text)


class _Vocabulary:
    """Numbers words in order of first occurrence."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def id(self, word: str) -> int:
        return self._ids.setdefault(word, len(self._ids))

    @property
    def words(self) -> list[str]:
        return list(self._ids)


def translate_with_baselines(train: Sequence[SentencePair], sources: Sequence[str]) -> dict[str, list[str]]:
    """Return the translations of each baseline, by name. Without training pairs, `copy` is the only baseline."""
    translations = {"copy": list(sources)}
    if train:
        memory, model = TranslationMemory(train), WordByWord(train)
        translations["memory"] = [memory.translate(source) for source in sources]
        translations["word_by_word"] = [model.translate(source) for source in sources]
    return translations
