"""The causal objective: which targets, which losses, what padding does."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import PRESETS, ids, model
from torch import Tensor

from tinylm.model.objective import IGNORED, CausalObjective
from tinylm.model.transformer import Transformer

OBJECTIVE = CausalObjective()


def _losses(network: Transformer, tokens: Tensor) -> Tensor:
    return OBJECTIVE.losses(network, OBJECTIVE.example(tokens))


def test_targets_are_the_inputs_moved_by_one() -> None:
    example = OBJECTIVE.example(torch.tensor([[5, 6, 7, 8]]))
    assert example.inputs.tolist() == [[5, 6, 7]]
    assert example.targets.tolist() == [[6, 7, 8]]


def test_padding_is_read_as_some_token_and_never_a_target() -> None:
    example = OBJECTIVE.example(torch.tensor([[5, 6, IGNORED, IGNORED]]))
    assert example.inputs.tolist() == [[5, 6, 0]]
    assert example.targets.tolist() == [[6, IGNORED, IGNORED]]


def test_each_loss_is_minus_the_log_of_the_targets_probability() -> None:
    network, tokens = model(), ids(2, 8)
    losses = _losses(network, tokens)
    probabilities = network(tokens[:, :-1]).double().softmax(dim=-1)
    for row in range(2):
        for t in range(7):
            expected = -math.log(probabilities[row, t, tokens[row, t + 1]].item())
            assert abs(losses[row, t].item() - expected) < 1e-5


def test_padding_costs_nothing_and_changes_nothing_before_it() -> None:
    network, tokens = model(), ids(2, 8)
    padded = tokens.clone()
    padded[1, 5:] = IGNORED
    whole, short = _losses(network, tokens), _losses(network, padded)
    assert short[1, 4:].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(short[1, :4], whole[1, :4])
    torch.testing.assert_close(short[0], whole[0])


def test_losses_are_float32_whatever_the_logits_are() -> None:
    tokens = ids(2, 8)
    assert _losses(model().bfloat16(), tokens).dtype == torch.float32
    assert _losses(model().double(), tokens).dtype == torch.float64


@pytest.mark.parametrize("parts", [{}, {"logit_softcap": 1.5}, {"tie_embeddings": True}], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_summed_loss_is_the_sum_of_the_losses_and_so_is_its_gradient(preset: str, parts: dict[str, object]) -> None:
    network, tokens = model(preset, n_embd=16, **parts).double(), ids(3, 9)
    tokens[1, 4:] = IGNORED
    example = OBJECTIVE.example(tokens)
    total = OBJECTIVE.summed_loss(network, example)
    gradients = torch.autograd.grad(total, list(network.parameters()))
    expected = OBJECTIVE.losses(network, example).sum()
    torch.testing.assert_close(total, expected)
    for one, two in zip(gradients, torch.autograd.grad(expected, list(network.parameters())), strict=True):
        torch.testing.assert_close(one, two)


def test_the_summed_loss_is_float32_whatever_the_weights_are() -> None:
    example = OBJECTIVE.example(ids(2, 8))
    assert OBJECTIVE.summed_loss(model().bfloat16(), example).dtype == torch.float32
    assert OBJECTIVE.summed_loss(model().double(), example).dtype == torch.float64
