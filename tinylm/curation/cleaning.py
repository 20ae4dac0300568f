"""Normalize the text of a document, and remove the lines that the line rules of C4 remove.

Both are pure functions of a document. They run twice, when a document is analyzed and when it is encoded, so that the cleaned text
need not be stored.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass

_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
_LINE_ENDINGS = re.compile(r"\r\n?")
_ASCII_CONTROL_CHARACTERS = bytes(code for code in (*range(32), 127) if chr(code) not in "\t\n")
_TRAILING_SPACE = re.compile(r"[ \t\u00a0\u3000]+(?=\n|\Z)")
_SPACES = (" ", "\t", "\u00a0", "\u3000")
_BLANK_LINES = re.compile(r"\n{4,}")
_CITATIONS = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_MAX_WORD_CHARACTERS = 1000
_MIN_LINE_WORDS = 3


def clean(text: str) -> str:
    """Normalize a text: NFC, line feeds as line endings, and no control characters, trailing spaces or long runs of blank lines.

    Up to two blank lines in a row are kept, but none at the beginning and end.
    """
    if "\r" in text:
        text = _LINE_ENDINGS.sub("\n", text)
    if text.isascii():  # several times faster
        text = text.encode("ascii").translate(None, _ASCII_CONTROL_CHARACTERS).decode("ascii")
    else:
        text = _CONTROL_CHARACTERS.sub("", unicodedata.normalize("NFC", text))
    if text.endswith(_SPACES) or any(f"{space}\n" in text for space in _SPACES):
        text = _TRAILING_SPACE.sub("", text)
    return _without_blank_lines(text)


def _without_blank_lines(text: str) -> str:
    stripped = (_BLANK_LINES.sub("\n\n\n", text) if "\n\n\n\n" in text else text).strip("\n")
    return f"{stripped}\n" if stripped and text.endswith("\n") else stripped


@dataclass(frozen=True)
class LineRule:
    """A rule of C4 that removes lines, or parts of lines, but not whole documents."""

    name: str
    meaning: str


LINE_RULES = (
    LineRule("c4_long_words", f"lines with a word of more than {_MAX_WORD_CHARACTERS:,} characters"),
    LineRule("c4_citations", "citation marks such as [1], [edit] and [citation needed]"),
    LineRule("c4_short_lines", f"lines with fewer than {_MIN_LINE_WORDS} words"),
    LineRule("c4_javascript", "lines that contain the word javascript"),
    LineRule("c4_policies", "lines about cookies, terms of use or a privacy policy"),
)
"""The line rules in the order in which they are applied to a line."""


@dataclass
class RemovedLines:
    """What a line rule removed from a document."""

    count: int
    bytes: int
    example: str


def apply_line_rules(text: str, rules: Collection[str]) -> tuple[str, dict[str, RemovedLines]]:
    """Remove the lines that violate one of `rules`. Return the remaining text and what each rule removed.

    Blank lines and indentation are kept, which C4 does not do: they separate paragraphs and structure code.
    """
    removed: dict[str, RemovedLines] = {}
    rules = _possible(text, rules)
    kept = []
    for line in text.split("\n") if rules else ():
        if not line or line.isspace():
            kept.append(line)
            continue
        if "c4_citations" in rules and "[" in line:
            shorter = _CITATIONS.sub("", line)
            if shorter != line:
                _count(removed, "c4_citations", line, len(line.encode()) - len(shorter.encode()))
                line = shorter
        rule = _violated(line, rules)
        if rule is None:
            kept.append(line)
        else:
            _count(removed, rule, line, len(line.encode()) + 1)
    if not removed:
        return text, removed
    result = _without_blank_lines("\n".join(kept))
    # Blank lines around removed lines are attributed to the first rule, so that the bytes of all rules add up.
    difference = len(text.encode("utf-8")) - len(result.encode("utf-8"))
    next(iter(removed.values())).bytes += difference - sum(entry.bytes for entry in removed.values())
    return result, removed


def _possible(text: str, rules: Collection[str]) -> set[str]:
    """Return the rules that can have an effect on a text. It saves time to test the whole text first."""
    lower = text.lower()
    absent = {
        "c4_citations": "[" not in text,
        "c4_javascript": "javascript" not in lower,
        "c4_policies": not any(policy in lower for policy in _POLICIES),
    }
    return {rule for rule in rules if not absent.get(rule, False)}


def _violated(line: str, rules: Collection[str]) -> str | None:
    if "c4_long_words" in rules and len(line) > _MAX_WORD_CHARACTERS and max(map(len, line.split())) > _MAX_WORD_CHARACTERS:
        return "c4_long_words"
    if "c4_short_lines" in rules and len(line.split(None, _MIN_LINE_WORDS)) < _MIN_LINE_WORDS:
        return "c4_short_lines"
    if "c4_javascript" in rules and "javascript" in line.lower():
        return "c4_javascript"
    if "c4_policies" in rules and any(policy in line.lower() for policy in _POLICIES):
        return "c4_policies"
    return None


def _count(removed: dict[str, RemovedLines], rule: str, line: str, size: int) -> None:
    entry = removed.setdefault(rule, RemovedLines(0, 0, line))
    entry.count += 1
    entry.bytes += size
