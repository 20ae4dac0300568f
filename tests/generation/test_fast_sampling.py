"""Compiled drawing chooses what the definition of the filters chooses, number for number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tinylm.generation import fast_sampling, sampling
from tinylm.generation.sampling import SamplingOptions


@pytest.mark.parametrize("vocabulary", [1, 5, 61, 4000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1e-30, "top_k": 5},
        {"temperature": 3.0, "top_k": 3999},
        {"top_k": 10**6},
        {"temperature": 0.0},
        {"top_k": None},
        {"top_p": 0.7},
        {"min_p": 0.1},
    ],
    ids=str,
)
def test_the_same_numbers_choose_the_same_tokens(vocabulary: int, options: dict[str, Any]) -> None:
    chosen_so, generator = SamplingOptions(**options), torch.Generator().manual_seed(0)
    logits = torch.randn((300, vocabulary), generator=generator) * 3
    logits[::3, ::2] = float("-inf")
    logits[:, -1] = 0.5
    drawn = torch.rand(300, generator=generator, dtype=torch.float64)
    drawn[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert torch.equal(fast_sampling.choose(logits, chosen_so, drawn), sampling.choose(logits, chosen_so, drawn))


def test_of_equal_logits_each_comes_as_often_and_what_is_banned_never() -> None:
    logits = torch.full((8000, 8), 2.0)
    logits[:, 3] = float("-inf")
    drawn = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    chosen = fast_sampling.choose(logits, SamplingOptions(top_k=8), drawn)
    counts = torch.bincount(chosen, minlength=8)
    assert counts[3] == 0
    assert counts[counts > 0].tolist() == pytest.approx([8000 / 7] * 7, abs=1.1)
