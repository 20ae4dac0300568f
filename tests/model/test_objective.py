"""The causal objective: which targets, which losses, what padding does."""

from __future__ import annotations

import math

import torch
from tiny import ids, model

from tinylm.model.objective import IGNORED, CausalObjective


def test_targets_are_the_inputs_moved_by_one() -> None:
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert CausalObjective().targets(tokens).tolist() == [[6, 7, 8]]


def test_each_loss_is_minus_the_log_of_the_targets_probability() -> None:
    network, tokens = model(), ids(2, 8)
    losses = CausalObjective().losses(network, tokens)
    probabilities = network(tokens[:, :-1]).double().softmax(dim=-1)
    for row in range(2):
        for t in range(7):
            expected = -math.log(probabilities[row, t, tokens[row, t + 1]].item())
            assert abs(losses[row, t].item() - expected) < 1e-5


def test_padding_costs_nothing_and_changes_nothing_before_it() -> None:
    network, tokens = model(), ids(2, 8)
    padded = tokens.clone()
    padded[1, 5:] = IGNORED
    whole, short = CausalObjective().losses(network, tokens), CausalObjective().losses(network, padded)
    assert short[1, 4:].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(short[1, :4], whole[1, :4])
    torch.testing.assert_close(short[0], whole[0])


def test_losses_are_float32_whatever_the_logits_are() -> None:
    tokens = ids(2, 8)
    assert CausalObjective().losses(model().bfloat16(), tokens).dtype == torch.float32
    assert CausalObjective().losses(model().double(), tokens).dtype == torch.float64
