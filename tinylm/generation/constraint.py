"""Text that must match: a regular expression, or one of several choices, as an automaton whose letters are the model's tokens.

The expression (Python's notation) becomes a deterministic automaton over UTF-8 bytes; for each of its states the tokens whose bytes
lead on are known, and how many tokens the shortest way to a match takes. A model may therefore cut its text into tokens as it
likes, half a character at a time if need be, and still always ends in a match within the tokens it is given.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.tokenizer import Tokenizer

_MOST_STATES = 10_000
_Ranges = list[tuple[int, int]]
_LAST = 0x10FFFF
_PARSER: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


class Constraint:
    """What a text must match, in a model's tokens. State 0 is the beginning. `name`: the option to blame."""

    def __init__(self, pattern: str, tokenizer: Tokenizer, *, name: str = "--regex") -> None:
        """Raises `InputError` for what is no expression, has parts that are not regular, or cannot be written in these tokens."""
        self.name = name
        self._end = tokenizer.end_of_text
        table, accepting = _automaton(pattern, name)
        self._accepting = accepting
        self._moves = _moves(table, tokenizer)
        self._distance = _distances(self._moves, accepting)
        if self._distance[0] == _NEVER:
            raise InputError("no text that matches can be written in the model's vocabulary", where=name)
        self._ids: dict[int, Tensor] = {}
        self._keep_what_can_end()

    @classmethod
    def choices(cls, texts: Sequence[str], tokenizer: Tokenizer) -> Constraint:
        """One of these texts, none of them empty."""
        if any(not text for text in texts):
            raise InputError("an empty text is no choice", where="--choice")
        return cls("|".join(map(re.escape, texts)), tokenizer, name="--choice")

    @property
    def fewest_tokens(self) -> int:
        """Tokens of the shortest text that matches."""
        return int(self._distance[0])

    def restrict(self, logits: Tensor, state: int, left: int) -> None:
        """Set to minus infinity, in place, what does not lead to a match within `left` tokens (V,)."""
        ids, following = self._moves[state]
        if state not in self._ids:
            self._ids[state] = torch.from_numpy(ids).to(logits.device)
        allowed = self._ids[state]
        near = self._distance[following] < left
        if not near.all():
            allowed = allowed[torch.from_numpy(near).to(allowed.device)]
        if self._accepting[state] and self._end is not None:
            allowed = torch.cat((allowed, allowed.new_tensor([self._end])))
        kept = logits[allowed]
        logits.fill_(float("-inf"))
        logits[allowed] = kept

    def after(self, state: int, id: int) -> int:
        """The state after a token that was allowed."""
        ids, following = self._moves[state]
        return int(following[np.searchsorted(ids, id)])

    def accepts(self, state: int) -> bool:
        """Whether the text so far matches."""
        return bool(self._accepting[state])

    def complete(self, state: int) -> bool:
        """Whether the text matches and nothing may follow; without an end-of-text token, whether it matches."""
        return bool(self._accepting[state]) and (self._end is None or not len(self._moves[state][0]))

    def _keep_what_can_end(self) -> None:
        for state, (ids, following) in enumerate(self._moves):
            kept = self._distance[following] < _NEVER
            self._moves[state] = (ids[kept], following[kept])


_NEVER = np.iinfo(np.int32).max
_Moves = list[tuple[np.ndarray, np.ndarray]]


def _moves(table: np.ndarray, tokenizer: Tokenizer) -> _Moves:
    """(ids that lead on, ascending; the states they lead to) of each state of a byte automaton (states, 256)."""
    dead = len(table)
    walked = np.full((dead + 1, 256), dead, dtype=np.int32)
    walked[:dead] = np.where(table < 0, dead, table)
    spoken = [b"" if id in (tokenizer.unknown, tokenizer.end_of_text) else text for id, text in enumerate(tokenizer.token_bytes)]
    lengths = np.array([len(text) for text in spoken])
    order = np.argsort(-lengths, kind="stable")
    order = order[: int((lengths > 0).sum())]
    columns = [
        np.array([spoken[id][place] for id in order[: int((lengths > place).sum())]], dtype=np.intp)
        for place in range(int(lengths.max(initial=0)))
    ]
    moves = []
    for state in range(dead):
        at = np.full(len(order), state, dtype=np.int32)
        for column in columns:
            at[: len(column)] = walked[at[: len(column)], column]
        ids, following = order[at != dead], at[at != dead]
        sorting = np.argsort(ids)
        moves.append((ids[sorting].astype(np.int64), following[sorting]))
    return moves


def _distances(moves: _Moves, accepting: np.ndarray) -> np.ndarray:
    """Tokens on the shortest way from each state to an accepting one."""
    before: list[list[int]] = [[] for _ in moves]
    for state, (_, following) in enumerate(moves):
        for target in np.unique(following):
            before[target].append(state)
    distance = np.full(len(moves), _NEVER, dtype=np.int32)
    distance[accepting] = 0
    queue = deque(np.flatnonzero(accepting).tolist())
    while queue:
        target = queue.popleft()
        for state in before[target]:
            if distance[state] == _NEVER:
                distance[state] = distance[target] + 1
                queue.append(state)
    return distance


@lru_cache(maxsize=16)
def _automaton(pattern: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(states, 256) int32 where each byte leads, -1 where it does not, and which states accept: subsets of Thompson's automaton."""
    try:
        re.compile(pattern)
        parsed = _PARSER.parse(pattern)
    except re.error as error:
        raise InputError(f"not a regular expression: {error}", where=name) from None
    machine = _Machine(name, dotall=bool(parsed.state.flags & re.DOTALL), ascii=bool(parsed.state.flags & re.ASCII))
    if parsed.state.flags & (re.IGNORECASE | re.MULTILINE):
        raise InputError("the flags i and m are not understood here", where=name, hint="write [Aa] for a letter of either case")
    final = machine.sequence(_without_anchors(list(parsed)), 0)
    start = machine.closure([0])
    numbers, rows, todo = {start: 0}, [], [start]
    while todo:
        row = np.full(256, -1, dtype=np.int32)
        for low, high, targets in machine.leaving(todo.pop(0)):
            if targets not in numbers:
                numbers[targets] = len(numbers)
                todo.append(targets)
                if len(numbers) > _MOST_STATES:
                    raise machine.too_large()
            row[low : high + 1] = numbers[targets]
        rows.append(row)
    return np.stack(rows), np.array([final in states for states in numbers])


def _without_anchors(items: list[Any]) -> list[Any]:
    """The whole text has to match anyway: ^, $ and the like at the ends say nothing."""
    if items and str(items[0][0]) == "AT" and str(items[0][1]) in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        items = items[1:]
    if items and str(items[-1][0]) == "AT" and str(items[-1][1]) in ("AT_END", "AT_END_STRING"):
        items = items[:-1]
    return items


@dataclass
class _Machine:
    """Thompson's non-deterministic automaton (1968) over bytes. Methods add a part after a state and give the state after it."""

    name: str
    dotall: bool
    ascii: bool
    edges: list[list[tuple[int, int, int]]] = field(default_factory=lambda: [[]])
    free: list[list[int]] = field(default_factory=lambda: [[]])

    def too_large(self) -> InputError:
        return InputError("too large an expression", where=self.name, hint="fewer or smaller repetitions")

    def state(self) -> int:
        if len(self.edges) > 20 * _MOST_STATES:
            raise self.too_large()
        self.edges.append([])
        self.free.append([])
        return len(self.edges) - 1

    def sequence(self, items: Iterable[Any], at: int) -> int:
        for kind, value in items:
            at = self._part(str(kind), value, at)
        return at

    def _part(self, kind: str, value: Any, at: int) -> int:
        if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "RANGE", "CATEGORY"):
            return self._characters(self._set(kind, value), at)
        if kind == "SUBPATTERN":
            _, added, removed, items = value
            if added or removed:
                raise InputError("flags for a part are not understood here", where=self.name)
            return self.sequence(items, at)
        if kind == "BRANCH":
            end = self.state()
            for items in value[1]:
                begin = self.state()
                self.free[at].append(begin)
                self.free[self.sequence(items, begin)].append(end)
            return end
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, items = value
            return self._repeat(least, most, items, at)
        told = {"GROUPREF": "a back reference", "ASSERT": "a look-around", "ASSERT_NOT": "a look-around", "AT": "an anchor inside"}
        raise InputError(f"{told.get(kind, kind)} is not regular, or not understood here", where=self.name)

    def _repeat(self, least: int, most: Any, items: Any, at: int) -> int:
        for _ in range(int(least)):
            at = self.sequence(items, at)
        end = self.state()
        self.free[at].append(end)
        if str(most) == "MAXREPEAT":
            begin = self.state()
            self.free[at].append(begin)
            after = self.sequence(items, begin)
            self.free[after] += [begin, end]
            return end
        for _ in range(int(most) - int(least)):
            begin = self.state()
            self.free[at].append(begin)
            at = self.sequence(items, begin)
            self.free[at].append(end)
        return end

    def _set(self, kind: str, value: Any) -> _Ranges:
        """Code points of one character's class, as ranges."""
        if kind == "LITERAL":
            return [(value, value)]
        if kind == "NOT_LITERAL":
            return _others([(value, value)])
        if kind == "ANY":
            return [(0, _LAST)] if self.dotall else _others([(10, 10)])
        if kind == "RANGE":
            return [tuple(value)]
        if kind == "CATEGORY":
            return _category(str(value), self.ascii)
        inside = [one for item, part in value if str(item) != "NEGATE" for one in self._set(str(item), part)]
        return _others(inside) if str(value[0][0]) == "NEGATE" else inside

    def _characters(self, ranges: _Ranges, at: int) -> int:
        end = self.state()
        for sequence in (one for low, high in ranges for one in _utf8(low, high)):
            here = at
            for place, (low, high) in enumerate(sequence):
                there = end if place == len(sequence) - 1 else self.state()
                self.edges[here].append((low, high, there))
                here = there
        return end

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        found, todo = set(states), list(states)
        while todo:
            for target in self.free[todo.pop()]:
                if target not in found:
                    found.add(target)
                    todo.append(target)
        return frozenset(found)

    def leaving(self, states: frozenset[int]) -> Iterable[tuple[int, int, frozenset[int]]]:
        """Ranges of bytes and the states they lead to."""
        edges = [edge for state in states for edge in self.edges[state]]
        cuts = sorted({low for low, _, _ in edges} | {high + 1 for _, high, _ in edges})
        for low, after in pairwise(cuts):
            targets = [target for first, last, target in edges if first <= low <= last]
            if targets:
                yield low, after - 1, self.closure(targets)


def _others(ranges: _Ranges) -> _Ranges:
    """All code points outside of these."""
    outside, at = [], 0
    for low, high in sorted(ranges):
        if low > at:
            outside.append((at, low - 1))
        at = max(at, high + 1)
    return outside + ([(at, _LAST)] if at <= _LAST else [])


@lru_cache(maxsize=16)
def _category(name: str, ascii: bool) -> _Ranges:
    """What \\d, \\w, \\s and their opposites hold, asked of Python itself."""
    letter = {"DIGIT": "d", "WORD": "w", "SPACE": "s"}[name.rpartition("_")[2]]
    text = "".join(map(chr, range(_LAST + 1)))
    found = re.finditer(f"\\{letter}+", text, re.ASCII if ascii else 0)
    ranges = [(match.start(), match.end() - 1) for match in found]
    return _others(ranges) if "NOT" in name else ranges


def _utf8(low: int, high: int) -> Iterable[list[tuple[int, int]]]:
    """The UTF-8 forms of a range of code points, as sequences of byte ranges; surrogates have none."""
    for first, last in ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, _LAST)):
        begin, end = max(low, first), min(high, last)
        if begin <= end:
            yield from _same_length(list(chr(begin).encode()), list(chr(end).encode()))


def _same_length(low: list[int], high: list[int]) -> Iterable[list[tuple[int, int]]]:
    if len(low) == 1:
        yield [(low[0], high[0])]
        return
    lowest, highest = [0x80] * (len(low) - 1), [0xBF] * (len(low) - 1)
    if low[0] == high[0]:
        for rest in _same_length(low[1:], high[1:]):
            yield [(low[0], low[0]), *rest]
        return
    first, last = low[0], high[0]
    if low[1:] != lowest:
        for rest in _same_length(low[1:], highest):
            yield [(first, first), *rest]
        first += 1
    end = last if high[1:] == highest else last - 1
    if first <= end:
        yield [(first, end), *((0x80, 0xBF) for _ in lowest)]
    if end != last:
        for rest in _same_length(lowest, high[1:]):
            yield [(last, last), *rest]
