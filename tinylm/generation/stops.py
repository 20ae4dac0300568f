"""Find stop strings in a stream of text in linear time (Aho and Corasick 1975)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """An automaton whose state is the longest suffix of the text that is a prefix of a stop string. State 0 is the empty suffix."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match = [0]  # for each state, the length of the longest stop string that ends there
        for stop in stops:
            state = 0
            for character in stop:
                if character not in self._next[state]:
                    self._next[state][character] = len(self._next)
                    self._next.append({})
                    self._depth.append(self._depth[state] + 1)
                    self._match.append(0)
                state = self._next[state][character]
            self._match[state] = len(stop)
        self._fallback = self._fallbacks()
        self._state, self._length = 0, 0

    def _fallbacks(self) -> list[int]:
        """Return, for each state, the state of its longest proper suffix that is a prefix of a stop string."""
        fallback = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            self._match[state] = max(self._match[state], self._match[fallback[state]])
            for character, child in self._next[state].items():
                fallback[child] = self._after(fallback[state], character, fallback)
                queue.append(child)
        return fallback

    def _after(self, state: int, character: str, fallback: Sequence[int]) -> int:
        while state and character not in self._next[state]:
            state = fallback[state]
        return self._next[state].get(character, 0)

    def push(self, text: str) -> int | None:
        """Append a piece of text, and look for stop strings that end in this piece.

        Returns the smallest start of these stop strings, counted from the beginning of the stream, or None if there are none.
        """
        starts = []
        for character in text:
            self._state = self._after(self._state, character, self._fallback)
            self._length += 1
            if match := self._match[self._state]:
                starts.append(self._length - match)
        return min(starts, default=None)

    @property
    def partial_length(self) -> int:
        """The length of the longest suffix of the text that is a prefix of a stop string."""
        return self._depth[self._state]
