"""Stop strings in a stream are found at the same positions as in the whole text."""

from __future__ import annotations

import random

import pytest

from tinylm.errors import InputError
from tinylm.generation.sampling import MAX_STOP_LENGTH, MAX_STOPS, SamplingOptions
from tinylm.generation.stops import StopMatcher


def _naive_partial_length(text: str, stops: list[str]) -> int:
    return max(size for stop in stops for size in range(len(stop) + 1) if text.endswith(stop[:size]))


def test_full_and_partial_matches_equal_those_of_a_naive_search() -> None:
    generator = random.Random(0)
    found = 0
    for _ in range(300):
        stops = ["".join(generator.choices("ab", k=generator.randint(1, 5))) for _ in range(generator.randint(1, 4))]
        matcher, text = StopMatcher(stops), ""
        for _ in range(10):
            piece = "".join(generator.choices("abc", k=generator.randint(0, 3)))
            before, text = text, text + piece
            positions = [text.find(stop, max(0, len(before) - len(stop) + 1)) for stop in stops]
            start = matcher.push(piece)
            assert start == min((position for position in positions if position >= 0), default=None), (stops, text)
            if start is not None:
                found += 1
                break
            assert matcher.partial_length == _naive_partial_length(text, stops), (stops, text)
    assert 100 < found < 300


def test_a_long_stop_string_is_found_after_many_near_matches() -> None:
    matcher = StopMatcher(["a" * 999 + "b"])
    assert matcher.push("a" * 100_000) is None
    assert matcher.partial_length == 999
    assert matcher.push("b") == 100_000 - 999


def test_the_number_and_length_of_stop_strings_are_limited() -> None:
    SamplingOptions(stop=("x" * MAX_STOP_LENGTH,) * MAX_STOPS)
    for stop in (("x",) * (MAX_STOPS + 1), ("x" * (MAX_STOP_LENGTH + 1),)):
        with pytest.raises(InputError, match="--stop"):
            SamplingOptions(stop=stop)
