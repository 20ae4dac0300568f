"""Test that log-probabilities of tokens match values that are computed individually in Python."""

from __future__ import annotations

import math

import pytest
import torch

from tinylm.evaluation.scoring import all_logprobs, token_logprobs, token_losses, top_logprobs

LOGITS = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
IDS = torch.tensor([[0, 6, 3], [2, 2, 5]])


def reference(logits: list[float]) -> list[float]:
    total = math.fsum(math.exp(logit) for logit in logits)
    return [logit - math.log(total) for logit in logits]


def test_logprobs_equal_the_normalized_exponentials() -> None:
    logprobs = all_logprobs(LOGITS)
    assert logprobs.shape == LOGITS.shape
    for row, column in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        assert logprobs[row, column].tolist() == pytest.approx(reference(LOGITS[row, column].tolist()), abs=1e-12)


def test_token_losses_select_the_negative_logprob_of_each_target() -> None:
    losses = token_losses(LOGITS, IDS)
    assert losses.shape == IDS.shape
    for row, column in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        expected = reference(LOGITS[row, column].tolist())[IDS[row, column]]
        assert -losses[row, column].item() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(token_logprobs(LOGITS, IDS), -losses)


@pytest.mark.parametrize("ignored", [-1, -100])
def test_negative_targets_have_no_loss_and_no_gradient(ignored: int) -> None:
    targets = IDS.clone()
    targets[0, 1] = ignored
    logits = LOGITS.clone().requires_grad_()
    losses = token_losses(logits, targets)
    losses.sum().backward()
    assert losses[0, 1] == 0
    assert logits.grad is not None
    assert not logits.grad[0, 1].any()
    others = targets >= 0
    assert torch.equal(losses[others], token_losses(LOGITS, IDS)[others])


def test_targets_can_have_any_integer_type() -> None:
    assert torch.equal(token_losses(LOGITS, IDS.to(torch.int16)), token_losses(LOGITS, IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_scored_in_float32(dtype: torch.dtype) -> None:
    narrow = LOGITS.to(dtype)
    assert torch.equal(all_logprobs(narrow), all_logprobs(narrow.float()))
    assert torch.equal(token_losses(narrow, IDS), token_losses(narrow.float(), IDS))
    assert token_losses(narrow, IDS).dtype == torch.float32


def test_the_top_tokens_are_the_most_likely_tokens() -> None:
    ids, logprobs = top_logprobs(LOGITS, 3)
    expected = reference(LOGITS[1, 2].tolist())
    best = sorted(range(7), key=lambda id: -expected[id])[:3]
    assert ids[1, 2].tolist() == best
    assert logprobs[1, 2].tolist() == pytest.approx([expected[id] for id in best], abs=1e-12)
    assert top_logprobs(LOGITS, 100)[0].shape == (2, 3, 7)
    assert top_logprobs(LOGITS, 0)[0].shape == (2, 3, 0)
