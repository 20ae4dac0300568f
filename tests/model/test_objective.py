"""The causal objective: targets, losses and padding."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import PRESETS, ids, model
from torch import Tensor

from tinylm.model.objective import IGNORE_INDEX, CausalObjective
from tinylm.model.transformer import Transformer

OBJECTIVE = CausalObjective()


def _losses(network: Transformer, tokens: Tensor) -> Tensor:
    return OBJECTIVE.losses(network, OBJECTIVE.example(tokens))


def test_targets_are_the_inputs_shifted_by_one() -> None:
    example = OBJECTIVE.example(torch.tensor([[5, 6, 7, 8]]))
    assert example.inputs.tolist() == [[5, 6, 7]]
    assert example.targets.tolist() == [[6, 7, 8]]


def test_padding_is_a_valid_input_id_and_an_ignored_target() -> None:
    example = OBJECTIVE.example(torch.tensor([[5, 6, IGNORE_INDEX, IGNORE_INDEX]]))
    assert example.inputs.tolist() == [[5, 6, 0]]
    assert example.targets.tolist() == [[6, IGNORE_INDEX, IGNORE_INDEX]]


def test_each_loss_is_the_negative_log_probability_of_its_target() -> None:
    network, tokens = model(), ids(2, 8)
    losses = _losses(network, tokens)
    probabilities = network(tokens[:, :-1]).double().softmax(dim=-1)
    for row in range(2):
        for t in range(7):
            expected = -math.log(probabilities[row, t, tokens[row, t + 1]].item())
            assert abs(losses[row, t].item() - expected) < 1e-5


def test_padding_has_zero_loss_and_does_not_change_earlier_losses() -> None:
    network, tokens = model(), ids(2, 8)
    padded = tokens.clone()
    padded[1, 5:] = IGNORE_INDEX
    full, short = _losses(network, tokens), _losses(network, padded)
    assert short[1, 4:].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(short[1, :4], full[1, :4])
    torch.testing.assert_close(short[0], full[0])


def test_losses_are_at_least_float32() -> None:
    tokens = ids(2, 8)
    assert _losses(model().bfloat16(), tokens).dtype == torch.float32
    assert _losses(model().double(), tokens).dtype == torch.float64


@pytest.mark.parametrize("overrides", [{}, {"logit_softcap": 1.5}, {"tie_embeddings": True}], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_summed_loss_and_its_gradient_equal_those_of_the_sum_of_losses(preset: str, overrides: dict[str, object]) -> None:
    network, tokens = model(preset, n_embd=16, **overrides).double(), ids(3, 9)
    tokens[1, 4:] = IGNORE_INDEX
    example = OBJECTIVE.example(tokens)
    total = OBJECTIVE.summed_loss(network, example)
    gradients = torch.autograd.grad(total, list(network.parameters()))
    expected = OBJECTIVE.losses(network, example).sum()
    torch.testing.assert_close(total, expected)
    expected_gradients = torch.autograd.grad(expected, list(network.parameters()))
    torch.testing.assert_close(gradients, expected_gradients)


def test_the_summed_loss_is_at_least_float32() -> None:
    example = OBJECTIVE.example(ids(2, 8))
    assert OBJECTIVE.summed_loss(model().bfloat16(), example).dtype == torch.float32
    assert OBJECTIVE.summed_loss(model().double(), example).dtype == torch.float64
