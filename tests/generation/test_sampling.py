"""Test penalties and sampling filters with distributions that are small enough to compute by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.generation.sampling import SamplingOptions, apply_penalties, choose, distribution

PROBABILITIES = [0.05, 0.4, 0.1, 0.15, 0.3]


def _logits(probabilities: list[float] = PROBABILITIES, rows: int = 1) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log().float().repeat(rows, 1)


def _options(**options: Any) -> SamplingOptions:
    return SamplingOptions(**{"temperature": 1.0, "top_k": None, **options})


def _full_distribution(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Return the distribution over the vocabulary, ordered by id."""
    probabilities, ids = distribution(logits, options)
    return probabilities if ids is None else torch.zeros_like(logits).scatter(1, ids, probabilities)


def _kept(**options: Any) -> list[float]:
    return _full_distribution(_logits(), _options(**options))[0].tolist()


def _renormalized(*kept: int) -> list[float]:
    total = sum(PROBABILITIES[index] for index in kept)
    return [value / total if index in kept else 0.0 for index, value in enumerate(PROBABILITIES)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBABILITIES),
        ({"top_k": 1}, _renormalized(1)),
        ({"top_k": 2}, _renormalized(1, 4)),
        ({"top_k": 5}, PROBABILITIES),
        ({"top_k": 99}, PROBABILITIES),
        ({"top_p": 0.39}, _renormalized(1)),
        ({"top_p": 0.41}, _renormalized(1, 4)),
        ({"top_p": 0.69}, _renormalized(1, 4)),
        ({"top_p": 0.71}, _renormalized(1, 3, 4)),
        ({"top_p": 1.0}, PROBABILITIES),
        ({"top_p": 1e-9}, _renormalized(1)),
        ({"min_p": 0.0}, PROBABILITIES),
        ({"min_p": 0.3}, _renormalized(1, 3, 4)),
        ({"min_p": 0.5}, _renormalized(1, 4)),
        ({"min_p": 1.0}, _renormalized(1)),
        ({"top_k": 4, "top_p": 0.8, "min_p": 0.5}, _renormalized(1, 4)),
        ({"top_k": 2, "top_p": 0.6}, _renormalized(1, 4)),  # after top-k, the first token has probability 0.57, so top-p keeps both
        ({"top_k": 2, "top_p": 0.5}, _renormalized(1)),
    ],
    ids=str,
)
def test_filters_match_their_definitions(options: dict[str, Any], expected: list[float]) -> None:
    assert _kept(**options) == pytest.approx(expected, abs=1e-6)


def test_temperature_raises_probabilities_to_a_power() -> None:
    for temperature in (0.5, 2.0):
        powers = [value ** (1 / temperature) for value in PROBABILITIES]
        assert _kept(temperature=temperature) == pytest.approx([power / sum(powers) for power in powers], abs=1e-6)


def test_a_tiny_temperature_does_not_overflow() -> None:
    assert _kept(temperature=1e-30) == pytest.approx([0, 1, 0, 0, 0], abs=1e-6)


def test_rows_are_filtered_independently() -> None:
    logits = torch.cat([_logits(), _logits([0.9, 0.025, 0.025, 0.025, 0.025])])
    kept = _full_distribution(logits, _options(top_p=0.7, min_p=0.1))
    assert (kept > 0).tolist() == [[False, True, False, False, True], [True, False, False, False, False]]


def test_the_repetition_penalty_divides_positive_logits_and_multiplies_negative_logits() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, -3.0]])
    seen, counts = torch.tensor([[True, True, False, False]]), torch.zeros(1, 4)
    assert apply_penalties(logits, seen, counts, _options(repetition_penalty=2.0)).tolist() == [[1.0, -2.0, 0.5, -3.0]]
    assert apply_penalties(logits, seen, counts, _options(repetition_penalty=0.5)).tolist() == [[4.0, -0.5, 0.5, -3.0]]
    assert apply_penalties(logits, seen, counts, _options()) is logits


def test_the_frequency_penalty_applies_per_occurrence_and_the_presence_penalty_once() -> None:
    logits, counts = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[3.0, 1.0, 0.0]])
    seen = torch.ones(1, 3, dtype=torch.bool)
    assert apply_penalties(logits, seen, counts, _options(frequency_penalty=0.5)).tolist() == [[0.5, -1.5, 0.5]]
    assert apply_penalties(logits, seen, counts, _options(presence_penalty=0.5)).tolist() == [[1.5, -1.5, 0.5]]
    assert apply_penalties(logits, seen, counts, _options(frequency_penalty=-1.0)).tolist() == [[5.0, 0.0, 0.5]]


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_p": 0.999}, {"min_p": 0.01}, {"min_p": 1e-6, "top_p": 0.99999}], ids=str)
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_sorting_only_candidates_equals_sorting_the_vocabulary(options: dict[str, Any], spread: float) -> None:
    logits = spread * torch.randn(3, 5000, generator=torch.Generator().manual_seed(2))
    probabilities = logits.double().softmax(-1)
    ordered, order = probabilities.sort(descending=True)
    kept = (ordered.cumsum(-1) - ordered < options.get("top_p", 2.0)) & (ordered >= options.get("min_p", 0.0) * ordered[:, :1])
    expected = torch.zeros_like(probabilities).scatter(1, order, ordered * kept)
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(_full_distribution(logits, _options(**options)).double(), expected, atol=1e-4, rtol=0)


def _uniforms(rows: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, range(5)), ({"top_k": 3}, (1, 3, 4)), ({"top_p": 0.6}, (1, 4)), ({"temperature": 0.5}, range(5))],
    ids=str,
)
def test_sampled_frequencies_fit_the_distribution(options: dict[str, Any], kept: Any) -> None:
    """Apply Pearson's chi-square test. The limits are the 99.9% quantiles for 1, 2 and 4 degrees of freedom."""
    draws = 6000
    chosen = choose(_logits(rows=draws), _options(**options), _uniforms(draws))
    counts = torch.bincount(chosen, minlength=5).tolist()
    powers = [value ** (1 / options.get("temperature", 1.0)) for value in PROBABILITIES]
    total = sum(powers[index] for index in kept)
    assert sum(counts[index] for index in kept) == draws  # no filtered token was chosen
    squares = sum((counts[i] - draws * powers[i] / total) ** 2 / (draws * powers[i] / total) for i in kept)
    assert squares < {1: 10.83, 2: 13.82, 4: 18.47}[len(kept) - 1]


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_extreme_random_numbers_choose_a_token_with_positive_probability(options: dict[str, Any], uniform: float) -> None:
    [chosen] = choose(_logits([0.0, 0.5, 0.5, 0.0]), _options(**options), torch.tensor([uniform], dtype=torch.float64)).tolist()
    assert chosen in (1, 2)


def test_temperature_zero_selects_the_most_likely_token() -> None:
    assert choose(_logits(), _options(temperature=0.0, top_k=3, top_p=0.1), None).tolist() == [1]


def test_rows_are_sampled_independently_of_the_batch() -> None:
    rows, uniforms = torch.randn(4, 50, generator=torch.Generator().manual_seed(9)), _uniforms(4)
    batched = choose(rows, _options(), uniforms)
    single = [int(choose(rows[row : row + 1], _options(), uniforms[row : row + 1])) for row in range(4)]
    assert batched.tolist() == single


@pytest.mark.parametrize(
    ("options", "option"),
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
        ({"frequency_penalty": math.nan}, "--frequency-penalty"),
        ({"presence_penalty": math.inf}, "--presence-penalty"),
        ({"logprobs": 21}, "--logprobs"),
        ({"logit_bias": ((3, math.inf),)}, "--logit-bias"),
        ({"logit_bias": ((3, math.nan),)}, "--logit-bias"),
        ({"forced": (1, 2), "max_new_tokens": 1}, "--force"),
    ],
    ids=str,
)
def test_the_error_for_a_value_out_of_range_names_the_option(options: dict[str, Any], option: str) -> None:
    with pytest.raises(InputError) as caught:
        SamplingOptions(**options)
    assert caught.value.where == option
    assert caught.value.exit_code == 2
