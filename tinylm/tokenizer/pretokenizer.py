"""Pretokenizers divide a text into words before the tokenizer's model is applied. No token spans two words.

The recipe key `tokenizer.split` is one of the names below or a regular expression.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from tinylm.errors import InputError

PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "whitespace": r" ?\S+|\s+(?!\S)|\s+",
    "none": r"[^\n]*\n|[^\n]+",
}
"""The regular expression of each named split. `DIGITS` is replaced with the maximum number of digits in a word."""
PATTERNS["llama3"] = PATTERNS["gpt4"]
MAX_DIGITS = {"gpt4": 2, "llama3": 3}
"""Default maximum number of digits in a word, for the named splits that have such a limit."""
SPLIT_NAMES = ("gpt4", "gpt2", "llama3", "whitespace", "none")


def split_pattern(split: str, digits: int | None) -> str:
    """Return the regular expression of a named split. Any other `split` is used as a regular expression.

    `digits` is the maximum number of digits in a word. None means the split's default.
    """
    return PATTERNS.get(split, split).replace("DIGITS", str(digits or MAX_DIGITS.get(split, 1)))


def split_steps(split: str, digits: int | None) -> list[pre_tokenizers.PreTokenizer]:
    """Create pretokenizer steps that divide a text and keep every character, for the kinds `bpe` and `unigram`.

    Raises `InputError` if `split` is not a valid regular expression.
    """
    steps = []
    if digits is not None and split not in MAX_DIGITS:
        steps.append(pre_tokenizers.Split(Regex(rf"\p{{N}}{{1,{digits}}}"), "isolated"))
    return [*steps, pre_tokenizers.Split(_regex(split_pattern(split, digits)), "isolated")]


def space_dropping_pretokenizer(split: str) -> pre_tokenizers.PreTokenizer:
    """Create a pretokenizer that drops whitespace, for the kinds `wordpiece` and `word`.

    `split` is `bert` (also splits off punctuation), `whitespace`, or a regular expression that divides the words further.
    Raises `InputError` if `split` is not a valid regular expression.
    """
    if split == "bert":
        return pre_tokenizers.BertPreTokenizer()
    if split == "whitespace":
        return pre_tokenizers.WhitespaceSplit()
    return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(_regex(split), "isolated")])


def _regex(pattern: str) -> Regex:
    try:
        return Regex(pattern)
    except Exception as error:  # tokenizers raises plain Exception for a pattern that it cannot compile
        raise InputError(f"{pattern!r} is not a valid regular expression: {error}", where="tokenizer.split") from None


def flat_steps(node: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """Return the normalizer or pretokenizer of a tokenizer.json as a flat list of steps.

    `key` is the field that lists the steps of a sequence: "normalizers" or "pretokenizers".
    """
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    return [step for inner in node[key] for step in flat_steps(inner, key)]


def canonical_steps(node: Mapping[str, Any] | None) -> list[str]:
    """Return the steps of a tokenizer.json's pretokenizer as canonical JSON, so that pretokenizers can be compared."""
    return [json.dumps(step, sort_keys=True) for step in flat_steps(node, "pretokenizers")]


def as_canonical_steps(*steps: pre_tokenizers.PreTokenizer) -> list[str]:
    """Return the `canonical_steps` of a tokenizer.json with these steps."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return canonical_steps(json.loads(backend.to_str())["pre_tokenizer"])


(BYTE_LEVEL_STEP,) = as_canonical_steps(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
"""The step that only maps bytes to characters and does not split."""


def byte_level_pattern(tokenizer_json: Mapping[str, Any]) -> str | None:
    """Return the split pattern if a tokenizer.json splits with one pattern and then maps bytes to characters.

    Returns None for any other pretokenizer.
    """
    steps = flat_steps(tokenizer_json.get("pre_tokenizer"), "pretokenizers")
    if len(steps) == 1 and steps[0]["type"] == "ByteLevel" and steps[0]["use_regex"]:
        return None if steps[0]["add_prefix_space"] else PATTERNS["gpt2"]
    if len(steps) != 2 or steps[0]["type"] != "Split" or json.dumps(steps[1], sort_keys=True) != BYTE_LEVEL_STEP:
        return None
    pattern = steps[0]["pattern"].get("Regex")
    return pattern if steps[0]["behavior"] == "Isolated" and not steps[0]["invert"] else None


def maps_bytes(tokenizer_json: Mapping[str, Any]) -> bool:
    """Whether the last step of the pretokenizer only maps bytes to characters."""
    steps = flat_steps(tokenizer_json.get("pre_tokenizer"), "pretokenizers")
    return bool(steps) and json.dumps(steps[-1], sort_keys=True) == BYTE_LEVEL_STEP


def ascii_pattern(tokenizer_json: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Return a pattern whose matches in an ASCII text are the words of the text, before bytes are mapped to characters.

    Python's `re` does not support `\\p{L}` and `\\p{N}`, but in an ASCII text, they only match letters and digits. Returns None
    unless the pretokenizer is one of the named splits, optionally followed by the step that maps bytes to characters.
    """
    steps = flat_steps(tokenizer_json.get("pre_tokenizer"), "pretokenizers")
    if maps_bytes(tokenizer_json):
        steps = steps[:-1]
    if len(steps) != 1 or steps[0]["type"] != "Split" or steps[0]["behavior"] != "Isolated" or steps[0]["invert"]:
        return None
    pattern = steps[0]["pattern"].get("Regex", "")
    named = {split_pattern(split, digits) for split in SPLIT_NAMES for digits in range(1, 10)}
    return re.compile(_replace_unicode_classes(pattern), re.ASCII) if pattern in named else None


def _replace_unicode_classes(pattern: str) -> str:
    in_class = False
    parts = []
    for part in re.findall(r"\\p\{[LN]\}|\\.|.", pattern):
        if part in _ASCII_CLASSES:
            part = _ASCII_CLASSES[part] if in_class else f"[{_ASCII_CLASSES[part]}]"
        elif part in "[]":
            in_class = part == "["
        parts.append(part)
    return "".join(parts)


_ASCII_CLASSES = {r"\p{L}": "A-Za-z", r"\p{N}": "0-9"}
