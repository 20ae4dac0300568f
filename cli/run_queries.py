"""Columns, filters and sorting for `tinylm runs`. A key is a column of the list, a held-out metric, or a recipe key."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tinylm.errors import InputError, did_you_mean

Row = dict[str, Any]
_COMPARISON = re.compile(r"(?P<key>[A-Za-z_][\w.]*)\s*(?P<operator>[<>=!]+)\s*(?P<value>.*)", re.DOTALL)
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "!=": operator.ne,
    "==": operator.eq,
    "=": operator.eq,
}
ALIASES = {"age": "age_seconds", "size": "bytes", "steps": "step"}


@dataclass(frozen=True)
class Filter:
    """A condition such as `model.n_embd>=192`. A run without the key does not satisfy it."""

    text: str
    key: str
    operator: str
    value: str

    def accepts(self, row: Row) -> bool:
        found, _ = lookup(row, self.key)
        if found is None:
            return False
        number, wanted = _number(found), _number(self.value)
        if number is not None and wanted is not None:
            return _OPERATORS[self.operator](number, wanted)
        if self.operator not in ("=", "==", "!="):
            raise InputError(f"{found!r} and {self.value!r} cannot be ordered; use = or !=", where=f"--filter {self.text}")
        return _OPERATORS[self.operator](as_text(found), self.value)


def parse_filter(text: str) -> Filter:
    """Parse `KEY OPERATOR VALUE`. Raises `InputError` if `text` does not have this form."""
    match = _COMPARISON.fullmatch(text.strip())
    if match is None or not match["value"].strip():
        raise InputError("must have the form KEY>=VALUE (or <=, =, !=, <, >)", where=f"--filter {text}")
    given = match["operator"]
    if given not in _OPERATORS:
        hint = f"use {given[::-1]}" if given in ("=>", "=<") else "use one of >=, <=, =, !=, <, >"
        raise InputError(f"unknown operator {given}", where=f"--filter {text}", hint=hint)
    return Filter(text, match["key"], match["operator"], match["value"].strip())


def lookup(row: Row, key: str) -> tuple[Any, bool]:
    """Return the value of a key in a row, and whether the row has the key at all."""
    for name in (ALIASES.get(key, key), f"best_{key}", f"best_val_{key}"):
        if name in row:
            return row[name], True
    recipe = row["recipe"]
    return recipe.get(key), key in recipe


def check_keys(rows: Sequence[Row], keys: Sequence[str], where: str) -> None:
    """Raise `InputError` for a key that no run has."""
    for key in keys:
        if rows and not any(lookup(row, key)[1] for row in rows):
            columns = list(dict.fromkeys(name for row in rows for name in row if name != "recipe"))
            short = [column.removeprefix("best_") for column in columns]
            known = (*columns, *short, *ALIASES, *(name for row in rows for name in row["recipe"]))
            hint = did_you_mean(key, known) or f"use {', '.join(columns)}, or a recipe key such as model.context_length"
            raise InputError(f"no run has the key {key}", where=where, hint=hint)


def sort_rows(rows: list[Row], key: str, *, higher_is_better: bool) -> list[Row]:
    """Sort by a key: numbers in ascending order (descending if higher is better), then text, then runs without the key."""

    def rank(row: Row) -> tuple[int, float, str]:
        value, _ = lookup(row, key)
        number = _number(value)
        if value is None or (number is not None and math.isnan(number)):
            return 2, 0.0, ""
        return (1, 0.0, as_text(value)) if number is None else (0, -number if higher_is_better else number, "")

    return sorted(rows, key=rank)


def as_text(value: Any) -> str:
    """Format a value as in a recipe."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_text, value))}]"
    return str(value)


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
