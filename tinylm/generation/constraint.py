"""Constrained generation: a regular expression or a list of choices, compiled to a finite automaton over the model's tokens.

The expression uses Python's syntax and is compiled to a deterministic finite automaton (DFA) over UTF-8 bytes. Running every token
in the vocabulary through the DFA yields the tokens allowed in each state and the number of tokens that the shortest match still
requires. The model can therefore split its text into tokens in any way, even within a character, and its output always matches
within the token limit.

Legend: `S` states, `V` vocabulary.
"""

from __future__ import annotations

import re
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.generation.automaton import CompileBudget, byte_dfa
from tinylm.tokenizer import Tokenizer

_UNREACHABLE = np.iinfo(np.int32).max
_CACHED_STATES = 16
_TRANSITIONS_PER_WORK = 200
"""Number of transitions that take about as long to compute as one unit of work in a `CompileBudget`."""


@dataclass(frozen=True)
class _Transitions:
    """The transitions from one state: ids `(N,)` in ascending order, target states `(N,)`, and the ids on the logits' device."""

    ids: np.ndarray
    targets: np.ndarray
    tensor: Tensor


class Constraint:
    """A DFA over token ids that accepts the texts that match a pattern. State 0 is the initial state.

    Error messages refer to the command line option `name`. Raises `InputError` if the pattern is invalid, not supported or too
    large, if the deadline of `budget` has passed, or if the vocabulary cannot express any text that matches.
    """

    def __init__(self, pattern: str, tokenizer: Tokenizer, *, name: str = "--regex", budget: CompileBudget | None = None) -> None:
        self.name = name
        self._end_of_text = tokenizer.end_of_text
        budget = budget or CompileBudget(name)
        table, self._accepting = byte_dfa(pattern, budget)
        self._tokens = _TokenTransitions(table, tokenizer)
        self._distances, self._continues = _distances(self._tokens, self._accepting, budget)
        if self._distances[0] == _UNREACHABLE:
            raise InputError("the model's vocabulary cannot express any text that matches", where=name)
        self._cache: OrderedDict[int, _Transitions] = OrderedDict()  # transitions from the most recently used states

    @classmethod
    def choices(cls, texts: Sequence[str], tokenizer: Tokenizer, *, budget: CompileBudget | None = None) -> Constraint:
        """Return a constraint that accepts exactly these texts. Raises `InputError` if one of them is empty."""
        if any(not text for text in texts):
            raise InputError("must not be empty", where="--choice")
        return cls("|".join(map(re.escape, texts)), tokenizer, name="--choice", budget=budget)

    @property
    def nbytes(self) -> int:
        """Size of the automaton and of the cached transitions in bytes."""
        arrays = [self._accepting, self._distances, self._continues]
        for transitions in list(self._cache.values()):  # a copy, because another thread may be generating
            arrays += [transitions.ids, transitions.targets]
        return self._tokens.nbytes + sum(array.nbytes for array in arrays)

    @property
    def min_tokens(self) -> int:
        """Number of tokens in the shortest match."""
        return int(self._distances[0])

    def check_max_new_tokens(self, max_new_tokens: int) -> None:
        """Raise `InputError` if `max_new_tokens` is too small for any match."""
        if self.min_tokens > max_new_tokens:
            raise InputError(
                f"requires at least {self.min_tokens} tokens, but --max-new-tokens is {max_new_tokens}", where=self.name
            )

    def mask_logits(self, logits: Tensor, state: int, max_tokens: int) -> None:
        """Set logits `(V,)` to minus infinity in place for tokens that rule out a match within `max_tokens` tokens."""
        transitions = self._transitions(state, logits.device)
        allowed = transitions.tensor
        can_match = self._distances[transitions.targets] < max_tokens
        if not can_match.all():
            allowed = allowed[torch.from_numpy(can_match).to(allowed.device)]
        if self._accepting[state] and self._end_of_text is not None:
            allowed = torch.cat((allowed, allowed.new_tensor([self._end_of_text])))
        kept = logits[allowed]
        logits.fill_(float("-inf"))
        logits[allowed] = kept

    def next_state(self, state: int, id: int) -> int:
        """Return the state after an allowed token."""
        transitions = self._transitions(state, torch.device("cpu"))
        return int(transitions.targets[np.searchsorted(transitions.ids, id)])

    def accepts(self, state: int) -> bool:
        """Whether the text so far matches."""
        return bool(self._accepting[state])

    def is_complete(self, state: int) -> bool:
        """Whether the text matches and generation should stop: no token can follow, or there is no end-of-text token."""
        return bool(self._accepting[state]) and (self._end_of_text is None or not self._continues[state])

    def _transitions(self, state: int, device: torch.device) -> _Transitions:
        """Return the transitions from a state, except those after which no accepting state can be reached."""
        cached = self._cache.get(state)
        if cached is None:
            ids, targets = self._tokens.of_state(state)
            kept = self._distances[targets] < _UNREACHABLE
            ids, targets = ids[kept], targets[kept]
            order = np.argsort(ids)
            ids = ids[order].astype(np.int64)
            cached = self._cache[state] = _Transitions(ids, targets[order], torch.from_numpy(ids).to(device))
            if len(self._cache) > _CACHED_STATES:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(state)
        return cached


class _TokenTransitions:
    """The token transitions of a byte DFA `(S, 256)`, computed one state at a time. Storing all of them could take gigabytes.

    All tokens are run through the DFA together, one byte position at a time. They are sorted longest first, so the tokens that
    have a byte at a given position form a prefix of the sorted list.
    """

    def __init__(self, table: np.ndarray, tokenizer: Tokenizer) -> None:
        self.states = len(table)
        dead = self.states
        # Bytes that have the same transitions in every state share a column, so the table is much smaller than (S + 1, 256).
        columns, classes = np.unique(np.where(table < 0, dead, table), axis=1, return_inverse=True)
        self._next_state = np.vstack((columns, np.full(columns.shape[1], dead))).astype(np.int16)
        excluded = (tokenizer.unknown, tokenizer.end_of_text)
        token_bytes = [b"" if id in excluded else text for id, text in enumerate(tokenizer.token_bytes)]
        lengths = np.array([len(text) for text in token_bytes])
        order = np.argsort(-lengths, kind="stable")
        self._order = order[: int((lengths > 0).sum())].astype(np.int32)
        classes = classes.reshape(-1).astype(np.uint8)
        self._columns = [
            classes[[token_bytes[id][position] for id in order[: int((lengths > position).sum())]]]
            for position in range(int(lengths.max(initial=0)))
        ]
        self.work_per_state = 1 + sum(len(column) for column in self._columns) // _TRANSITIONS_PER_WORK

    @property
    def nbytes(self) -> int:
        return self._next_state.nbytes + self._order.nbytes + sum(column.nbytes for column in self._columns)

    def of_state(self, state: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids that have a transition from a state, longest tokens first, and the target state of each."""
        states = np.full(len(self._order), state, dtype=np.int16)
        for column in self._columns:
            states[: len(column)] = self._next_state[states[: len(column)], column]
        live = states != self.states
        return self._order[live], states[live]


def _distances(tokens: _TokenTransitions, accepting: np.ndarray, budget: CompileBudget) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of tokens `(S,)` from each state to the nearest accepting state, found with breadth-first search.

    Also returns a mask `(S,)` of the states from which one or more additional tokens lead to an accepting state.
    """
    predecessors: list[list[int]] = [[] for _ in range(tokens.states)]
    is_target = np.zeros(tokens.states, dtype=bool)
    for state in range(tokens.states):
        budget.spend(tokens.work_per_state)
        _, targets = tokens.of_state(state)
        is_target[targets] = True
        for target in np.flatnonzero(is_target).tolist():
            predecessors[target].append(state)
            budget.spend()
        is_target[targets] = False
    distances = np.full(tokens.states, _UNREACHABLE, dtype=np.int32)
    distances[accepting] = 0
    continues = np.zeros(tokens.states, dtype=bool)
    queue = deque(np.flatnonzero(accepting).tolist())
    while queue:
        target = queue.popleft()
        continues[predecessors[target]] = True
        for state in predecessors[target]:
            if distances[state] == _UNREACHABLE:
                distances[state] = distances[target] + 1
                queue.append(state)
    return distances, continues
