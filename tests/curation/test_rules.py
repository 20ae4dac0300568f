"""Each quality rule removes a document that violates it, and the other rules keep that document."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tinylm.curation.cleaning import LINE_RULES, apply_line_rules, clean
from tinylm.curation.rules import RULES, Page


def distinct_words(length: int = 6) -> Iterator[str]:
    """Yield words of letters, none of which occurs twice."""
    return ("".join(letters) for letters in itertools.product("etaoinshrd", repeat=length))


def line(words: Iterator[str], count: int = 24) -> str:
    """Return a line of two sentences. It contains two of Gopher's stop words."""
    first, second = ([next(words) for _ in range(count // 2 - 1)] for _ in range(2))
    return f"the {' '.join(first)}. of {' '.join(second)}."


def lines(count: int, words: Iterator[str] | None = None) -> list[str]:
    words = words or distinct_words()
    return [line(words) for _ in range(count)]


def interleaved(phrase: str, gap: int, times: int) -> str:
    """Repeat a phrase with `gap` distinct words after each repetition, in sentences."""
    words = distinct_words()
    return "the of " + "\n".join(f"{phrase} {' '.join(next(words) for _ in range(gap))}." for _ in range(times))


def repeated_phrases(length: int, gap: int, count: int) -> str:
    """Return `count` phrases of `length` words, each twice, separated by `gap` distinct words."""
    words = distinct_words()
    phrases = [" ".join(next(words) for _ in range(length)) for _ in range(count)]
    texts = [f"{phrase} {' '.join(next(words) for _ in range(gap))}." for phrase in phrases * 2]
    return "the of " + "\n".join(texts)


def triples(count: int) -> Iterator[tuple[str, str, str]]:
    """Yield three words with 28 letters in total."""
    nine, ten, last = distinct_words(9), distinct_words(10), (word[::-1] for word in distinct_words(9))
    return itertools.islice(zip(nine, ten, last, strict=False), count)


WORDS = distinct_words()
BAD = {
    "gopher_paragraphs": "\n\n".join(["\n".join(lines(4, WORDS)) for _ in range(20)] + ["so it is."] * 11),
    "gopher_paragraph_text": "\n\n".join([*lines(6, WORDS), *lines(1), *lines(1), *lines(1)]),
    "gopher_lines": "\n".join(itertools.chain(*([text, "so it is."] for text in lines(40, WORDS)[:22]), lines(18, WORDS))),
    "gopher_line_text": "\n".join([*lines(9, WORDS), *lines(1), *lines(1), *lines(1), *lines(1)]),
    "gopher_top_2_gram": interleaved("alpha beta", 5, 20),
    "gopher_top_3_gram": interleaved("alpha beta gamma", 9, 20),
    "gopher_top_4_gram": interleaved("alpha beta gamma delta", 15, 20),
    "gopher_5_grams": repeated_phrases(5, 8, 20),
    "gopher_6_grams": repeated_phrases(6, 11, 20),
    "gopher_7_grams": repeated_phrases(7, 14, 20),
    "gopher_8_grams": repeated_phrases(8, 18, 20),
    "gopher_9_grams": repeated_phrases(9, 23, 20),
    "gopher_10_grams": repeated_phrases(10, 29, 20),
    "gopher_words": "\n".join(line(WORDS, 8) for _ in range(5)),
    "gopher_word_length": "\n".join(lines(5, distinct_words(14))),
    "gopher_hashes": "\n".join(lines(5)).replace(" e", " #e"),
    "gopher_ellipses": "\n".join(lines(5)).replace(" e", " e...e"),
    "gopher_bullets": "\n".join(f"- {text}" for text in lines(5)),
    "gopher_ellipsis_lines": "\n".join(f"{text[:-1]}…" for text in lines(5)),
    "gopher_letters": "\n".join(f"{text} {' '.join(map(str, range(9 * k, 9 * k + 9)))}." for k, text in enumerate(lines(5))),
    "gopher_stop_words": "\n".join(lines(5)).replace("of ", "off "),
    "c4_lorem_ipsum": "\n".join([*lines(5), "here it says lorem ipsum and no more."]),
    "c4_curly_brackets": "\n".join([*lines(5), "the code is { and no more."]),
    "c4_sentences": lines(1)[0].replace(".", "") + " " + " ".join(next(WORDS) for _ in range(40)) + ".",
    "fineweb_punctuation": "\n".join(text[:-1] for text in lines(5)),
    "fineweb_short_lines": "\n".join(f"the {next(WORDS)} of {next(WORDS)}." for _ in range(16)),
    "fineweb_repeated_lines": "\n".join([*lines(24, WORDS), *lines(1), *lines(1)]),
    "fineweb_line_breaks": "\n".join(["the of to and.", *(f"{a} {b} {c}." for a, b, c in triples(24))]),
}
REPEATED_TEXT = {"fineweb_repeated_lines", *(f"gopher_{n}_grams" for n in range(5, 11))}
IMPLIED = {
    "gopher_paragraphs": {"fineweb_repeated_lines"},
    "gopher_paragraph_text": {"gopher_line_text", *REPEATED_TEXT},
    "gopher_lines": {"fineweb_repeated_lines"},
    "gopher_line_text": REPEATED_TEXT,
}
"""Stricter rules that every document that violates a rule also violates."""


def violated(text: str) -> set[str]:
    page = Page(text)
    return {rule.name for rule in RULES if not rule.low <= rule.measure(page) <= rule.high}


def test_a_good_document_violates_no_rule() -> None:
    assert violated("\n".join(lines(6))) == set()


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_a_rule_removes_a_document_that_only_it_removes(rule: str) -> None:
    found = violated(BAD[rule])
    assert rule in found, {r.name: r.measure(Page(BAD[rule])) for r in RULES if r.name == rule}
    assert found - {rule} <= IMPLIED.get(rule, set())


BAD_LINES = {
    "c4_long_words": f"see {'a' * 1001} for it",
    "c4_short_lines": "two words",
    "c4_javascript": "please enable JavaScript to continue",
    "c4_policies": "read our Privacy Policy for details",
}


@pytest.mark.parametrize("rule", BAD_LINES)
def test_a_line_rule_removes_a_line_that_only_it_removes(rule: str) -> None:
    text = f"a good line here\n{BAD_LINES[rule]}\n\n    an indented line here"
    kept, removed = apply_line_rules(text, [line_rule.name for line_rule in LINE_RULES])
    assert kept == "a good line here\n\n    an indented line here"
    assert {name: (entry.count, entry.bytes) for name, entry in removed.items()} == {rule: (1, len(BAD_LINES[rule]) + 1)}
    others = [line_rule.name for line_rule in LINE_RULES if line_rule.name != rule]
    assert apply_line_rules(text, others) == (text, {})


def test_citation_marks_are_removed_but_other_brackets_are_kept() -> None:
    text = "first[1] and second[citation needed] but a[i] and [2024]"
    kept, removed = apply_line_rules(text, ["c4_citations"])
    assert kept == "first and second but a[i] and "
    assert removed["c4_citations"].bytes == len(text) - len(kept)


def test_cleaning_normalizes_a_text_and_keeps_the_rest() -> None:
    assert clean("\n\ufeffcafe\u0301\r\nx \t\r\n\n\n\n\ny\x00z\n\n") == "caf\u00e9\nx\n\n\nyz\n"
    text = "    indented\n\ttabs  inside\n\n\nend\n"
    assert clean(text) == text


@pytest.mark.parametrize("text", ["a \x07b\r\nc\n\n\n\n\n", "\r\r\r\r\r", " \n \n", "x\x0b \n"])
def test_cleaning_a_clean_text_changes_nothing_and_does_not_depend_on_other_characters(text: str) -> None:
    assert clean(clean(text)) == clean(text)
    assert clean(f"{text}\u00e9") == clean(f"{text}e")[:-1] + "\u00e9"
