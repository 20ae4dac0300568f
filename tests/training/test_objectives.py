"""Causal targets, losses, padding and document masks are correct, and custom objectives can be registered."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from tiny import PRESETS, causal_batch, ids, model
from torch import Tensor

from tinylm.data.batch import IGNORE_INDEX
from tinylm.model.transformer import Transformer
from tinylm.recipe import loads
from tinylm.recipe.schema import CausalLMObjective, ObjectiveVariant
from tinylm.training import objectives
from tinylm.training.objectives import CausalLM

OBJECTIVE = CausalLM()


def _losses(network: Transformer, tokens: Tensor) -> Tensor:
    return OBJECTIVE.losses(network, causal_batch(tokens))


def test_targets_are_the_inputs_shifted_by_one() -> None:
    batch = causal_batch(torch.tensor([[5, 6, 7, 8]]))
    assert batch.inputs.tolist() == [[5, 6, 7]]
    assert batch.targets.tolist() == [[6, 7, 8]]


def test_padding_becomes_a_valid_input_id_and_an_ignored_target() -> None:
    batch = causal_batch(torch.tensor([[5, 6, IGNORE_INDEX, IGNORE_INDEX]]))
    assert batch.inputs.tolist() == [[5, 6, 0]]
    assert batch.targets.tolist() == [[6, IGNORE_INDEX, IGNORE_INDEX]]


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


def test_losses_are_never_in_half_precision() -> None:
    tokens = ids(2, 8)
    assert _losses(model().bfloat16(), tokens).dtype == torch.float32
    assert _losses(model().double(), tokens).dtype == torch.float64


@pytest.mark.parametrize("overrides", [{}, {"logit_softcap": 1.5}, {"tie_embeddings": True}], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_summed_loss_and_its_gradient_match_the_individual_losses(preset: str, overrides: dict[str, object]) -> None:
    network, tokens = model(preset, n_embd=16, **overrides).double(), ids(3, 9)
    tokens[1, 4:] = IGNORE_INDEX
    batch = causal_batch(tokens)
    total = OBJECTIVE.loss_sum(network, batch)
    gradients = torch.autograd.grad(total, list(network.parameters()))
    expected = OBJECTIVE.losses(network, batch).sum()
    torch.testing.assert_close(total, expected)
    expected_gradients = torch.autograd.grad(expected, list(network.parameters()))
    torch.testing.assert_close(gradients, expected_gradients)


def test_the_summed_loss_is_never_in_half_precision() -> None:
    batch = causal_batch(ids(2, 8))
    assert OBJECTIVE.loss_sum(model().bfloat16(), batch).dtype == torch.float32
    assert OBJECTIVE.loss_sum(model().double(), batch).dtype == torch.float64


# Document masks (data.document_mask)

MODELS: list[tuple[str, dict[str, object]]] = [
    ("modern", {}),
    ("gpt2", {}),
    ("llama", {"n_kv_head": 2}),
    ("gpt2", {"position": "sinusoidal"}),
    ("llama", {"attention_window": 3}),
    ("modern", {"ngram_embeddings": [2, 3], "ngram_rows": 50, "value_embeddings": 1, "value_residual": True}),
]
LENGTHS = [(5, 1, 6), (12,), (3, 9)]
END_OF_TEXT = 0


def _documents_and_rows() -> tuple[list[Tensor], Tensor]:
    """Return documents that begin and end with an end-of-text token, and the same documents packed into rows (3, 13).

    Neighboring documents in a row share one end-of-text token.
    """
    documents, rows = [], []
    for seed, lengths in enumerate(LENGTHS):
        row = [torch.tensor([END_OF_TEXT])]
        for number, length in enumerate(lengths):
            text = ids(1, length - 1, seed=10 * seed + number)[0].clamp_min(1)
            row.append(torch.cat([text, torch.tensor([END_OF_TEXT])]))
            documents.append(torch.cat([torch.tensor([END_OF_TEXT]), row[-1]]))
        rows.append(torch.cat(row))
    return documents, torch.stack(rows)


@pytest.mark.parametrize(("preset", "overrides"), MODELS, ids=str)
def test_a_document_mask_gives_the_loss_and_gradient_of_separate_documents(preset: str, overrides: dict[str, object]) -> None:
    network = model(preset, n_embd=16, **overrides).double()
    documents, rows = _documents_and_rows()
    batch = causal_batch(rows, (rows == END_OF_TEXT).cumsum(1))
    assert batch.target_count == sum(len(document) - 1 for document in documents)
    separate = sum(OBJECTIVE.loss_sum(network, causal_batch(document[None])) for document in documents)
    total = OBJECTIVE.loss_sum(network, batch)
    torch.testing.assert_close(total, separate)
    expected = torch.autograd.grad(separate, list(network.parameters()))
    torch.testing.assert_close(torch.autograd.grad(total, list(network.parameters())), expected)
    losses = torch.cat([OBJECTIVE.losses(network, causal_batch(document[None]))[0] for document in documents])
    torch.testing.assert_close(OBJECTIVE.losses(network, batch).flatten(), losses)
    unmasked = OBJECTIVE.loss_sum(network, causal_batch(rows))
    assert abs((unmasked - total).item()) > 1e-3, "without segments, a document must attend to earlier documents"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_row_with_one_segment_equals_a_row_without_segments(preset: str) -> None:
    network, tokens = model(preset, n_embd=16).double(), ids(3, 9)
    masked = causal_batch(tokens, torch.full_like(tokens, 7))
    torch.testing.assert_close(OBJECTIVE.losses(network, masked), OBJECTIVE.losses(network, causal_batch(tokens)))


def test_document_masks_work_with_activation_checkpointing_and_n_last() -> None:
    network = model("modern", n_embd=16, value_residual=True).double()
    _, rows = _documents_and_rows()
    batch = causal_batch(rows, (rows == END_OF_TEXT).cumsum(1))
    expected = torch.autograd.grad(OBJECTIVE.loss_sum(network, batch), list(network.parameters()))
    network.recompute = True
    torch.testing.assert_close(torch.autograd.grad(OBJECTIVE.loss_sum(network, batch), list(network.parameters())), expected)
    hidden = network.hidden(batch.inputs, segments=batch.segments)
    last = network.hidden(batch.inputs, segments=batch.segments, n_last=3)
    torch.testing.assert_close(last, hidden[:, -3:])


# Custom objectives


def test_a_custom_objective_can_be_registered() -> None:
    class FirstTokenObjective(ObjectiveVariant):
        architectures = ("decoder",)
        name: Literal["first_token"] = "first_token"
        weight: int = 1

    class FirstToken(CausalLM):
        name = "first_token"

        def __init__(self, section: FirstTokenObjective) -> None:
            self.weight = section.weight

    objectives.register(FirstTokenObjective, FirstToken)
    try:
        recipe = loads(
            "data: {train: my.txt}\ntraining: {steps: 10}\nobjective: {name: first_token, weight: 3}\n", check_files=False
        )
        built = objectives.build(recipe.objective)
        assert (built.name, built.weight) == ("first_token", 3)  # type: ignore[attr-defined]
    finally:
        objectives.unregister(FirstTokenObjective)
    assert isinstance(objectives.build(CausalLMObjective()), CausalLM)
