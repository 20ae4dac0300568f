"""Find split points: positions where a text can be cut without changing any token.

A new word begins at every split point, regardless of the text before and after it. The parts between split points can therefore be
encoded separately and in any order, and a repeated part needs to be encoded only once. For example, the pretokenizer `gpt2` always
begins a word at a space that follows a letter, so `a cat sat` can be cut into `a`, ` cat` and ` sat`.

Whether a position is a split point depends on the classes of the two UTF-8 bytes around it. Split points are known only for the
named splits, not for custom regular expressions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from tinylm.tokenizer import kernel_loading
from tinylm.tokenizer.pretokenizer import (
    BYTE_LEVEL_STEP,
    SPLIT_NAMES,
    as_canonical_steps,
    canonical_steps,
    flat_steps,
    split_steps,
)

_CLASSES = "a0 nr.h?"
"""Byte classes: ASCII letter, digit, space, line feed, carriage return, punctuation, byte of a non-ASCII character, other."""


class SplitPoints:
    """Finds the split points of a text. See the module docstring."""

    def __init__(self, rules: Iterable[tuple[str, str]], *, before_line_starts: bool = False, anywhere: bool = False) -> None:
        """Define the split points.

        Each rule is a pair (classes of a byte, classes of the next byte), written with the letters in `_CLASSES`. There is a split
        point between two bytes if a rule matches both. With `before_line_starts`, the beginning of every non-blank line is also a
        split point. With `anywhere`, a text can be cut between any two characters, but `find` does not return these positions.
        """
        self.anywhere = anywhere
        self.rules = tuple(rules)
        self.before_line_starts = before_line_starts
        # Two bit masks for each byte: its own class, and the classes after which it always begins a word.
        self._class_bits = bytes(1 << _CLASSES.index(name) for name in _CLASS_OF)
        allowed = {
            name: sum({1 << _CLASSES.index(left) for before, after in self.rules if name in after for left in before})
            for name in _CLASSES
        }
        self._allowed_bits = bytes(allowed[name] for name in _CLASS_OF)

    def find(self, text: bytes) -> np.ndarray:
        """Return the split points of a UTF-8 text as ascending byte positions, excluding the beginning and the end of the text."""
        if len(text) < 2:
            return np.zeros(0, dtype=np.int64)
        if (kernels := kernel_loading.kernels_if_worthwhile(0)) is not None:
            positions = np.empty(len(text) - 1, dtype=np.int64)
            codes, own, allowed = (np.frombuffer(data, dtype=np.uint8) for data in (text, self._class_bits, self._allowed_bits))
            return positions[
                : kernels.find_split_points(codes, own, allowed, _WIDE_SPACE, _VISIBLE, self.before_line_starts, positions)
            ]
        own = np.frombuffer(text.translate(self._class_bits), dtype=np.uint8)[:-1]
        allowed = np.frombuffer(text.translate(self._allowed_bits), dtype=np.uint8)[1:]
        is_split = (own & allowed) != 0
        codes = np.frombuffer(text, dtype=np.uint8)
        non_ascii = np.flatnonzero(is_split & (codes[:-1] >= 0x80))
        if len(non_ascii):  # drop positions after non-ASCII whitespace: a run of whitespace is never split
            is_split[non_ascii] = ~_WIDE_SPACE[codes[non_ascii - 1].astype(np.int64) << 8 | codes[non_ascii]]
        if self.before_line_starts:
            newlines = np.flatnonzero(codes[:-1] == ord("\n"))
            not_space = np.flatnonzero(codes != ord(" "))
            following = (
                not_space[np.minimum(np.searchsorted(not_space, newlines + 1), len(not_space) - 1)] if len(newlines) else newlines
            )
            is_split[newlines] = _VISIBLE[codes[following]]
        return np.flatnonzero(is_split) + 1

    def ascii_only(self) -> SplitPoints:
        """Return a copy that finds only the split points between two ASCII characters."""
        rules = [(before.replace("h", ""), after.replace("h", "")) for before, after in self.rules]
        return SplitPoints(rules, before_line_starts=self.before_line_starts)


def _class_of(byte: int) -> str:
    character = chr(byte)
    if byte >= 0x80:
        return "h"
    if character.isalpha():
        return "a"
    if character.isdigit():
        return "0"
    named = {"\n": "n", "\r": "r", " ": " "}
    return named.get(character) or ("." if 32 < byte < 127 else "?")


def _wide_space() -> np.ndarray:
    """Return a table, indexed by `first << 8 | second`, of the pairs of bytes that can end a non-ASCII whitespace character.

    The table includes U+180E, which was whitespace in older versions of Unicode.
    """
    table = np.zeros(1 << 16, dtype=bool)
    for character in "\x85\xa0\u1680\u180e\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B))):
        first, second = character.encode()[-2:]
        table[first << 8 | second] = True
    return table


_CLASS_OF = [_class_of(byte) for byte in range(256)]
_WIDE_SPACE = _wide_space()
_VISIBLE = np.array([name in "a0." for name in _CLASS_OF])
_BEFORE_SPACE = ("a0.h", " ")
_RUN_ENDS = (("a", "0nr."), ("0", "anr."), (".", "0"))
SPLIT_POINTS = {
    "gpt2": SplitPoints([_BEFORE_SPACE, *_RUN_ENDS]),
    "gpt4": SplitPoints([_BEFORE_SPACE, *_RUN_ENDS], before_line_starts=True),
    "whitespace": SplitPoints([_BEFORE_SPACE]),
    "none": SplitPoints([("n", _CLASSES)]),
    "bert": SplitPoints([_BEFORE_SPACE, ("a0.h", "."), (".", "a0h")]),
}
"""The split points of each named split. llama3 uses the split points of gpt4."""


def split_points_of(tokenizer_json: Mapping[str, Any]) -> SplitPoints | None:
    """Return the split points of a parsed tokenizer.json. If the result is None, documents must be encoded as a whole."""
    model = tokenizer_json["model"]
    without_merges = model["type"] == "BPE" and not model["merges"]  # every byte or character is its own token
    only_special = all(token["special"] for token in tokenizer_json.get("added_tokens", ()))
    if without_merges and only_special and tokenizer_json.get("normalizer") is None:
        return SplitPoints([_BEFORE_SPACE], anywhere=True)
    split_points = SPLIT_POINTS["whitespace"] if without_merges else _of_pretokenizer(tokenizer_json["pre_tokenizer"])
    if split_points is None:
        return None
    for token in tokenizer_json.get("added_tokens", ()):
        if token["lstrip"] or token["rstrip"] or any(c.isspace() for c in token["content"]) or token["normalized"]:
            return None
        if not token["special"] and len(split_points.find(token["content"].encode())):  # a cut inside the token prevents a match
            return None
    for step in flat_steps(tokenizer_json.get("normalizer"), "normalizers"):
        if step["type"] in ("NFKC", "NFKD", "StripAccents"):  # may remove or replace the character before a space
            split_points = split_points.ascii_only()
        elif step["type"] not in ("NFC", "NFD", "Lowercase"):
            return None
    return split_points


def _of_pretokenizer(node: Mapping[str, Any] | None) -> SplitPoints | None:
    steps = canonical_steps(node)
    return _SPLIT_POINTS_OF_STEPS.get("".join(steps[:-1] if steps and steps[-1] == BYTE_LEVEL_STEP else steps))


_SPLIT_POINTS_OF_STEPS = {
    "".join(as_canonical_steps(*split_steps(name, digits))): SPLIT_POINTS["gpt4" if name == "llama3" else name]
    for name in SPLIT_NAMES
    for digits in (None, *range(1, 10))
}
_SPLIT_POINTS_OF_STEPS |= {
    "".join(as_canonical_steps(step)): SPLIT_POINTS[name]
    for name, step in (
        ("gpt2", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)),
        ("bert", pre_tokenizers.BertPreTokenizer()),
        ("whitespace", pre_tokenizers.WhitespaceSplit()),
    )
}
