"""Constrained generation: a regular expression or a list of choices, compiled to a finite automaton over the model's tokens.

The expression (in Python's syntax) is compiled to a deterministic finite automaton (DFA) over UTF-8 bytes. Running every token of
the vocabulary through the DFA yields the tokens that are allowed in each state, and the number of tokens that the shortest match
still requires. The model may therefore split its text into tokens in any way, even within a character, and its output always
matches within the token limit.
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

_MAX_STATES = 10_000
_Ranges = list[tuple[int, int]]
_MAX_CODE_POINT = 0x10FFFF
_PARSER: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


class Constraint:
    """A DFA over a tokenizer's ids that accepts the texts that a pattern matches. State 0 is the initial state.

    Error messages refer to the command line option `name`. Raises `InputError` if the pattern is invalid or not supported, or if
    the vocabulary cannot express any text that matches.
    """

    def __init__(self, pattern: str, tokenizer: Tokenizer, *, name: str = "--regex") -> None:
        self.name = name
        self._end_of_text = tokenizer.end_of_text
        table, accepting = _byte_dfa(pattern, name)
        self._accepting = accepting
        self._transitions = _token_transitions(table, tokenizer)
        self._distances = _distances(self._transitions, accepting)
        if self._distances[0] == _UNREACHABLE:
            raise InputError("the model's vocabulary cannot express any text that matches", where=name)
        self._allowed_ids: dict[int, Tensor] = {}  # for each state used so far, on the device of the logits
        self._remove_dead_ends()

    @classmethod
    def choices(cls, texts: Sequence[str], tokenizer: Tokenizer) -> Constraint:
        """A constraint that accepts exactly these texts, none of which may be empty."""
        if any(not text for text in texts):
            raise InputError("must not be empty", where="--choice")
        return cls("|".join(map(re.escape, texts)), tokenizer, name="--choice")

    @property
    def min_tokens(self) -> int:
        """Number of tokens of the shortest text that matches."""
        return int(self._distances[0])

    def check_max_new_tokens(self, max_new_tokens: int) -> None:
        """Raise `InputError` if `max_new_tokens` is too small for any match."""
        if self.min_tokens > max_new_tokens:
            raise InputError(
                f"requires at least {self.min_tokens} tokens, but --max-new-tokens is {max_new_tokens}", where=self.name
            )

    def mask_logits(self, logits: Tensor, state: int, max_tokens: int) -> None:
        """Set logits `(V,)` to minus infinity, in place, for tokens after which no match is possible within `max_tokens` tokens."""
        ids, targets = self._transitions[state]
        if state not in self._allowed_ids:
            self._allowed_ids[state] = torch.from_numpy(ids).to(logits.device)
        allowed = self._allowed_ids[state]
        can_match = self._distances[targets] < max_tokens
        if not can_match.all():
            allowed = allowed[torch.from_numpy(can_match).to(allowed.device)]
        if self._accepting[state] and self._end_of_text is not None:
            allowed = torch.cat((allowed, allowed.new_tensor([self._end_of_text])))
        kept = logits[allowed]
        logits.fill_(float("-inf"))
        logits[allowed] = kept

    def next_state(self, state: int, id: int) -> int:
        """The state after an allowed token."""
        ids, targets = self._transitions[state]
        return int(targets[np.searchsorted(ids, id)])

    def accepts(self, state: int) -> bool:
        """Whether the text so far matches."""
        return bool(self._accepting[state])

    def is_complete(self, state: int) -> bool:
        """Whether the text matches and generation should stop: no token can follow, or there is no end-of-text token."""
        return bool(self._accepting[state]) and (self._end_of_text is None or not len(self._transitions[state][0]))

    def _remove_dead_ends(self) -> None:
        """Remove transitions to states from which no accepting state is reachable."""
        for state, (ids, targets) in enumerate(self._transitions):
            kept = self._distances[targets] < _UNREACHABLE
            self._transitions[state] = (ids[kept], targets[kept])


_UNREACHABLE = np.iinfo(np.int32).max
_Transitions = list[tuple[np.ndarray, np.ndarray]]
"""For each state, the ids with a transition, in ascending order, and the target of each."""


def _token_transitions(table: np.ndarray, tokenizer: Tokenizer) -> _Transitions:
    """The token transitions of a byte DFA `(states, 256)`.

    All tokens are run through the DFA at once, one byte position at a time. They are sorted longest first, so that the tokens that
    have a byte at a given position are a prefix of the order.
    """
    dead = len(table)
    next_state = np.full((dead + 1, 256), dead, dtype=np.int32)
    next_state[:dead] = np.where(table < 0, dead, table)
    excluded = (tokenizer.unknown, tokenizer.end_of_text)
    token_bytes = [b"" if id in excluded else text for id, text in enumerate(tokenizer.token_bytes)]
    lengths = np.array([len(text) for text in token_bytes])
    order = np.argsort(-lengths, kind="stable")
    order = order[: int((lengths > 0).sum())]
    columns = [
        np.array([token_bytes[id][position] for id in order[: int((lengths > position).sum())]], dtype=np.intp)
        for position in range(int(lengths.max(initial=0)))
    ]
    transitions = []
    for state in range(dead):
        states = np.full(len(order), state, dtype=np.int32)
        for column in columns:
            states[: len(column)] = next_state[states[: len(column)], column]
        ids, targets = order[states != dead], states[states != dead]
        sorting = np.argsort(ids)
        transitions.append((ids[sorting].astype(np.int64), targets[sorting]))
    return transitions


def _distances(transitions: _Transitions, accepting: np.ndarray) -> np.ndarray:
    """Number of tokens from each state to the nearest accepting state (breadth-first search)."""
    predecessors: list[list[int]] = [[] for _ in transitions]
    for state, (_, targets) in enumerate(transitions):
        for target in np.unique(targets):
            predecessors[target].append(state)
    distances = np.full(len(transitions), _UNREACHABLE, dtype=np.int32)
    distances[accepting] = 0
    queue = deque(np.flatnonzero(accepting).tolist())
    while queue:
        target = queue.popleft()
        for state in predecessors[target]:
            if distances[state] == _UNREACHABLE:
                distances[state] = distances[target] + 1
                queue.append(state)
    return distances


@lru_cache(maxsize=16)
def _byte_dfa(pattern: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The DFA of a pattern over bytes: Thompson's NFA, made deterministic by the subset construction.

    Returns the transitions `(states, 256)`, int32, with -1 for no transition, and a bool mask `(states,)` of accepting states.
    """
    try:
        re.compile(pattern)
        parsed = _PARSER.parse(pattern)
    except re.error as error:
        raise InputError(f"not a regular expression: {error}", where=name) from None
    nfa = _ByteNfa(name, dotall=bool(parsed.state.flags & re.DOTALL), ascii=bool(parsed.state.flags & re.ASCII))
    if parsed.state.flags & (re.IGNORECASE | re.MULTILINE):
        raise InputError("the flags i and m are not supported", where=name, hint="use [Aa] to match a letter in either case")
    final = nfa.add_sequence(_without_anchors(list(parsed)), 0)
    start = nfa.closure([0])
    indices, rows, queue = {start: 0}, [], [start]  # a state of the DFA is a set of states of the NFA
    while queue:
        row = np.full(256, -1, dtype=np.int32)
        for low, high, targets in nfa.byte_transitions(queue.pop(0)):
            if targets not in indices:
                indices[targets] = len(indices)
                queue.append(targets)
                if len(indices) > _MAX_STATES:
                    raise nfa.too_large_error()
            row[low : high + 1] = indices[targets]
        rows.append(row)
    return np.stack(rows), np.array([final in states for states in indices])


def _without_anchors(items: list[Any]) -> list[Any]:
    """Remove `^`, `$` and their equivalents at the ends of a pattern. They are redundant, because the whole text has to match."""
    if items and str(items[0][0]) == "AT" and str(items[0][1]) in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        items = items[1:]
    if items and str(items[-1][0]) == "AT" and str(items[-1][1]) in ("AT_END", "AT_END_STRING"):
        items = items[:-1]
    return items


@dataclass
class _ByteNfa:
    """A nondeterministic finite automaton over bytes (Thompson 1968). State 0 is the initial state.

    Each `add` method adds a part of the pattern that starts in a given state, and returns the state in which the part ends.
    """

    name: str
    dotall: bool
    ascii: bool
    edges: list[list[tuple[int, int, int]]] = field(default_factory=lambda: [[]])
    """For each state, its transitions as (lowest byte, highest byte, target)."""
    epsilon: list[list[int]] = field(default_factory=lambda: [[]])
    """For each state, the states that are reachable without consuming a byte."""

    def too_large_error(self) -> InputError:
        return InputError("the expression is too large", where=self.name, hint="use fewer or smaller repetitions")

    def new_state(self) -> int:
        if len(self.edges) > 20 * _MAX_STATES:
            raise self.too_large_error()
        self.edges.append([])
        self.epsilon.append([])
        return len(self.edges) - 1

    def add_sequence(self, items: Iterable[Any], state: int) -> int:
        for kind, value in items:
            state = self._add_part(str(kind), value, state)
        return state

    def _add_part(self, kind: str, value: Any, state: int) -> int:
        if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "RANGE", "CATEGORY"):
            return self._add_characters(self._character_class(kind, value), state)
        if kind == "SUBPATTERN":
            _, added, removed, items = value
            if added or removed:
                raise InputError("flags for part of the expression are not supported", where=self.name)
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
        }
        raise InputError(f"{names.get(kind, kind)} are not supported", where=self.name)

    def _add_repeat(self, minimum: int, maximum: Any, items: Any, state: int) -> int:
        for _ in range(int(minimum)):
            state = self.add_sequence(items, state)
        end = self.new_state()
        self.epsilon[state].append(end)
        if str(maximum) == "MAXREPEAT":
            begin = self.new_state()
            self.epsilon[state].append(begin)
            after = self.add_sequence(items, begin)
            self.epsilon[after] += [begin, end]
            return end
        for _ in range(int(maximum) - int(minimum)):
            begin = self.new_state()
            self.epsilon[state].append(begin)
            state = self.add_sequence(items, begin)
            self.epsilon[state].append(end)
        return end

    def _character_class(self, kind: str, value: Any) -> _Ranges:
        """The code points that one element of a pattern matches, as inclusive ranges."""
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
        members = [span for item, part in value if str(item) != "NEGATE" for span in self._character_class(str(item), part)]
        return _complement(members) if str(value[0][0]) == "NEGATE" else members

    def _add_characters(self, ranges: _Ranges, state: int) -> int:
        end = self.new_state()
        encodings = [encoding for low, high in ranges for encoding in _utf8_ranges(low, high)]
        for encoding in encodings:
            source = state
            for position, (low, high) in enumerate(encoding):
                target = end if position == len(encoding) - 1 else self.new_state()
                self.edges[source].append((low, high, target))
                source = target
        return end

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        """The given states and all states that are reachable from them without consuming a byte."""
        reachable, stack = set(states), list(states)
        while stack:
            for target in self.epsilon[stack.pop()]:
                if target not in reachable:
                    reachable.add(target)
                    stack.append(target)
        return frozenset(reachable)

    def byte_transitions(self, states: frozenset[int]) -> Iterable[tuple[int, int, frozenset[int]]]:
        """The transitions of a set of states, as disjoint ranges: (lowest byte, highest byte, set of target states)."""
        edges = [edge for state in states for edge in self.edges[state]]
        bounds = sorted({low for low, _, _ in edges} | {high + 1 for _, high, _ in edges})
        for low, end in pairwise(bounds):
            targets = [target for first, last, target in edges if first <= low <= last]
            if targets:
                yield low, end - 1, self.closure(targets)


def _complement(ranges: _Ranges) -> _Ranges:
    """All code points outside the ranges."""
    outside, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            outside.append((start, low - 1))
        start = max(start, high + 1)
    return outside + ([(start, _MAX_CODE_POINT)] if start <= _MAX_CODE_POINT else [])


@lru_cache(maxsize=16)
def _category(name: str, ascii: bool) -> _Ranges:
    """The code points that `\\d`, `\\w`, `\\s` or one of their complements match, according to `re`."""
    letter = {"DIGIT": "d", "WORD": "w", "SPACE": "s"}[name.rpartition("_")[2]]
    text = "".join(map(chr, range(_MAX_CODE_POINT + 1)))
    matches = re.finditer(f"\\{letter}+", text, re.ASCII if ascii else 0)
    ranges = [(match.start(), match.end() - 1) for match in matches]
    return _complement(ranges) if "NOT" in name else ranges


def _utf8_ranges(low: int, high: int) -> Iterable[list[tuple[int, int]]]:
    """The UTF-8 encodings of a range of code points, as sequences of byte ranges. Surrogates are skipped."""
    for first, last in ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, _MAX_CODE_POINT)):
        begin, end = max(low, first), min(high, last)
        if begin <= end:
            yield from _byte_ranges(list(chr(begin).encode()), list(chr(end).encode()))


def _byte_ranges(low: list[int], high: list[int]) -> Iterable[list[tuple[int, int]]]:
    """The encodings from `low` to `high`, which have the same length, as sequences of byte ranges."""
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
