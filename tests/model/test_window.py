"""The window network matches the equation in Bengio et al. (2003) and never reads across document boundaries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import VOCAB_SIZE, ids
from torch import Tensor

from tinylm.model import registry
from tinylm.model.window import WindowNetwork
from tinylm.recipe.fixed_context import FeedForwardSection

WINDOW = 3
INPUTS: list[dict[str, Any]] = [
    {},
    {"direct": True},
    {"input": "one_hot"},
    {"input": "number"},
    {"input": "number", "direct": True},
]


def network(**keys: Any) -> WindowNetwork:
    sizes = {"window": WINDOW, "n_hidden": 10, "context_length": 16}
    built = registry.build(FeedForwardSection.model_validate({**sizes, **keys}), VOCAB_SIZE, 3)
    assert isinstance(built, WindowNetwork)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return built.eval()


def logits_of(ours: WindowNetwork, window: list[int]) -> Tensor:
    """Compute b + W x + U tanh(d + H x) for the ids in one window. The id `VOCAB_SIZE` marks a position without a token."""
    if ours.model.input == "one_hot":
        x = torch.cat([F.one_hot(torch.tensor(id), VOCAB_SIZE + 1).float() for id in window])
    elif ours.model.input == "number":
        x = torch.tensor([0.0 if id == VOCAB_SIZE else 2 * id / (VOCAB_SIZE - 1) - 1 for id in window])
    else:
        assert ours.embedding is not None
        x = torch.cat([ours.embedding.weight[id] for id in window])
    hidden = torch.tanh(ours.input.weight @ x + ours.input.bias)
    return ours.head.weight @ (torch.cat((hidden, x)) if ours.model.direct else hidden) + ours.head.bias


@pytest.mark.parametrize("keys", INPUTS, ids=str)
def test_logits_and_loss_match_the_equation(keys: dict[str, Any]) -> None:
    ours, tokens = network(**keys), ids(2, 7)
    rows = [[VOCAB_SIZE, VOCAB_SIZE, *row] for row in tokens.tolist()]
    expected = torch.stack([torch.stack([logits_of(ours, row[i : i + WINDOW]) for i in range(7)]) for row in rows])
    torch.testing.assert_close(ours(tokens), expected)
    targets = tokens.roll(-1, dims=1)
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(ours(tokens, targets=targets), loss)


def test_tokens_from_other_documents_count_as_missing() -> None:
    ours, tokens = network(), ids(1, 6)
    both = ours(tokens, segments=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    torch.testing.assert_close(both, torch.cat((ours(tokens[:, :3]), ours(tokens[:, 3:])), dim=1))


@pytest.mark.parametrize("window", [1, 2, 5])
def test_the_state_contains_the_last_tokens(window: int) -> None:
    ours, tokens = network(window=window), ids(2, 9)
    state, pieces = ours.empty_state(2), []
    for start, end in ((0, 2), (2, 3), (3, 9)):
        hidden, state = ours.continue_from(tokens[:, start:end], state)
        pieces.append(hidden)
    torch.testing.assert_close(torch.cat(pieces, dim=1), ours.hidden(tokens))
    assert state.shape == (2, window - 1)
