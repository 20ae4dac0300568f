"""The compiled loops over words agree with plain Python."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from tinylm.curation.rules import Page
from tinylm.curation.words import find_words

HASH = "0x3da466437b156e8f"
"""The hash of "word"."""
ALPHABETS = ("ab ", "abc1\n -", "a\u00e9\u4eca\u00bd\u3000\u2003\t\x1c_ \U0001f600\ud800", "".join(map(chr, range(128))))


def texts(seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [
        "".join(random.choice(list(alphabet), size)) for alphabet in ALPHABETS for size in (0, 1, 2, 5, 30, 400) for _ in range(5)
    ]


def ngrams(words: list[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]


def characters_of_top_ngram(words: list[str], length: int) -> tuple[int, int]:
    if len(words) < length:
        return 0, 0
    ngram, count = Counter(ngrams(words, length)).most_common(1)[0]  # the first one wins a tie
    return count, len(" ".join(ngram))


def repeated_characters(words: list[str], length: int) -> int:
    seen: set[tuple[str, ...]] = set()
    found, start, all_ngrams = 0, 0, ngrams(words, length)
    while start < len(all_ngrams):
        if all_ngrams[start] in seen:
            found += len("".join(all_ngrams[start]))
            start += length
        else:
            seen.add(all_ngrams[start])
            start += 1
    return found


def test_words_are_those_of_split() -> None:
    hashes: dict[str, int] = {}
    for text in texts():
        words, expected = find_words(text), text.split()
        assert words.lengths.tolist() == [len(word) for word in expected]
        assert words.with_letter == sum(any(character.isalpha() for character in word) for word in expected)
        assert all(hashes.setdefault(word, value) == value for word, value in zip(expected, words.hashes.tolist(), strict=True))
    assert len(set(hashes.values())) == len(hashes) > 500


@pytest.mark.parametrize("length", [2, 3, 4, 5, 10])
def test_ngrams_are_counted_as_in_plain_python(length: int) -> None:
    for text in texts():
        words, expected = find_words(text), text.split()
        assert words.top_ngram(length) == characters_of_top_ngram(expected, length)
        assert words.repeated_characters(length) == repeated_characters(expected, length)
        grams = ngrams(expected, length)
        hashes = words.ngram_hashes(length).tolist()
        assert len(set(zip(grams, hashes, strict=True))) == len(set(hashes)) == len(set(grams))


def test_paragraphs_are_separated_by_blank_lines() -> None:
    for text in texts():
        if text.strip():
            assert Page(text).paragraphs == re.split(r"\n{2,}", text.strip())


def test_hashes_do_not_depend_on_the_process_or_on_other_characters() -> None:
    assert hex(int(find_words("word").hashes[0])) == hex(int(find_words("\u4eca word").hashes[1])) == HASH
