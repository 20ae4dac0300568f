"""Compile a regular expression to a deterministic finite automaton (DFA) over UTF-8 bytes.

The number of states and the amount of work are limited, because even a very short expression can describe an automaton that does
not fit in memory.
"""

from __future__ import annotations

import importlib
import re
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from tinylm.errors import InputError

MAX_PATTERN_LENGTH = 20_000
_MAX_STATES = 10_000
_MAX_WORK = 400_000
_WORK_PER_CHECK = 500
_MAX_PAUSE = 0.02
_Ranges = list[tuple[int, int]]
_MAX_CODE_POINT = 0x10FFFF
_PARSER: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


class CompileTimeout(InputError):
    """Raised when the deadline for compiling an expression has passed."""


@dataclass
class CompileBudget:
    """Limits the work spent on compiling one expression. Errors mention the option or parameter `name`.

    `deadline` is a time on the `time.monotonic()` clock. After about every millisecond of work, sleep `pause` times as long as the
    work took, up to 0.02 seconds. With a `pause` of 2, a background compilation holds Python's global interpreter lock for at most
    a third of the time.
    """

    name: str
    deadline: float | None = None
    pause: float = 0.0
    work: int = 0
    _next_check: int = 0
    _resumed: float = field(default_factory=time.monotonic)

    def spend(self, work: int = 1) -> None:
        """Count work in units of about a microsecond. Raises `InputError` if the limit or the deadline has been exceeded."""
        self.work += work
        if self.work < self._next_check:
            return
        self._next_check = self.work + _WORK_PER_CHECK
        if self.work > _MAX_WORK:
            raise self.too_large()
        if self.pause:
            time.sleep(min(_MAX_PAUSE, self.pause * (time.monotonic() - self._resumed)))
            self._resumed = time.monotonic()
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise CompileTimeout("the expression takes too long to compile", where=self.name, hint="use a smaller expression")

    def too_large(self) -> InputError:
        """Return the error for an expression whose automaton is too large."""
        return InputError("the expression is too large", where=self.name, hint="use fewer or smaller repetitions")


def byte_dfa(pattern: str, budget: CompileBudget) -> tuple[np.ndarray, np.ndarray]:
    """Compile a pattern to a DFA over bytes: build Thompson's NFA and apply the subset construction. State 0 is the initial state.

    Returns the transitions `(states, 256)`, int16, with -1 for no transition, and a bool mask `(states,)` of accepting states.
    Raises `InputError` if the pattern is invalid, not supported or too large.
    """
    parsed = _parse(pattern, budget.name)
    nfa = _ByteNfa(budget, dotall=bool(parsed.state.flags & re.DOTALL), ascii=bool(parsed.state.flags & re.ASCII))
    final = nfa.add_sequence(_without_anchors(list(parsed)), 0)
    start = nfa.closure((0,))
    indices, rows, queue = {start: 0}, [], deque([start])  # each DFA state is a set of NFA states
    while queue:
        row = np.full(256, -1, dtype=np.int16)
        for low, high, targets in nfa.byte_transitions(queue.popleft()):
            if targets not in indices:
                indices[targets] = len(indices)
                queue.append(targets)
                if len(indices) > _MAX_STATES:
                    raise budget.too_large()
            row[low : high + 1] = indices[targets]
        rows.append(row)
    return np.stack(rows), np.array([final in states for states in indices])


def _parse(pattern: str, name: str) -> Any:
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise InputError(f"must have at most {MAX_PATTERN_LENGTH} characters, not {len(pattern)}", where=name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for example, the warning that `[[` may become a set operation
            parsed = _PARSER.parse(pattern)
    except RecursionError:
        raise InputError("the expression is nested too deeply", where=name) from None
    except (re.error, ValueError, OverflowError) as error:
        raise InputError(f"not a regular expression: {error}", where=name) from None
    if parsed.state.flags & (re.IGNORECASE | re.MULTILINE):
        raise InputError("the flags i and m are not supported", where=name, hint="use [Aa] to match a letter in either case")
    return parsed


def _without_anchors(items: list[Any]) -> list[Any]:
    """Remove `^`, `$` and their equivalents from the ends of a pattern. They are redundant because the whole text has to match."""
    if items and str(items[0][0]) == "AT" and str(items[0][1]) in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        items = items[1:]
    if items and str(items[-1][0]) == "AT" and str(items[-1][1]) in ("AT_END", "AT_END_STRING"):
        items = items[:-1]
    return items


@dataclass
class _ByteNfa:
    """A nondeterministic finite automaton over bytes (Thompson 1968). State 0 is the initial state.

    Each `add` method adds a part of the pattern that starts in `state` and returns the state in which that part ends.
    """

    budget: CompileBudget
    dotall: bool
    ascii: bool
    edges: list[list[tuple[int, int, int]]] = field(default_factory=lambda: [[]])
    """For each state, its transitions as (lowest byte, highest byte, target)."""
    epsilon: list[list[int]] = field(default_factory=lambda: [[]])
    """For each state, the states that are reachable without consuming a byte."""
    _closures: dict[tuple[int, ...], frozenset[int]] = field(default_factory=dict)

    def new_state(self) -> int:
        self.budget.spend()
        self.edges.append([])
        self.epsilon.append([])
        return len(self.edges) - 1

    def add_sequence(self, items: Iterable[Any], state: int) -> int:
        for kind, value in items:
            self.budget.spend()
            state = self._add_part(str(kind), value, state)
        return state

    def _add_part(self, kind: str, value: Any, state: int) -> int:
        if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "RANGE", "CATEGORY"):
            return self._add_characters(self._character_class(kind, value), state)
        if kind == "SUBPATTERN":
            _, added, removed, items = value
            if added or removed:
                raise InputError("flags for part of the expression are not supported", where=self.budget.name)
            return self.add_sequence(items, state)
        if kind == "BRANCH":
            end = self.new_state()
            for items in value[1]:
                begin = self.new_state()
                self.epsilon[state].append(begin)
                self.epsilon[self.add_sequence(items, begin)].append(end)
            return end
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            minimum, maximum, items = value
            return self._add_repeat(minimum, maximum, items, state)
        names = {
            "GROUPREF": "backreferences",
            "ASSERT": "lookaround assertions",
            "ASSERT_NOT": "lookaround assertions",
            "AT": "anchors inside the expression",
            "GROUPREF_EXISTS": "conditions on groups",
            "ATOMIC_GROUP": "atomic groups",
            "POSSESSIVE_REPEAT": "possessive repetitions",
        }
        raise InputError(f"{names.get(kind, kind)} are not supported", where=self.budget.name)

    def _add_repeat(self, minimum: int, maximum: Any, items: Any, state: int) -> int:
        for _ in range(int(minimum)):
            self.budget.spend()
            before, state = state, self.add_sequence(items, state)
            if state == before:  # the repeated part matches only the empty string
                return state
        end = self.new_state()
        self.epsilon[state].append(end)
        if str(maximum) == "MAXREPEAT":
            begin = self.new_state()
            self.epsilon[state].append(begin)
            after = self.add_sequence(items, begin)
            self.epsilon[after] += [begin, end]
            return end
        for _ in range(int(maximum) - int(minimum)):
            self.budget.spend()
            begin = self.new_state()
            self.epsilon[state].append(begin)
            state = self.add_sequence(items, begin)
            self.epsilon[state].append(end)
        return end

    def _character_class(self, kind: str, value: Any) -> _Ranges:
        """Return the code points that one element of a pattern matches, as inclusive ranges."""
        if kind == "LITERAL":
            return [(value, value)]
        if kind == "NOT_LITERAL":
            return _complement([(value, value)])
        if kind == "ANY":
            return [(0, _MAX_CODE_POINT)] if self.dotall else _complement([(10, 10)])
        if kind == "RANGE":
            return [tuple(value)]
        if kind == "CATEGORY":
            return _category(str(value), self.ascii)
        members: _Ranges = []
        for item, part in value:
            if str(item) != "NEGATE":
                members += self._character_class(str(item), part)
                self.budget.spend(1 + len(members) // 100)
        outside = _complement(members)
        return outside if str(value[0][0]) == "NEGATE" else _complement(outside)

    def _add_characters(self, ranges: _Ranges, state: int) -> int:
        end = self.new_state()
        encodings = [encoding for low, high in ranges for encoding in _utf8_ranges(low, high)]
        for encoding in encodings:
            self.budget.spend()
            source = state
            for position, (low, high) in enumerate(encoding):
                target = end if position == len(encoding) - 1 else self.new_state()
                self.edges[source].append((low, high, target))
                source = target
        return end

    def closure(self, states: tuple[int, ...]) -> frozenset[int]:
        """Return these states and all states that are reachable from them without consuming a byte."""
        if states not in self._closures:
            self._closures[states] = self._reachable(states)
        return self._closures[states]

    def _reachable(self, states: tuple[int, ...]) -> frozenset[int]:
        reachable, stack = set(states), list(states)
        while stack:
            for target in self.epsilon[stack.pop()]:
                if target not in reachable:
                    reachable.add(target)
                    stack.append(target)
            self.budget.spend()
        return frozenset(reachable)

    def byte_transitions(self, states: frozenset[int]) -> Iterable[tuple[int, int, frozenset[int]]]:
        """Yield the transitions from a set of states as disjoint ranges: (lowest byte, highest byte, set of target states)."""
        targets: dict[int, list[int]] = {}  # byte -> target states
        for state in states:
            self.budget.spend()
            for low, high, target in self.edges[state]:
                self.budget.spend(1 + (high - low) // 8)
                for byte in range(low, high + 1):
                    targets.setdefault(byte, []).append(target)
        ends = sorted(targets)
        start = 0
        for index, byte in enumerate(ends):
            following = ends[index + 1] if index + 1 < len(ends) else None
            if following != byte + 1 or targets[following] != targets[byte]:
                yield ends[start], byte, self.closure(tuple(targets[byte]))
                start = index + 1


def _complement(ranges: _Ranges) -> _Ranges:
    """Return all code points outside the ranges."""
    outside, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            outside.append((start, low - 1))
        start = max(start, high + 1)
    return outside + ([(start, _MAX_CODE_POINT)] if start <= _MAX_CODE_POINT else [])


@lru_cache(maxsize=16)
def _category(name: str, ascii: bool) -> _Ranges:
    """Return the code points that `\\d`, `\\w`, `\\s` or their complements match in Python's `re` module."""
    letter = {"DIGIT": "d", "WORD": "w", "SPACE": "s"}[name.rpartition("_")[2]]
    text = "".join(map(chr, range(_MAX_CODE_POINT + 1)))
    matches = re.finditer(f"\\{letter}+", text, re.ASCII if ascii else 0)
    ranges = [(match.start(), match.end() - 1) for match in matches]
    return _complement(ranges) if "NOT" in name else ranges


def _utf8_ranges(low: int, high: int) -> Iterable[list[tuple[int, int]]]:
    """Yield the UTF-8 encodings of a range of code points as sequences of byte ranges. Surrogates are skipped."""
    for first, last in ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, _MAX_CODE_POINT)):
        begin, end = max(low, first), min(high, last)
        if begin <= end:
            yield from _byte_ranges(list(chr(begin).encode()), list(chr(end).encode()))


def _byte_ranges(low: list[int], high: list[int]) -> Iterable[list[tuple[int, int]]]:
    """Yield the encodings from `low` to `high` as sequences of byte ranges. Both encodings must have the same length."""
    if len(low) == 1:
        yield [(low[0], high[0])]
        return
    lowest, highest = [0x80] * (len(low) - 1), [0xBF] * (len(low) - 1)
    if low[0] == high[0]:
        for rest in _byte_ranges(low[1:], high[1:]):
            yield [(low[0], low[0]), *rest]
        return
    first, last = low[0], high[0]
    if low[1:] != lowest:
        for rest in _byte_ranges(low[1:], highest):
            yield [(first, first), *rest]
        first += 1
    end = last if high[1:] == highest else last - 1
    if first <= end:
        yield [(first, end), *((0x80, 0xBF) for _ in lowest)]
    if end != last:
        for rest in _byte_ranges(lowest, high[1:]):
            yield [(last, last), *rest]
