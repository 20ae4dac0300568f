"""The settings of a sweep: values to try for recipe keys (`--set KEY=A,B,C`), and ranges to search (`--range KEY=LOW..HIGH`)."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tinylm.errors import InputError

Values = Mapping[str, str]
"""The values of the swept keys in one run, as written in `--set KEY=VALUE`."""

_RANGE = re.compile(r"(?P<low>[^.:]+(?:\.\d+)?(?:e[+-]?\d+)?)\.\.(?P<high>[^:]+?)(?P<log>:log)?", re.IGNORECASE)
_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "'\""
_MAX_NAME_LENGTH = 120


@dataclass(frozen=True)
class Axis:
    """A recipe key with the values to try. A key with a single value is the same in all runs."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """A recipe key and the range of numbers to search for it. If both bounds are integers, so are the values."""

    key: str
    low: float
    high: float
    log: bool
    """Sample values uniformly on a logarithmic scale."""
    whole: bool

    def __str__(self) -> str:
        low, high = self.bounds
        return f"{self.key}={low}..{high}{':log' if self.log else ''}"

    @property
    def bounds(self) -> tuple[str, str]:
        """Both bounds, as values of the key."""
        low, high = (str(int(bound)) if self.whole else f"{bound:g}" for bound in (self.low, self.high))
        return low, high


def parse_axis(setting: str) -> Axis:
    """Parse `KEY=A,B,C`. Commas inside brackets or quotes do not separate values. Raises `InputError` for any other form."""
    key, equals, text = setting.partition("=")
    values = tuple(value.strip() for value in _split(text))
    if not equals or not key.strip() or "" in values:
        raise InputError("must have the form KEY=A,B,C, for example model.n_embd=128,192", where=f"--set {setting}")
    if len(set(values)) < len(values):
        raise InputError("the same value occurs twice", where=f"--set {setting}")
    return Axis(key.strip(), values)


def _split(text: str) -> Iterator[str]:
    """Split at commas that are outside brackets and quotes."""
    depth, quote, start = 0, "", 0
    for index, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES:
            quote = character
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        elif character == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    yield text[start:]


def parse_range(setting: str) -> Range:
    """Parse `KEY=LOW..HIGH` or `KEY=LOW..HIGH:log`. Raises `InputError` for any other form, and for an empty range."""
    key, _, text = setting.partition("=")
    where, match = f"--range {setting}", _RANGE.fullmatch(text.strip())
    try:
        if match is None or not key.strip():
            raise ValueError
        low, high = float(match["low"]), float(match["high"])
    except ValueError:
        hint = "for example training.optimizer.lr=1e-3..1e-1:log"
        raise InputError("must have the form KEY=LOW..HIGH or KEY=LOW..HIGH:log", where=where, hint=hint) from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError("the first bound must be less than the second", where=where)
    if match["log"] and low <= 0:
        raise InputError("the bounds of a logarithmic range must be above 0", where=where)
    whole = all(re.fullmatch(r"[+-]?\d+", match[end].strip()) for end in ("low", "high"))
    return Range(key.strip(), low, high, bool(match["log"]), whole)


def check_keys(keys: Sequence[str]) -> None:
    """Raise `InputError` if a key is set twice, or if a section and a key in it are set, because one could replace the other."""
    for key in keys:
        if keys.count(key) > 1:
            raise InputError(f"{key} is set twice", where="--set, --range")
        for inner in keys:
            if inner.startswith(f"{key}."):
                hint = f"set the keys of {key} one by one"
                raise InputError(f"{inner} is part of {key}, which is also set", where="--set, --range", hint=hint)


def grid(axes: Sequence[Axis]) -> list[dict[str, str]]:
    """Return every combination of the values of all axes. The last axis varies fastest."""
    return [
        dict(zip((axis.key for axis in axes), values, strict=True)) for values in itertools.product(*(axis.values for axis in axes))
    ]


def overrides(values: Values) -> list[str]:
    """Return the settings as arguments for `--set`."""
    return [f"{key}={value}" for key, value in values.items()]


def run_names(settings: Sequence[Values], swept: Iterable[str]) -> list[str]:
    """Return a folder name for each run. It shows the values of the swept keys, for example `n_embd=128,seed=1`."""
    short = shortened(swept)
    names = []
    for values in settings:
        parts = (f"{short[key]}={re.sub(r'[^A-Za-z0-9._+-]+', '_', value)}" for key, value in values.items() if key in short)
        names.append(",".join(parts)[:_MAX_NAME_LENGTH] or "run")
    if len({name.casefold() for name in names}) < len(names):  # some values differ only in characters that names cannot contain
        return [f"{index:03},{name}" for index, name in enumerate(names)]
    return names


def shortened(keys: Iterable[str]) -> dict[str, str]:
    """Map each dotted key to its shortest suffix that is unique among the keys."""
    keys = list(keys)
    short = {}
    for key in keys:
        parts = key.split(".")
        suffixes = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        short[key] = next(s for s in suffixes if sum(other == s or other.endswith(f".{s}") for other in keys) == 1)
    return short
