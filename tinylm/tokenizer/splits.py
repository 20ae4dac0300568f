"""Split patterns: where a text is divided into the words that a model's merges or pieces never reach across.

A split is one of the names below or a regular expression of the user's. For the named ones this room also knows borders:
places in a text where a new word begins whatever stands before and after, so that a text may be cut there, its parts encoded
apart and in any order, and every part that repeats encoded once. The rules look at two neighbouring bytes of UTF-8.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
from tokenizers import Regex, pre_tokenizers

from tinylm.errors import InputError
from tinylm.tokenizer.compiled import kernels

PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "whitespace": r" ?\S+|\s+(?!\S)|\s+",
    "none": r"[^\n]*\n|[^\n]+",
}
PATTERNS["llama3"] = PATTERNS["gpt4"]
DIGITS = {"gpt4": 2, "llama3": 3}
"""Longest run of digits in one word, where the pattern itself says so."""
NAMES = ("gpt4", "gpt2", "llama3", "whitespace", "none")
WITHOUT_SPACES = ("bert", "whitespace")
"""Splits of the kinds whose tokens hold no white space (wordpiece, word)."""

_CLASSES = "a0 nr.h?"
"""Classes of bytes: letter, digit, space, line feed, carriage return, punctuation, beyond ASCII, any other."""


@cache
def byte_level_table() -> dict[str, int]:
    """GPT-2's reversible map between bytes and printable characters (Radford et al. 2019, released code), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


def pattern_of(split: str, digits: int | None) -> str:
    """The regular expression that a named split stands for; any other `split` is one itself."""
    return PATTERNS.get(split, split).replace("DIGITS", str(digits or DIGITS.get(split, 1)))


def pre_tokenizer(split: str, digits: int | None) -> list[pre_tokenizers.PreTokenizer]:
    """The steps that divide a text and keep every character. Raises `InputError` for what is no regular expression."""
    steps = []
    if digits is not None and split not in DIGITS:
        steps.append(pre_tokenizers.Split(Regex(rf"\p{{N}}{{1,{digits}}}"), "isolated"))
    return [*steps, pre_tokenizers.Split(_regex(pattern_of(split, digits)), "isolated")]


def pre_tokenizer_without_spaces(split: str) -> pre_tokenizers.PreTokenizer:
    """For kinds that drop white space: bert (punctuation apart), whitespace, or a regular expression within words."""
    if split == "bert":
        return pre_tokenizers.BertPreTokenizer()
    if split == "whitespace":
        return pre_tokenizers.WhitespaceSplit()
    return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(_regex(split), "isolated")])


def _regex(pattern: str) -> Regex:
    try:
        return Regex(pattern)
    except Exception as error:  # tokenizers raises plain Exception for a pattern it cannot compile
        raise InputError(f"{pattern!r} is not a regular expression: {error}", where="tokenizer.split") from None


class SplitPoints:
    """Where words begin for certain: between two bytes by their classes, and with `lines` before every line that is not blank."""

    def __init__(self, rules: Iterable[tuple[str, str]], *, lines: bool = False) -> None:
        """`rules`: (classes of a byte, classes of the next) between which there is a border, each class by its letter."""
        self.rules = tuple(rules)
        self.lines = lines
        self._before = bytes(1 << _CLASSES.index(name) for name in _CLASS_OF)
        allowed = {
            name: sum({1 << _CLASSES.index(left) for lefts, rights in self.rules if name in rights for left in lefts})
            for name in _CLASSES
        }
        self._after = bytes(allowed[name] for name in _CLASS_OF)

    def find(self, text: bytes) -> np.ndarray:
        """Positions in UTF-8 text of N bytes, ascending, neither 0 nor N."""
        if len(text) < 2:
            return np.zeros(0, dtype=np.int64)
        if (loops := kernels(0)) is not None:
            found = np.empty(len(text) - 1, dtype=np.int64)
            codes, before, after = (np.frombuffer(each, dtype=np.uint8) for each in (text, self._before, self._after))
            return found[: loops.find_borders(codes, before, after, _WIDE_SPACE, _GRAPHIC, self.lines, found)]
        before = np.frombuffer(text.translate(self._before), dtype=np.uint8)[:-1]
        after = np.frombuffer(text.translate(self._after), dtype=np.uint8)[1:]
        at = (before & after) != 0
        codes = np.frombuffer(text, dtype=np.uint8)
        high = np.flatnonzero(at & (codes[:-1] >= 0x80))
        if len(high):  # the character before the space must not be white space itself
            at[high] = ~_WIDE_SPACE[codes[high - 1].astype(np.int64) << 8 | codes[high]]
        if self.lines:
            newlines = np.flatnonzero(codes[:-1] == ord("\n"))
            solid = np.flatnonzero(codes != ord(" "))
            following = solid[np.minimum(np.searchsorted(solid, newlines + 1), len(solid) - 1)] if len(newlines) else newlines
            at[newlines] = _GRAPHIC[codes[following]]
        return np.flatnonzero(at) + 1

    def without_high(self) -> SplitPoints:
        """Only those between two ASCII characters."""
        return SplitPoints([(lefts.replace("h", ""), rights.replace("h", "")) for lefts, rights in self.rules], lines=self.lines)


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
    """Whether two bytes may end a white-space character beyond ASCII, or the Mongolian separator, which was one once."""
    table = np.zeros(1 << 16, dtype=bool)
    for character in "\x85\xa0\u1680\u180e\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B))):
        first, second = character.encode()[-2:]
        table[first << 8 | second] = True
    return table


_CLASS_OF = [_class_of(byte) for byte in range(256)]
_WIDE_SPACE = _wide_space()
_GRAPHIC = np.array([name in "a0." for name in _CLASS_OF])
_BEFORE_SPACE = ("a0.h", " ")
_RUNS_END = (("a", "0nr."), ("0", "anr."), (".", "0"))
KNOWN = {
    "gpt2": SplitPoints([_BEFORE_SPACE, *_RUNS_END]),
    "gpt4": SplitPoints([_BEFORE_SPACE, *_RUNS_END], lines=True),
    "whitespace": SplitPoints([_BEFORE_SPACE]),
    "none": SplitPoints([("n", _CLASSES)]),
    "bert": SplitPoints([_BEFORE_SPACE, ("a0.h", "."), (".", "a0h")]),
}


def borders_of(tokenizer: Mapping[str, Any]) -> SplitPoints | None:
    """The borders that a tokenizer.json (as parsed JSON) is known to have; None when nothing is known for certain."""
    model = tokenizer["model"]
    single = model["type"] == "BPE" and not model["merges"]  # every byte or character by itself
    found = KNOWN["whitespace"] if single else _of_pre_tokenizer(tokenizer["pre_tokenizer"])
    if found is None:
        return None
    for token in tokenizer.get("added_tokens", ()):
        if token["lstrip"] or token["rstrip"] or any(c.isspace() for c in token["content"]) or token["normalized"]:
            return None
        if not token["special"] and _crosses(token["content"], found):
            return None
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        if step["type"] in ("NFKC", "NFKD", "StripAccents"):  # what stood before a space may have gone
            found = found.without_high()
        elif step["type"] not in ("NFC", "NFD", "Lowercase"):
            return None
    return found


def pattern_in(tokenizer: Mapping[str, Any]) -> str | None:
    """The one regular expression by which a tokenizer.json divides text before it looks at bytes, if that is what it does."""
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if len(steps) == 1 and steps[0]["type"] == "ByteLevel" and steps[0]["use_regex"]:
        return None if steps[0]["add_prefix_space"] else PATTERNS["gpt2"]
    if len(steps) != 2 or steps[0]["type"] != "Split" or json.dumps(steps[1], sort_keys=True) != _BYTE_LEVEL:
        return None
    pattern = steps[0]["pattern"].get("Regex")
    return pattern if steps[0]["behavior"] == "Isolated" and not steps[0]["invert"] else None


def _crosses(content: str, borders: SplitPoints) -> bool:
    """Whether a border can fall inside an added token, so that cutting there would hide it."""
    return len(borders.find(content.encode())) > 0


def _steps(node: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """A normaliser or pre-tokenizer as the list of its steps."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    return [step for inner in node.get(key, node.get("pretokenizers", ())) for step in _steps(inner, key)]


def _of_pre_tokenizer(node: Mapping[str, Any] | None) -> SplitPoints | None:
    steps = [json.dumps(step, sort_keys=True) for step in _steps(node, "pretokenizers")]
    return _KNOWN_STEPS.get("".join(steps[:-1] if steps and steps[-1] == _BYTE_LEVEL else steps))


def _as_json(*steps: pre_tokenizers.PreTokenizer) -> str:
    """The canonical form of pre-tokenizer steps as a file holds them."""
    import tokenizers
    from tokenizers import models

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return "".join(
        json.dumps(step, sort_keys=True) for step in _steps(json.loads(backend.to_str())["pre_tokenizer"], "pretokenizers")
    )


_BYTE_LEVEL = _as_json(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
_KNOWN_STEPS = {
    _as_json(*pre_tokenizer(name, digits)): KNOWN["gpt4" if name == "llama3" else name]
    for name in NAMES
    for digits in (None, *range(1, 10))
}
_KNOWN_STEPS |= {
    _as_json(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)): KNOWN["gpt2"],
    _as_json(pre_tokenizers.BertPreTokenizer()): KNOWN["bert"],
    _as_json(pre_tokenizers.WhitespaceSplit()): KNOWN["whitespace"],
}
