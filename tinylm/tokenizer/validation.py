"""Checks a tokenizer.json before memory is allocated for what it claims, because it may come from someone else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinylm.errors import InputError
from tinylm.tokenizer.backend_errors import translate_backend_errors
from tinylm.tokenizer.pretokenizer import flat_steps

_MAX_UNUSED_IDS = 1 << 16
"""Unused ids that any vocabulary may have. Larger ones may have more in proportion, for example for padding."""
_MAX_GROWTH = 64
"""How much longer the replacements of a normalizer or decoder may make a text."""
_SAMPLE = "A short text: 12 words, naïve 🙂\n\n  x\t<|endoftext|>"
"""Text that every tokenizer must be able to encode."""


def check_ids(vocabulary: Mapping[str, int]) -> None:
    """Raise `InputError` if two tokens have the same id, or if ids are far larger than the number of tokens."""
    highest = max(vocabulary.values(), default=-1)
    if highest >= _MAX_UNUSED_IDS + 2 * len(vocabulary):
        raise InputError(f"the id {highest:,} does not fit a vocabulary of {len(vocabulary):,} tokens")
    if len(set(vocabulary.values())) < len(vocabulary):
        seen: dict[int, str] = {}
        for token, id in vocabulary.items():
            if id in seen:
                raise InputError(f"the tokens {seen[id]!r} and {token!r} have the same id {id}")
            seen[id] = token


def check_growth(tokenizer_json: Mapping[str, Any]) -> None:
    """Raise `InputError` if the normalizer or the decoder can make a text many times longer."""
    for key, inner in (("normalizer", "normalizers"), ("decoder", "decoders")):
        growth = 1.0
        for step in flat_steps(tokenizer_json.get(key), inner):
            if step["type"] == "Replace":
                growth *= max(1.0, _growth_of(step["pattern"], len(step["content"])))
        if growth > _MAX_GROWTH:
            raise InputError(f"the {key} can make a text more than {_MAX_GROWTH} times longer")


def _growth_of(pattern: Mapping[str, str], length: int) -> float:
    """How much longer a text gets if every match of `pattern` is replaced by `length` characters."""
    replaced = len(pattern.get("String", ""))
    return length / replaced if replaced else 1.0 + length  # a regular expression may match the empty string everywhere


def check_unknown(tokenizer_json: Mapping[str, Any], vocabulary: Mapping[str, int]) -> None:
    """Raise `InputError` if the model needs an unknown token for text outside its vocabulary and has none."""
    model = tokenizer_json["model"]
    if model["type"] in ("WordLevel", "WordPiece") and model["unk_token"] not in vocabulary:
        raise InputError(f"the unknown token {model['unk_token']!r} is not in the vocabulary")
    if model["type"] == "Unigram" and model["unk_id"] is None:
        raise InputError("the model has no unknown token")


def check_encoding(encode: Any) -> None:
    """Raise `InputError` if the tokenizer cannot encode a short text."""
    with translate_backend_errors():
        encode(_SAMPLE, add_special_tokens=False)
