"""Test that the numba kernel chooses the same tokens as `sampling.choose` for the same random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tinylm.generation import fast_sampling, sampling
from tinylm.generation.sampling import SamplingOptions


@pytest.mark.parametrize("vocab_size", [1, 5, 61, 4000])
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
def test_the_kernel_chooses_the_same_tokens_as_the_tensor_implementation(vocab_size: int, options: dict[str, Any]) -> None:
    sampling_options, generator = SamplingOptions(**options), torch.Generator().manual_seed(0)
    logits = torch.randn((300, vocab_size), generator=generator) * 3
    logits[::3, ::2] = float("-inf")
    logits[:, -1] = 0.5
    uniforms = torch.rand(300, generator=generator, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert torch.equal(
        fast_sampling.choose(logits, sampling_options, uniforms), sampling.choose(logits, sampling_options, uniforms)
    )


def test_equal_logits_are_equally_frequent_and_banned_tokens_never_occur() -> None:
    logits = torch.full((8000, 8), 2.0)
    logits[:, 3] = float("-inf")
    uniforms = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    chosen = fast_sampling.choose(logits, SamplingOptions(top_k=8), uniforms)
    counts = torch.bincount(chosen, minlength=8)
    assert counts[3] == 0
    assert counts[counts > 0].tolist() == pytest.approx([8000 / 7] * 7, abs=1.1)
