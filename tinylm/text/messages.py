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
    """Whether the marker occurs once, before a letter or digit, and not inside an identifier, path or character reference."""
    if text.count(marker) != 1:
        return False
    index = text.index(marker)
    following = text[index + 1 : index + 2]
    word = next(word for word in text.split() if marker in word)
    if marker == "&" and re.search(r"&#?\w+;", word):
        return False
    if marker == "~" and following == "/":
        return False
    inside = re.search(rf"\w{re.escape(marker)}", word) is not None
    looks_like_code = any(character in word for character in "./\\=%$<>") or (inside and (word.isupper() or word.islower()))
    return following.isalnum() and not looks_like_code


def _without_accelerator(text: str, marker: str) -> str:
    """Remove the marker, together with its letter and parentheses if the accelerator is written as in `Open(_O)`."""
    text = re.sub(rf"\s*\({re.escape(marker)}\w\)", "", text)
    return text.replace(marker, "")


def placeholders(text: str) -> Counter[str]:
    """Count the placeholders in a message, such as `%s` and `{name}`.

    Positions (`%1$s`) are ignored, because a translation may reorder the placeholders.
    """
    return Counter(_POSITION.sub("%", match) for match in _PLACEHOLDERS.findall(text))
