"""Prepare program messages for translation: remove keyboard accelerators and line breaks, and find placeholders."""

from __future__ import annotations

import re
from collections import Counter

_MARKERS = ("_", "&", "~")
"""The markers of keyboard accelerators in GTK, Qt and LibreOffice."""
_PLACEHOLDERS = re.compile(
    r"%%|%(?:\d+\$)?(?:\(\w+\))?[-+#0]*(?:\d+|\*)?(?:\.(?:\d+|\*))?(?:hh|h|ll|l|L|q|j|z|t)?[diouxXeEfFgGcrsaA]"
    r"|%\d+|\$\{\w+\}|\$\w+|\{\w*\}|@\w+@"
)
_PUNCTUATION = ".…:,;!?)\"'”»"
"""What can follow a word without making it code, as in `_Open...`."""
_TAG = re.compile(r"</?\w[^<>]*>")
_POSITION = re.compile(r"^%\d+\$")


def clean_message(source: str, target: str) -> tuple[str, str]:
    """Remove accelerators from a message and its translation, and replace each run of whitespace with one space."""
    source, target = (" ".join(text.split()) for text in (source, target))
    for marker in _MARKERS:
        if _has_accelerator(source, marker) and (_has_accelerator(target, marker) or marker not in target):
            source = _without_accelerator(source, marker)
            target = _without_accelerator(target, marker) if _has_accelerator(target, marker) else target
            break
    return source, target


def _has_accelerator(text: str, marker: str) -> bool:
    """Whether the marker occurs once, before a letter or digit, and not inside a tag, identifier, path or character reference."""
    word = next((word for word in _TAG.sub(" ", text).split() if marker in word), None)
    if text.count(marker) != 1 or word is None or (marker == "&" and re.search(r"&#?\w+;", word)):
        return False
    word = word.rstrip(_PUNCTUATION)
    before, _, after = word.partition(marker)
    if not after[:1].isalnum() or any(character in word for character in ".\\=%$<>"):
        return False
    if "/" in word:
        # `_Open/Close` and `Open/_Close` have an accelerator, but `a/b_c`, `/_cache` and `src/_core` are paths.
        parts = word.split("/")
        return all(parts) and (not before or (before.endswith("/") and after[:1].isupper()))
    return not (before[-1:].isalnum() and (word.isupper() or word.islower()))


def _without_accelerator(text: str, marker: str) -> str:
    """Remove the marker, together with its letter and parentheses if the accelerator is written as in `Open(_O)`."""
    text = re.sub(rf"\s*\({re.escape(marker)}\w\)", "", text)
    return text.replace(marker, "")


def placeholders(text: str) -> Counter[str]:
    """Count the placeholders in a message, such as `%s` and `{name}`.

    Positions (`%1$s`) are ignored, because a translation may reorder the placeholders.
    """
    return Counter(_POSITION.sub("%", match) for match in _PLACEHOLDERS.findall(text))
