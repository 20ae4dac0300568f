"""Choosing the next token: each filter on a distribution small enough to compute by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.generation.sampling import SamplingOptions, choose, filtered, penalised

PROBABILITIES = [0.05, 0.4, 0.1, 0.15, 0.3]


def _logits(probabilities: list[float] = PROBABILITIES, rows: int = 1) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log().float().repeat(rows, 1)


def _options(**options: Any) -> SamplingOptions:
    return SamplingOptions(**{"temperature": 1.0, "top_k": None, **options})


def _kept(**options: Any) -> list[float]:
    return filtered(_logits(), _options(**options))[0].tolist()


def _over(*kept: int) -> list[float]:
    total = sum(PROBABILITIES[index] for index in kept)
    return [value / total if index in kept else 0.0 for index, value in enumerate(PROBABILITIES)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBABILITIES),
        ({"top_k": 1}, _over(1)),
        ({"top_k": 2}, _over(1, 4)),
        ({"top_k": 5}, PROBABILITIES),
        ({"top_k": 99}, PROBABILITIES),
        ({"top_p": 0.39}, _over(1)),
        ({"top_p": 0.41}, _over(1, 4)),
        ({"top_p": 0.69}, _over(1, 4)),
        ({"top_p": 0.71}, _over(1, 3, 4)),
        ({"top_p": 1.0}, PROBABILITIES),
        ({"top_p": 1e-9}, _over(1)),
        ({"min_p": 0.0}, PROBABILITIES),
        ({"min_p": 0.3}, _over(1, 3, 4)),
        ({"min_p": 0.5}, _over(1, 4)),
        ({"min_p": 1.0}, _over(1)),
        ({"top_k": 4, "top_p": 0.8, "min_p": 0.5}, _over(1, 4)),
        ({"top_k": 2, "top_p": 0.6}, _over(1, 4)),  # of what top-k leaves, 0.57 is the first: two are needed
        ({"top_k": 2, "top_p": 0.5}, _over(1)),
    ],
    ids=str,
)
def test_filters_keep_what_their_definition_keeps(options: dict[str, Any], expected: list[float]) -> None:
    assert _kept(**options) == pytest.approx(expected, abs=1e-6)


def test_temperature_sharpens_by_power() -> None:
    for temperature in (0.5, 2.0):
        powers = [value ** (1 / temperature) for value in PROBABILITIES]
        assert _kept(temperature=temperature) == pytest.approx([power / sum(powers) for power in powers], abs=1e-6)


def test_a_tiny_temperature_is_no_overflow() -> None:
    assert _kept(temperature=1e-30) == pytest.approx([0, 1, 0, 0, 0], abs=1e-6)


def test_rows_are_filtered_each_by_itself() -> None:
    logits = torch.cat([_logits(), _logits([0.9, 0.025, 0.025, 0.025, 0.025])])
    kept = filtered(logits, _options(top_p=0.7, min_p=0.1))
    assert (kept > 0).tolist() == [[False, True, False, False, True], [True, False, False, False, False]]


def test_the_penalty_divides_what_is_positive_and_multiplies_what_is_negative() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, -3.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalised(logits, seen, 2.0).tolist() == [[1.0, -2.0, 0.5, -3.0]]
    assert penalised(logits, seen, 0.5).tolist() == [[4.0, -0.5, 0.5, -3.0]]
    assert penalised(logits, seen, 1.0) is logits


def _generators(rows: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + row) for row in range(rows)]


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, range(5)), ({"top_k": 3}, (1, 3, 4)), ({"top_p": 0.6}, (1, 4)), ({"temperature": 0.5}, range(5))],
    ids=str,
)
def test_drawn_frequencies_fit_the_distribution(options: dict[str, Any], kept: Any) -> None:
    """Pearson's chi-square; the 99.9 % points for 1 to 4 degrees of freedom are from the usual table."""
    draws = 6000
    chosen = choose(_logits(rows=draws), _options(**options), _generators(draws))
    counts = torch.bincount(chosen, minlength=5).tolist()
    powers = [value ** (1 / options.get("temperature", 1.0)) for value in PROBABILITIES]
    total = sum(powers[index] for index in kept)
    assert sum(counts[index] for index in kept) == draws  # nothing that was filtered out
    squares = sum((counts[i] - draws * powers[i] / total) ** 2 / (draws * powers[i] / total) for i in kept)
    assert squares < {1: 10.83, 2: 13.82, 4: 18.47}[len(kept) - 1]


def test_one_generator_draws_a_fresh_number_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = {int(choose(_logits(), _options(), [generator])) for _ in range(60)}
    assert drawn == {0, 1, 2, 3, 4}


def test_temperature_zero_takes_the_likeliest_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert choose(_logits(), _options(temperature=0.0, top_k=3, top_p=0.1), [generator]).tolist() == [1]
    assert torch.equal(generator.get_state(), before)


def test_a_row_draws_the_same_whatever_its_neighbors() -> None:
    rows = torch.randn(4, 50, generator=torch.Generator().manual_seed(9))
    together = choose(rows, _options(), _generators(4))
    alone = [int(choose(rows[row : row + 1], _options(), _generators(4)[row : row + 1])) for row in range(4)]
    assert together.tolist() == alone


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": -1}, "--max-new-tokens"),
        ({"temperature": -0.1}, "--temperature"),
        ({"temperature": math.inf}, "--temperature"),
        ({"temperature": math.nan}, "--temperature"),
        ({"top_k": 0}, "--top-k"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.1}, "--top-p"),
        ({"min_p": -0.1}, "--min-p"),
        ({"min_p": 1.1}, "--min-p"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty"),
        ({"repetition_penalty": math.inf}, "--repetition-penalty"),
        ({"stop": ("",)}, "--stop"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as caught:
        SamplingOptions(**options)
    assert caught.value.where == named
    assert caught.value.exit_code == 2
