"""The types of recipe values. Each type accepts the usual notations of a value (such as `1e6` for an integer and `off` for false).

Any other value raises `ValueError("must be ..., not ...")`, which states the accepted values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import PlainValidator

ComputeDtype = Literal["fp32", "bf16", "fp16"]
"""The dtype that matrix products are computed in."""

_TRUE, _FALSE = ("true", "on", "yes"), ("false", "off", "no")


def _show(value: object) -> str:
    return "null" if value is None else repr(value) if isinstance(value, str) else str(value)


def _as_flag(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    return None


def _validated(accept: Callable[[Any], Any], expected: str) -> PlainValidator:
    """A validator that returns `accept(value)`, or raises `ValueError` if the result is `_INVALID`."""

    def validate(value: object) -> object:
        accepted = accept(value)
        if accepted is _INVALID:
            raise ValueError(f"must be {expected}, not {_show(value)}")
        return accepted

    return PlainValidator(validate)


_INVALID = object()


def _whole(minimum: int, maximum: float = math.inf) -> Callable[[object], object]:
    """Accept whole numbers in [minimum, maximum], including floats such as 1e6."""

    def accept(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return _INVALID
        if not math.isfinite(value) or value != int(value) or not minimum <= value <= maximum:
            return _INVALID
        return int(value)

    return accept


def _real(minimum: float, maximum: float = math.inf, *, above: bool = False) -> Callable[[object], object]:
    """Accept finite numbers in [minimum, maximum], or with `above` in (minimum, maximum]."""

    def accept(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return _INVALID
        too_low = value <= minimum if above else value < minimum
        return _INVALID if too_low or value > maximum else float(value)

    return accept


def _or_word(accept: Callable[[object], object], *words: str | None) -> Callable[[object], object]:
    """Accept `words` (None is null), and everything that `accept` accepts."""

    def accept_word(value: object) -> object:
        return value if value in words and not isinstance(value, (bool, int, float)) else accept(value)

    return accept_word


def _flag(value: object) -> object:
    flag = _as_flag(value)
    return _INVALID if flag is None else flag


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
        return _INVALID
    pair = tuple(_real(0.0, 1.0)(beta) for beta in value)
    return _INVALID if _INVALID in pair or 1.0 in pair else pair


def _orders(value: object) -> object:
    values = value if isinstance(value, (list, tuple)) else [value]
    orders = tuple(_whole(2, 16)(order) for order in values)
    return _INVALID if _INVALID in orders or len(set(orders)) < len(orders) else orders


def _attention_pattern(value: object) -> object:
    valid = isinstance(value, (list, tuple)) and value and all(kind in ("local", "global") for kind in value)
    return tuple(value) if valid and isinstance(value, (list, tuple)) else _INVALID


def _path(value: object) -> object:
    return value if value is None or (isinstance(value, str) and value) else _INVALID


LORA_TARGETS = ("attention.qkv", "attention.output", "feed_forward.input", "feed_forward.output")
"""The linear layers of a block, by module name."""


def _targets(value: object) -> object:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not values or any(target not in LORA_TARGETS for target in values):
        return _INVALID
    return tuple(target for target in LORA_TARGETS if target in values)


def _sources(value: object) -> object:
    if isinstance(value, str) and value.strip():
        return (value,)
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) and item.strip() for item in value):
        return tuple(value)
    return _INVALID


def _texts(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    return _INVALID


def _alphabet(value: object) -> object:
    if isinstance(value, str) and value and not any("\ud800" <= character <= "\udfff" for character in value):
        return value
    return _whole(1)(value)


NORMALIZATIONS = ("nfc", "nfd", "nfkc", "nfkd", "lowercase", "strip_accents")


def _normalizations(value: object) -> object:
    if value is None or value == "none":
        return ()
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return _INVALID if any(item not in NORMALIZATIONS for item in values) or len(set(values)) < len(values) else values


def _token_list(value: object) -> object:
    texts = _texts(value)
    return texts if isinstance(texts, tuple) and all(texts) and len(set(texts)) == len(texts) else _INVALID


Count = Annotated[int, _validated(_whole(1), "a whole number of at least 1")]
CountOrZero = Annotated[int, _validated(_whole(0), "a whole number of at least 0")]
Seed = Annotated[int, _validated(_whole(0, 2**63 - 1), "a whole number from 0 to 2^63 - 1")]
OptionalCount = Annotated[int | None, _validated(_or_word(_whole(1), None), "a whole number of at least 1, or null")]
CountOrAuto = Annotated[int | Literal["auto"], _validated(_or_word(_whole(1), "auto"), "a whole number of at least 1, or auto")]
Positive = Annotated[float, _validated(_real(0.0, above=True), "a number above 0")]
OptionalPositive = Annotated[float | None, _validated(_or_word(_real(0.0, above=True), None), "a number above 0, or null")]
NotNegative = Annotated[float, _validated(_real(0.0), "a number of at least 0")]
Share = Annotated[float, _validated(_real(0.0, 1.0), "a share between 0 and 1")]
OpenShare = Annotated[
    float, _validated(lambda v: _INVALID if v == 1 else _real(0.0, 1.0, above=True)(v), "a share above 0 and below 1")
]
ShareBelowOne = Annotated[
    float, _validated(lambda v: _INVALID if v == 1 else _real(0.0, 1.0)(v), "a share of at least 0 and below 1")
]
OptionalShareBelowOne = Annotated[
    float | None,
    _validated(_or_word(lambda v: _INVALID if v == 1 else _real(0.0, 1.0)(v), None), "a share of at least 0 and below 1, or null"),
]
Flag = Annotated[bool, _validated(_flag, "true or false")]
FlagOrAuto = Annotated[bool | Literal["auto"], _validated(_or_word(_flag, "auto"), "true, false or auto")]
ClipNorm = Annotated[float | None, _validated(_clip, "a number above 0, or off")]
Warmup = Annotated[int | float, _validated(_warmup, "a number of steps, or a share of the training below 1")]
Betas = Annotated[tuple[float, float], _validated(_betas, "two numbers of at least 0 and below 1, like [0.9, 0.95]")]
OptionalPath = Annotated[str | None, _validated(_path, "a path, or null")]
Orders = Annotated[tuple[int, ...], _validated(_orders, "a list of different whole numbers from 2 to 16, like [2, 3]")]
AttentionPattern = Annotated[
    tuple[str, ...], _validated(_attention_pattern, "a list of local and global, like [local, local, global]")
]
Sources = Annotated[tuple[str, ...], _validated(_sources, "a SOURCE (a file, folder, glob, URL, builtin:NAME) or a list of them")]
Targets = Annotated[tuple[str, ...], _validated(_targets, f"a list of {', '.join(LORA_TARGETS)}")]
Texts = Annotated[tuple[str, ...], _validated(_texts, "text or a list of texts")]
Alphabet = Annotated[int | str, _validated(_alphabet, "bytes, text, a number of characters, or the characters themselves")]
Characters = Annotated[int | str, _validated(_alphabet, "text, a number of characters, or the characters themselves")]
Normalizations = Annotated[
    tuple[str, ...], _validated(_normalizations, f"none or some of {', '.join(NORMALIZATIONS)}, in the order in which they apply")
]
TokenList = Annotated[tuple[str, ...], _validated(_token_list, "a token or a list of different tokens")]
Megabytes = Annotated[int, _validated(_whole(1, 1_000_000), "a whole number of megabytes of at least 1")]
