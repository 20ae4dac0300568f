"""Value types of the recipe language: each accepts what people write in YAML and refuses the rest with one clear sentence.

They exist because YAML has several spellings for one thing (`1e6` for a whole number, `off` for false) and because an
error must say what would have been right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import PlainValidator

_TRUE, _FALSE = ("true", "on", "yes"), ("false", "off", "no")


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value) if isinstance(value, str) else str(value)


def _as_flag(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    return None


def _checked(accept: Callable[[Any], Any], expected: str) -> PlainValidator:
    def validate(value: object) -> object:
        accepted = accept(value)
        if accepted is _REFUSED:
            raise ValueError(f"must be {expected}, not {_shown(value)}")
        return accepted

    return PlainValidator(validate)


_REFUSED = object()


def _whole(minimum: int, maximum: float = math.inf) -> Callable[[object], object]:
    def accept(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return _REFUSED
        if not math.isfinite(value) or value != int(value) or not minimum <= value <= maximum:
            return _REFUSED
        return int(value)

    return accept


def _real(minimum: float, maximum: float = math.inf, *, above: bool = False) -> Callable[[object], object]:
    """Finite numbers in [minimum, maximum], or in (minimum, maximum] with `above`."""

    def accept(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return _REFUSED
        too_low = value <= minimum if above else value < minimum
        return _REFUSED if too_low or value > maximum else float(value)

    return accept


def _or_word(accept: Callable[[object], object], *words: str | None) -> Callable[[object], object]:
    def accept_word(value: object) -> object:
        return value if value in words and not isinstance(value, (bool, int, float)) else accept(value)

    return accept_word


def _flag(value: object) -> object:
    flag = _as_flag(value)
    return _REFUSED if flag is None else flag


def _clip(value: object) -> object:
    if value is None or _as_flag(value) is False:
        return None
    return _real(0.0, above=True)(value)


def _warmup(value: object) -> object:
    if isinstance(value, float) and 0 <= value < 1:
        return value
    return _whole(0)(value)


def _betas(value: object) -> object:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return _REFUSED
    pair = tuple(_real(0.0, 1.0)(beta) for beta in value)
    return _REFUSED if _REFUSED in pair or 1.0 in pair else pair


def _orders(value: object) -> object:
    values = value if isinstance(value, (list, tuple)) else [value]
    orders = tuple(_whole(2, 16)(order) for order in values)
    return _REFUSED if _REFUSED in orders or len(set(orders)) < len(orders) else orders


def _path(value: object) -> object:
    return value if value is None or (isinstance(value, str) and value) else _REFUSED


LORA_TARGETS = ("attention.qkv", "attention.output", "feed_forward.input", "feed_forward.output")
"""The linear layers of a block, by their names in the model."""


def _targets(value: object) -> object:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not values or any(target not in LORA_TARGETS for target in values):
        return _REFUSED
    return tuple(target for target in LORA_TARGETS if target in values)


def _sources(value: object) -> object:
    if isinstance(value, str) and value.strip():
        return (value,)
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) and item.strip() for item in value):
        return tuple(value)
    return _REFUSED


def _texts(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    return _REFUSED


def _alphabet(value: object) -> object:
    if isinstance(value, str) and value and not any("\ud800" <= character <= "\udfff" for character in value):
        return value
    return _whole(1)(value)


NORMALIZATIONS = ("nfc", "nfd", "nfkc", "nfkd", "lowercase", "strip_accents")


def _normalizations(value: object) -> object:
    if value is None or value == "none":
        return ()
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return _REFUSED if any(item not in NORMALIZATIONS for item in values) or len(set(values)) < len(values) else values


def _token_list(value: object) -> object:
    texts = _texts(value)
    return texts if isinstance(texts, tuple) and all(texts) and len(set(texts)) == len(texts) else _REFUSED


Count = Annotated[int, _checked(_whole(1), "a whole number of at least 1")]
CountOrZero = Annotated[int, _checked(_whole(0), "a whole number of at least 0")]
Seed = Annotated[int, _checked(_whole(0, 2**63 - 1), "a whole number from 0 to 2^63 - 1")]
OptionalCount = Annotated[int | None, _checked(_or_word(_whole(1), None), "a whole number of at least 1, or null")]
CountOrAuto = Annotated[int | Literal["auto"], _checked(_or_word(_whole(1), "auto"), "a whole number of at least 1, or auto")]
OptionalText = Annotated[
    str | None, _checked(lambda v: v if v is None or (isinstance(v, str) and v) else _REFUSED, "a path, or null")
]
Positive = Annotated[float, _checked(_real(0.0, above=True), "a number above 0")]
OptionalPositive = Annotated[float | None, _checked(_or_word(_real(0.0, above=True), None), "a number above 0, or null")]
NotNegative = Annotated[float, _checked(_real(0.0), "a number of at least 0")]
Share = Annotated[float, _checked(_real(0.0, 1.0), "a share between 0 and 1")]
OpenShare = Annotated[
    float, _checked(lambda v: _REFUSED if v == 1 else _real(0.0, 1.0, above=True)(v), "a share above 0 and below 1")
]
ShareBelowOne = Annotated[
    float, _checked(lambda v: _REFUSED if v == 1 else _real(0.0, 1.0)(v), "a share of at least 0 and below 1")
]
OptionalShareBelowOne = Annotated[
    float | None,
    _checked(_or_word(lambda v: _REFUSED if v == 1 else _real(0.0, 1.0)(v), None), "a share of at least 0 and below 1, or null"),
]
Flag = Annotated[bool, _checked(_flag, "true or false")]
FlagOrAuto = Annotated[bool | Literal["auto"], _checked(_or_word(_flag, "auto"), "true, false or auto")]
ClipNorm = Annotated[float | None, _checked(_clip, "a number above 0, or off")]
Warmup = Annotated[int | float, _checked(_warmup, "a number of steps, or a share of the training below 1")]
Betas = Annotated[tuple[float, float], _checked(_betas, "two numbers of at least 0 and below 1, like [0.9, 0.95]")]
OptionalPath = Annotated[str | None, _checked(_path, "a path, or null")]
Orders = Annotated[tuple[int, ...], _checked(_orders, "a list of different whole numbers from 2 to 16, like [2, 3]")]
Sources = Annotated[tuple[str, ...], _checked(_sources, "a SOURCE (a file, folder, glob, URL, builtin:NAME) or a list of them")]
Targets = Annotated[tuple[str, ...], _checked(_targets, f"a list of {', '.join(LORA_TARGETS)}")]
Texts = Annotated[tuple[str, ...], _checked(_texts, "a text or a list of texts")]
Alphabet = Annotated[int | str, _checked(_alphabet, "bytes, text, a number of characters, or the characters themselves")]
Characters = Annotated[int | str, _checked(_alphabet, "text, a number of characters, or the characters themselves")]
Normalizations = Annotated[
    tuple[str, ...], _checked(_normalizations, f"none or some of {', '.join(NORMALIZATIONS)}, in the order in which they apply")
]
TokenList = Annotated[tuple[str, ...], _checked(_token_list, "a token or a list of different tokens")]
Megabytes = Annotated[int, _checked(_whole(1, 1_000_000), "a whole number of megabytes of at least 1")]
