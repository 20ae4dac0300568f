"""Quality rules for documents: those of Gopher, C4 and FineWeb, with the limits that FineWeb uses.

Gopher: Rae et al. 2021, table A1. C4: Raffel et al. 2020, without the rule that lines must end with punctuation, as in FineWeb.
FineWeb: Penedo et al. 2024; the limits are the defaults of datatrove, the library that produced the dataset. A rule measures one
number and removes a document if the number is outside its limits. Words are separated by whitespace. The rules were designed for
English web pages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from tinylm.curation.words import Words, find_words

_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_MIN_SENTENCES = 5
_SENTENCE_BREAK = re.compile(r"[.!?][\"'”’)\]]*[ \t]+(?=\S)")
_TERMINAL_PUNCTUATION = tuple(".!?…。！？．؟।॥։።…\"'”’»")
_SHORT_LINE_CHARACTERS = 30


class Page:
    """A document with the quantities that several rules use."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def lines(self) -> list[str]:
        """The lines that are not blank."""
        return [line for line in self.text.split("\n") if line.strip()]

    @cached_property
    def paragraphs(self) -> list[str]:
        """The parts of the text that are separated by empty lines."""
        return [part.lstrip("\n") for part in self.text.strip().split("\n\n") if part != "" and part != "\n"]

    @cached_property
    def words(self) -> Words:
        return find_words(self.text)

    @cached_property
    def repeated_lines(self) -> tuple[int, int]:
        """The number of lines that repeat an earlier one, and the number of characters in them."""
        return _repeated(self.lines)

    @cached_property
    def repeated_paragraphs(self) -> tuple[int, int]:
        """The number of paragraphs that repeat an earlier one, and the number of characters in them."""
        return _repeated(self.paragraphs)

    def share_of_repeated_ngrams(self, length: int) -> float:
        """Return the fraction of the characters in n-grams that occurred before. N-grams that overlap are counted once."""
        return _share(self.words.repeated_characters(length), len(self.text))

    def share_of_top_ngram(self, length: int) -> float:
        """Return the fraction of the characters in the most frequent n-gram, or 0 if no n-gram is repeated."""
        count, characters = self.words.top_ngram(length)
        return count * characters / len(self.text) if count > 1 else 0.0


def _repeated(elements: Sequence[str]) -> tuple[int, int]:
    """Return the number of elements that repeat an earlier one, and the number of characters in them."""
    unique = set(elements)
    return len(elements) - len(unique), sum(map(len, elements)) - sum(map(len, unique))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _count_share(repeated: tuple[int, int], elements: Sequence[str]) -> float:
    return _share(repeated[0], len(elements))


def _text_share(repeated: tuple[int, int], page: Page) -> float:
    return _share(repeated[1], len(page.text))


def _line_share(page: Page, condition: Callable[[str], bool]) -> float:
    return _share(sum(map(condition, page.lines)), len(page.lines))


def _is_bullet(line: str) -> bool:
    return line.lstrip().startswith(("•", "-"))


def _ends_with_ellipsis(line: str) -> bool:
    return line.rstrip().endswith(("...", "…"))


def _sentences(page: Page) -> int:
    """Return the number of sentences. If there are at least `_MIN_SENTENCES` lines, return their number, which is a lower bound."""
    lines = len(page.lines)
    return lines if lines >= _MIN_SENTENCES else lines + len(_SENTENCE_BREAK.findall(page.text))


@cache
def _stop_word_hashes() -> np.ndarray:
    return find_words(" ".join(_STOP_WORDS)).hashes


def _stop_words(page: Page) -> int:
    return int((page.words.hashes[:, None] == _stop_word_hashes()).any(axis=0).sum())


def _top_ngram(length: int) -> Callable[[Page], float]:
    return lambda page: page.share_of_top_ngram(length)


def _repeated_ngrams(length: int) -> Callable[[Page], float]:
    return lambda page: page.share_of_repeated_ngrams(length)


@dataclass(frozen=True)
class Rule:
    """A quality rule. A document is removed if `measure` returns a value below `low` or above `high`."""

    name: str
    quantity: str
    measure: Callable[[Page], float]
    low: float = -math.inf
    high: float = math.inf

    @property
    def group(self) -> str:
        return self.name.partition("_")[0]

    @property
    def meaning(self) -> str:
        """What the rule removes, for example `words: less than 50 or more than 100,000`."""
        limits = [f"less than {self.low:,g}"] if self.low > -math.inf else []
        limits += [f"more than {self.high:,g}"] if self.high < math.inf else []
        return f"{self.quantity}: {' or '.join(limits)}"


RULES = (
    Rule(
        "gopher_paragraphs", "share of repeated paragraphs", lambda p: _count_share(p.repeated_paragraphs, p.paragraphs), high=0.3
    ),
    Rule(
        "gopher_paragraph_text", "share of text in repeated paragraphs", lambda p: _text_share(p.repeated_paragraphs, p), high=0.2
    ),
    Rule("gopher_lines", "share of repeated lines", lambda p: _count_share(p.repeated_lines, p.lines), high=0.3),
    Rule("gopher_line_text", "share of text in repeated lines", lambda p: _text_share(p.repeated_lines, p), high=0.2),
    *(
        Rule(f"gopher_top_{n}_gram", f"share of text in the most frequent {n}-gram", _top_ngram(n), high=limit)
        for n, limit in ((2, 0.2), (3, 0.18), (4, 0.16))
    ),
    *(
        Rule(f"gopher_{n}_grams", f"share of text in repeated {n}-grams", _repeated_ngrams(n), high=limit)
        for n, limit in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1))
    ),
    Rule("gopher_words", "words", lambda p: len(p.words), 50, 100_000),
    Rule("gopher_word_length", "mean word length", lambda p: _share(float(p.words.lengths.sum()), len(p.words)), 3, 10),
    Rule("gopher_hashes", "number signs (#) per word", lambda p: _share(p.text.count("#"), len(p.words)), high=0.1),
    Rule("gopher_ellipses", "ellipses per word", lambda p: _share(p.text.count("...") + p.text.count("…"), len(p.words)), high=0.1),
    Rule("gopher_bullets", "share of lines that begin with a bullet", lambda p: _line_share(p, _is_bullet), high=0.9),
    Rule(
        "gopher_ellipsis_lines", "share of lines ending with an ellipsis", lambda p: _line_share(p, _ends_with_ellipsis), high=0.3
    ),
    Rule("gopher_letters", "share of words with a letter", lambda p: _share(p.words.with_letter, len(p.words)), 0.8),
    Rule("gopher_stop_words", f"different words among {', '.join(sorted(_STOP_WORDS))}", _stop_words, 2),
    Rule("c4_lorem_ipsum", "occurrences of lorem ipsum", lambda p: p.text.lower().count("lorem ipsum"), high=0),
    Rule("c4_curly_brackets", "occurrences of {", lambda p: p.text.count("{"), high=0),
    Rule("c4_sentences", "sentences", _sentences, _MIN_SENTENCES),
    Rule(
        "fineweb_punctuation",
        "share of lines that end with punctuation",
        lambda p: _line_share(p, lambda line: line.endswith(_TERMINAL_PUNCTUATION)),
        0.12,
    ),
    Rule(
        "fineweb_short_lines",
        f"share of lines with at most {_SHORT_LINE_CHARACTERS} characters",
        lambda p: _line_share(p, lambda line: len(line) <= _SHORT_LINE_CHARACTERS),
        high=0.67,
    ),
    Rule(
        "fineweb_repeated_lines",
        "share of text in repeated lines",
        lambda p: _share(p.repeated_lines[1], len(p.text) - p.text.count("\n")),
        high=0.01,
    ),
    Rule("fineweb_line_breaks", "line breaks per word", lambda p: _share(len(p.lines) - 1, len(p.words)), high=0.3),
)
"""All rules in the order in which they are applied. Those of Gopher are applied before the line rules of C4."""


def first_violated(page: Page, rules: Sequence[Rule]) -> tuple[Rule, float] | None:
    """Return the first rule that removes the document, and the measured value, or None if no rule removes it."""
    for rule in rules:
        value = rule.measure(page)
        if not rule.low <= value <= rule.high:
            return rule, value
    return None
