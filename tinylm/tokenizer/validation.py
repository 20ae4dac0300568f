"""Check a tokenizer.json from an untrusted source before memory is allocated for the sizes that it specifies."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from tinylm.errors import InputError, TinylmWarning
from tinylm.tokenizer.backend_errors import translate_backend_errors
from tinylm.tokenizer.byte_level import bytes_to_unicode
from tinylm.tokenizer.pretokenizer import flat_steps

_MAX_UNUSED_IDS = 1 << 16
"""Number of unused ids that any vocabulary may have. Larger vocabularies may have proportionally more, for example for padding."""
_MAX_GROWTH = 64
"""Maximum factor by which the replacements of a normalizer or decoder may lengthen a text."""
_SAMPLE = "A short text: 12 words, naïve 🙂\n\n  x\t<|endoftext|>"
"""Text that every tokenizer must be able to encode."""


def check_ids(vocabulary: Mapping[str, int]) -> None:
    """Raise `InputError` if two tokens have the same id, or if an id is much larger than the number of tokens."""
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
    """Return the factor by which a text grows if every match of `pattern` is replaced with `length` characters."""
    replaced = len(pattern.get("String", ""))
    return length / replaced if replaced else 1.0 + length  # a regular expression may match the empty string everywhere


def check_unknown(tokenizer_json: Mapping[str, Any], vocabulary: Mapping[str, int]) -> None:
    """Raise `InputError` if the model needs an unknown token for text outside its vocabulary but does not have one."""
    model = tokenizer_json["model"]
    if model["type"] in ("WordLevel", "WordPiece") and model["unk_token"] not in vocabulary:
        raise InputError(f"the unknown token {model['unk_token']!r} is not in the vocabulary")
    if model["type"] == "Unigram" and model["unk_id"] is None:
        raise InputError("the model has no unknown token")
    if model["type"] == "BPE" and not model.get("unk_token"):
        _check_bpe_alphabet(tokenizer_json, vocabulary)


def _check_bpe_alphabet(tokenizer_json: Mapping[str, Any], vocabulary: Mapping[str, int]) -> None:
    """Raise `InputError` if a BPE model without an unknown token drops unknown characters. Warn if it drops only some bytes."""
    steps = [
        *flat_steps(tokenizer_json.get("pre_tokenizer"), "pretokenizers"),
        *flat_steps(tokenizer_json.get("normalizer"), "normalizers"),
    ]
    if any(step["type"] == "ByteLevel" for step in steps):
        alphabet = list(bytes_to_unicode().values())
    elif tokenizer_json["model"].get("byte_fallback"):
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        hint = "add an unknown token, or tokens for all bytes with byte_fallback"
        raise InputError("the model has no unknown token, so it would drop characters outside its vocabulary", hint=hint)
    if missing := [token for token in alphabet if token not in vocabulary]:
        text = (
            f"the tokenizer drops {len(missing)} of the 256 bytes from a text: it has neither tokens for them nor an unknown token"
        )
        warnings.warn(text, TinylmWarning, stacklevel=2)


def check_encoding(encode: Any) -> None:
    """Raise `InputError` if the tokenizer cannot encode a short text."""
    with translate_backend_errors():
        encode(_SAMPLE, add_special_tokens=False)
