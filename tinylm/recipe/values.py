"""The types of recipe values. Each type accepts the usual notations, such as `1e6` for an integer and `off` for false.

Any other value raises `ValueError("must be ..., not ...")`, which states the accepted values.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import PlainValidator

from tinylm.paths import is_url
from tinylm.recipe.template import template_problem

_SURROGATE = re.compile("[\ud800-\udfff]")
ComputeDtype = Literal["fp32", "bf16", "fp16"]
"""The dtype in which matmuls are computed."""

_TRUE, _FALSE = ("true", "on", "yes"), ("false", "off", "no")
_MAX_SHOWN = 60
"""Maximum number of characters of an invalid value in an error message."""


def printable(text: str) -> str:
    """Escape unprintable characters, such as line breaks."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def show(value: object) -> str:
    """Format a value for an error message: on one line, printable and short."""
    if isinstance(value, int) and abs(value) >= 10**_MAX_SHOWN:  # Python raises an error for integers with thousands of digits
        return "a huge number"
    text = "null" if value is None else repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _as_flag(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    return None


def _validated(accept: Callable[[Any], Any], expected: str) -> PlainValidator:
    """Return a validator that returns `accept(value)`, or raises `ValueError` if that is `_INVALID`."""

    def validate(value: object) -> object:
        accepted = accept(value)
        if accepted is _INVALID:
            raise ValueError(f"must be {expected}, not {show(value)}")
        return accepted

    return PlainValidator(validate)


_INVALID = object()


MAX_COUNT = 1_000_000_000
"""The default limit for counts, such as steps."""
MAX_NUMBER = 1e12
"""The default limit for real numbers."""
MAX_CONTEXT_LENGTH = 1 << 24


def _whole(minimum: int, maximum: float = math.inf, *, limit: int = MAX_COUNT) -> Callable[[object], object]:
    """Accept whole numbers in [minimum, maximum], including floats such as 1e6.

    A number above `limit` is almost certainly a mistake. Its error message states the limit; other messages omit it.
    """

    def accept(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (isinstance(value, float) and not value.is_integer()):
            return _INVALID
        if not minimum <= value <= maximum:
            return _INVALID
        _check_limit(value, limit)
        return int(value)

    return accept


def _real(
    minimum: float, maximum: float = math.inf, *, above: bool = False, limit: float = MAX_NUMBER
) -> Callable[[object], object]:
    """Accept finite numbers in [minimum, maximum], or, with `above`, in (minimum, maximum]. See `_whole` for `limit`."""

    def accept(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return _INVALID
        if isinstance(value, float) and not math.isfinite(value):
            return _INVALID
        if value < minimum or (above and value == minimum) or value > maximum:
            return _INVALID
        _check_limit(value, limit)
        return float(value)

    return accept


def _check_limit(value: float, limit: float) -> None:
    if value > limit:
        raise ValueError(f"must be at most {f'{limit:,}' if limit < MAX_NUMBER else f'{limit:g}'}, not {show(value)}")


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


def _interval(value: object) -> object:
    if isinstance(value, float) and 0 < value < 1:
        return value
    return _whole(1)(value)


def _betas(value: object) -> object:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return _INVALID
    pair = tuple(_real(0.0, 1.0)(beta) for beta in value)
    return _INVALID if _INVALID in pair or 1.0 in pair else pair


def _mixture_weight(value: object) -> object:
    if not isinstance(value, (list, tuple)):
        return _real(0.0, above=True, limit=1e6)(value)
    pair = tuple(_real(0.0, limit=1e6)(weight) for weight in value)
    return _INVALID if _INVALID in pair or len(pair) != 2 or not any(pair) else pair


def _mask_rates(value: object) -> object:
    values = value if isinstance(value, (list, tuple)) else [value]
    rates = tuple(_real(0.0, 1.0, above=True)(rate) for rate in values)
    return _INVALID if _INVALID in rates or len(rates) not in (1, 2) or 1.0 in rates else rates


def _label_list(value: object) -> object:
    """Accept a list of different labels. Convert labels that YAML parses as numbers or booleans to JSON notation."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, (str, bool, int, float)) for item in value):
        return _INVALID
    labels = tuple(item if isinstance(item, str) else json.dumps(item) for item in value)
    return labels if len(set(labels)) == len(labels) and not any(has_surrogates(label) for label in labels) else _INVALID


def _counts(value: object) -> object:
    if not isinstance(value, (list, tuple)):
        return _INVALID
    counts = tuple(_whole(0, limit=10**15)(count) for count in value)
    return _INVALID if _INVALID in counts else counts


def _class_weights(value: object) -> object:
    if value in ("none", "balanced"):
        return value
    if value is None:
        return "none"
    if not isinstance(value, Mapping) or not value:
        return _INVALID
    weights = {str(label): _real(0.0)(weight) for label, weight in value.items()}
    return _INVALID if any(weight is _INVALID for weight in weights.values()) else weights


def _thresholds(value: object) -> object:
    values = value if isinstance(value, (list, tuple)) else [value]
    thresholds = tuple(_whole(0)(threshold) for threshold in values)
    return _INVALID if _INVALID in thresholds or not thresholds else thresholds


def _orders(value: object) -> object:
    values = value if isinstance(value, (list, tuple)) else [value]
    orders = tuple(_whole(2, 16)(order) for order in values)
    return _INVALID if _INVALID in orders or len(set(orders)) < len(orders) else orders


def _attention_pattern(value: object) -> object:
    valid = isinstance(value, (list, tuple)) and value and all(kind in ("local", "global") for kind in value)
    return tuple(value) if valid and isinstance(value, (list, tuple)) else _INVALID


def _rope_pattern(value: object) -> object:
    valid = isinstance(value, (list, tuple)) and value and all(kind in ("rope", "none") for kind in value)
    return tuple(value) if valid and isinstance(value, (list, tuple)) else _INVALID


def _path(value: object) -> object:
    return value if isinstance(value, str) and value else _INVALID


_MAX_NAME_BYTES = 200


def _url(value: object) -> object:
    return value if isinstance(value, str) and is_url(value) else _INVALID


def _run_name(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {show(value)}")
    if not value.isprintable() or value != value.strip() or not value or value.startswith("."):
        return _INVALID
    return _INVALID if "/" in value or "\\" in value or len(value.encode()) > _MAX_NAME_BYTES else value


def run_name(folder: str, default: str) -> str:
    """Convert a folder name to a valid recipe `name`: replace invalid characters with hyphens."""
    name = re.sub(r"[^\w.-]+", "-", folder.encode(errors="replace").decode()).strip("-").lstrip(".")[: _MAX_NAME_BYTES // 4]
    return name or default


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


def _run_paths(value: object) -> object:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)):
        return _INVALID
    paths = tuple(_path(item) for item in values)
    return _INVALID if _INVALID in paths or len(set(paths)) < len(paths) else paths


def _texts(value: object) -> object:
    values = (value,) if isinstance(value, str) else value
    if isinstance(values, (list, tuple)) and all(isinstance(item, str) and not has_surrogates(item) for item in values):
        return tuple(values)
    return _INVALID


def has_surrogates(text: str) -> bool:
    """Whether the text contains an unpaired surrogate, which UTF-8 cannot encode."""
    return _SURROGATE.search(text) is not None


def _alphabet(value: object) -> object:
    if isinstance(value, str) and value and not has_surrogates(value):
        return value
    return _whole(1, limit=sys.maxunicode + 1)(value)


TRACKERS = ("tensorboard", "wandb", "trackio")


def _trackers(value: object) -> object:
    values = tuple(value) if isinstance(value, (list, tuple)) else () if value is None else (value,)
    return _INVALID if any(item not in TRACKERS for item in values) or len(set(values)) < len(values) else values


NORMALIZATIONS = ("nfc", "nfd", "nfkc", "nfkd", "lowercase", "strip_accents")


def _normalizations(value: object) -> object:
    if value is None or value == "none":
        return ()
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return _INVALID if any(item not in NORMALIZATIONS for item in values) or len(set(values)) < len(values) else values


def _token_list(value: object) -> object:
    texts = _texts(value)
    return texts if isinstance(texts, tuple) and all(texts) and len(set(texts)) == len(texts) else _INVALID


def _template(value: object) -> object:
    if isinstance(value, str) and (problem := template_problem(value)):
        raise ValueError(problem)
    return value if value is None or isinstance(value, str) else _INVALID


Count = Annotated[int, _validated(_whole(1), "a whole number of at least 1")]
CountOrZero = Annotated[int, _validated(_whole(0), "a whole number of at least 0")]
Seed = Annotated[int, _validated(_whole(0, 2**63 - 1), "a whole number from 0 to 2^63 - 1")]
OptionalCount = Annotated[int | None, _validated(_or_word(_whole(1), None), "a whole number of at least 1, or null")]
CountOrAuto = Annotated[int | Literal["auto"], _validated(_or_word(_whole(1), "auto"), "a whole number of at least 1, or auto")]
TokenCount = Annotated[int | None, _validated(_or_word(_whole(1, limit=10**15), None), "a whole number of at least 1, or null")]
Blocks = Annotated[int, _validated(_whole(1, limit=10_000), "a whole number of at least 1")]
Width = Annotated[int, _validated(_whole(1, limit=1 << 20), "a whole number of at least 1")]
OptionalWidth = Annotated[int | None, _validated(_or_word(_whole(1, limit=1 << 20), None), "a whole number of at least 1, or null")]
ContextLength = Annotated[int, _validated(_whole(1, limit=MAX_CONTEXT_LENGTH), "a whole number of at least 1")]
VocabSize = Annotated[int, _validated(_whole(1, limit=1 << 24), "a whole number of at least 1")]
BatchSize = Annotated[int, _validated(_whole(1, limit=1 << 24), "a whole number of at least 1")]
BatchSizeOrAuto = Annotated[
    int | Literal["auto"], _validated(_or_word(_whole(1, limit=1 << 24), "auto"), "a whole number of at least 1, or auto")
]
SmallCount = Annotated[int, _validated(_whole(1, limit=1000), "a whole number of at least 1")]
OptionalSmallCount = Annotated[
    int | None, _validated(_or_word(_whole(1, limit=1000), None), "a whole number of at least 1, or null")
]
LearningRate = Annotated[float, _validated(_real(0.0, above=True, limit=1e38), "a number above 0")]  # the range of float32
Epsilon = Annotated[float, _validated(_real(0.0, above=True, limit=1.0), "a number above 0")]
Exponent = Annotated[float, _validated(_real(0.0, limit=10.0), "a number of at least 0")]
Factor = Annotated[float, _validated(_real(0.0, above=True, limit=1000.0), "a number above 0")]
Temperature = Annotated[float, _validated(_real(0.0, limit=1000.0), "a number of at least 0")]
Positive = Annotated[float, _validated(_real(0.0, above=True), "a number above 0")]
OptionalPositive = Annotated[float | None, _validated(_or_word(_real(0.0, above=True), None), "a number above 0, or null")]
NotNegative = Annotated[float, _validated(_real(0.0), "a number of at least 0")]
Share = Annotated[float, _validated(_real(0.0, 1.0), "a share between 0 and 1")]
OpenShare = Annotated[
    float, _validated(lambda v: _INVALID if v == 1 else _real(0.0, 1.0, above=True)(v), "a share above 0 and below 1")
]
ShareAboveZero = Annotated[float, _validated(_real(0.0, 1.0, above=True), "a share above 0 and at most 1")]
ShareBelowOne = Annotated[
    float, _validated(lambda v: _INVALID if v == 1 else _real(0.0, 1.0)(v), "a share of at least 0 and below 1")
]
OptionalShareBelowOne = Annotated[
    float | None,
    _validated(_or_word(lambda v: _INVALID if v == 1 else _real(0.0, 1.0)(v), None), "a share of at least 0 and below 1, or null"),
]
Flag = Annotated[bool, _validated(_flag, "true or false")]
CompileMode = Annotated[
    bool | Literal["auto", "model", "graph"],
    _validated(_or_word(_flag, "auto", "model", "graph"), "true, false, model, graph or auto"),
]
ClipNorm = Annotated[float | None, _validated(_clip, "a number above 0, or off")]
Warmup = Annotated[int | float, _validated(_warmup, "a number of steps, or a share below 1 of the training run")]
Interval = Annotated[int | float, _validated(_interval, "a whole number of at least 1, or a share below 1 of the training run")]
OptionalInterval = Annotated[
    int | float | None,
    _validated(_or_word(_interval, None), "a whole number of at least 1, a share below 1 of the training run, or null"),
]
MixtureWeight = Annotated[
    float | tuple[float, float],
    _validated(_mixture_weight, "a number above 0, or the numbers at the beginning and end of training, like [2, 0.5]"),
]
MaskRates = Annotated[tuple[float, ...], _validated(_mask_rates, "a share above 0 and below 1, or two of them, like [0.3, 0.15]")]
LabelList = Annotated[tuple[str, ...], _validated(_label_list, "a list of different labels")]
Counts = Annotated[tuple[int, ...], _validated(_counts, "a list of whole numbers")]
ClassWeights = Annotated[
    str | dict[str, float], _validated(_class_weights, "none, balanced, or a weight for each label, like {spam: 2, ham: 1}")
]
Betas = Annotated[tuple[float, float], _validated(_betas, "two numbers of at least 0 and below 1, like [0.9, 0.95]")]
RequiredPath = Annotated[str, _validated(_path, "a path")]
OptionalPath = Annotated[str | None, _validated(_or_word(_path, None), "a path, or null")]
MirrorUrl = Annotated[str | None, _validated(_or_word(_url, None), "a URL like s3://bucket/runs, or null")]
RunName = Annotated[
    str, _validated(_run_name, "the name of a folder: printable characters without / or a leading dot, and at most 200 bytes")
]
OptionalTemplate = Annotated[str | None, _validated(_template, "text with fields in braces, like '{title}: {body}', or null")]
Orders = Annotated[tuple[int, ...], _validated(_orders, "a list of different whole numbers from 2 to 16, like [2, 3]")]
Thresholds = Annotated[tuple[int, ...], _validated(_thresholds, "a list of whole numbers of at least 0, like [0, 0, 1]")]
AttentionPattern = Annotated[
    tuple[str, ...], _validated(_attention_pattern, "a list of local and global, like [local, local, global]")
]
RopePattern = Annotated[tuple[str, ...], _validated(_rope_pattern, "a list of rope and none, like [rope, rope, none]")]
Sources = Annotated[tuple[str, ...], _validated(_sources, "a SOURCE (a file, folder, glob, URL or builtin:NAME) or a list of them")]
RunPaths = Annotated[tuple[str, ...], _validated(_run_paths, "a run folder or a list of different run folders")]
Targets = Annotated[tuple[str, ...], _validated(_targets, f"a list of {', '.join(LORA_TARGETS)}")]
Texts = Annotated[tuple[str, ...], _validated(_texts, "text or a list of texts")]
Trackers = Annotated[tuple[str, ...], _validated(_trackers, f"one of {', '.join(TRACKERS)}, or a list of them")]
Alphabet = Annotated[int | str, _validated(_alphabet, "bytes, text, a number of characters, or the characters themselves")]
Characters = Annotated[int | str, _validated(_alphabet, "text, a number of characters, or the characters themselves")]
Normalizations = Annotated[
    tuple[str, ...], _validated(_normalizations, f"none or some of {', '.join(NORMALIZATIONS)}, in the order in which they apply")
]
TokenList = Annotated[tuple[str, ...], _validated(_token_list, "a token or a list of different tokens")]
Megabytes = Annotated[int, _validated(_whole(1, 1_000_000), "a whole number of megabytes, at least 1")]
