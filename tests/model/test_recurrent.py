"""Recurrent networks match `torch.nn.RNN`, `LSTM` and `GRU`, and they carry their state from one piece of text to the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import VOCAB_SIZE, ids
from torch import nn

from tinylm.data.batch import Batch
from tinylm.model import registry
from tinylm.model.decoder import make_decoder
from tinylm.model.recurrent import Recurrent
from tinylm.recipe.recurrent import GruSection, LstmSection, RecurrentSection, RnnSection
from tinylm.reporting import SILENT
from tinylm.training.objectives import CausalLM

WIDTH, LAYERS = 24, 2
SECTIONS: dict[str, type[RecurrentSection]] = {"rnn": RnnSection, "lstm": LstmSection, "gru": GruSection}


def network(kind: str, **keys: Any) -> Recurrent:
    sizes = {"n_layer": LAYERS, "n_embd": WIDTH, "context_length": 16, "burn_in": 4}
    built = registry.build(SECTIONS[kind].model_validate({**sizes, **keys}), VOCAB_SIZE, 3)
    assert isinstance(built, Recurrent)
    with torch.no_grad():  # a head near zero would hide errors
        built.head.weight.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
    return built.eval()


def torch_layers(ours: Recurrent) -> nn.RNNBase:
    """Return a `torch.nn` module with the same layers and weights."""
    arguments: dict[str, Any] = {"num_layers": LAYERS, "batch_first": True}
    if isinstance(ours.model, RnnSection):
        theirs: nn.RNNBase = nn.RNN(WIDTH, WIDTH, nonlinearity=ours.model.activation, **arguments)
    else:
        theirs = (nn.LSTM if isinstance(ours.model, LstmSection) else nn.GRU)(WIDTH, WIDTH, **arguments)
    weights = ours.state_dict()
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    theirs.load_state_dict({f"{name}_l{i}": weights[f"layers.{i}.{name}"] for i in range(LAYERS) for name in names})
    return theirs


@pytest.mark.parametrize(("kind", "keys"), [("rnn", {}), ("rnn", {"activation": "relu"}), ("lstm", {}), ("gru", {})])
def test_loss_and_gradients_match_torch(kind: str, keys: dict[str, Any]) -> None:
    ours = network(kind, **keys)
    theirs, tokens = torch_layers(ours), ids(3, 13)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    embedding, head = (layer.weight.detach().clone().requires_grad_() for layer in (ours.embedding, ours.head))
    outputs, _ = theirs(embedding[inputs])
    expected = F.cross_entropy((outputs @ head.T).flatten(0, 1), targets.flatten(), reduction="sum")
    expected.backward()
    loss = ours(inputs, targets=targets)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    gradients = {"embedding.weight": embedding.grad, "head.weight": head.grad}
    for name, parameter in theirs.named_parameters():
        kind_of_weight, _, layer = name.rpartition("_l")
        gradients[f"layers.{layer}.{kind_of_weight}"] = parameter.grad
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients.pop(name), rtol=1e-4, atol=1e-5)
    assert not gradients


@pytest.mark.parametrize(("kind", "keys"), [("rnn", {}), ("rnn", {"activation": "relu"}), ("lstm", {}), ("gru", {})])
def test_compiled_steps_match_torch_for_rows_of_different_lengths(kind: str, keys: dict[str, Any]) -> None:
    ours, tokens = network(kind, **keys), ids(3, 9)
    compiled = make_decoder(ours, weights="fp32", compiled=True, steps=None, reporter=SILENT)
    assert compiled.uses_numba
    plain_state, state = ours.new_state(3), compiled.new_state(3)
    for row in range(3):
        prompt = tokens[row, : row + 1].tolist()
        assert torch.equal(compiled.prefill(state, row, prompt), ours.prefill(plain_state, row, prompt))
    for position in range(3, 9):
        if position == 6:
            for changed_state in (plain_state, state):
                changed_state.reorder([2], [0])
                changed_state.resize(2)
                changed_state.resize(3)
        logits = compiled.step(state, tokens[:, position])
        torch.testing.assert_close(logits, ours.step(plain_state, tokens[:, position]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.values, plain_state.values, rtol=1e-4, atol=1e-5)
    assert list(state.lengths) == list(plain_state.lengths)


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_text_read_in_pieces_has_the_same_hidden_states_as_the_whole_text(kind: str) -> None:
    ours, tokens = network(kind), ids(3, 20)
    whole = ours.hidden(tokens)
    state, pieces = ours.empty_state(3), []
    for start, end in ((0, 1), (1, 8), (8, 20)):
        hidden, state = ours.continue_from(tokens[:, start:end], state)
        pieces.append(hidden)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    assert state.shape == ours.empty_state(3).shape
    torch.testing.assert_close(ours.hidden(tokens, n_last=5), whole[:, -5:])


def test_the_burn_in_computes_the_first_state_without_a_gradient() -> None:
    ours, tokens = network("lstm"), ids(2, 16)
    targets = tokens.roll(-1, dims=1)
    targets[:, :4] = -100
    ours.train()
    loss = CausalLM().loss_sum(ours, Batch(tokens, targets))
    ours.eval()
    torch.testing.assert_close(loss, CausalLM().loss_sum(ours, Batch(tokens, targets)))
    loss.backward()
    burn_in_only = set(tokens[:, :4].flatten().tolist()) - set(tokens[:, 4:].flatten().tolist())
    assert ours.embedding.weight.grad is not None
    changed = {int(row) for row in ours.embedding.weight.grad.any(dim=1).nonzero()}
    assert burn_in_only
    assert changed == set(tokens[:, 4:].flatten().tolist())


def test_variational_dropout_uses_the_same_mask_at_all_positions() -> None:
    ours, tokens = network("gru", dropout=0.5, burn_in=0), ids(2, 9)
    ours.train()
    torch.manual_seed(0)
    zero = ours.hidden(tokens) == 0
    assert (zero == zero[:, :1]).all()
    assert 0.2 < zero.float().mean() < 0.8


def test_weight_drop_is_active_only_in_training_mode() -> None:
    ours, plain, tokens = network("lstm", weight_drop=0.5), network("lstm"), ids(2, 9)
    torch.testing.assert_close(ours.hidden(tokens), plain.hidden(tokens))
    ours.train()
    torch.manual_seed(0)
    dropped = ours.layers[0].dropped_weight()  # type: ignore[operator]
    dropped_fraction = float((dropped == 0).float().mean())
    assert dropped_fraction == pytest.approx(0.5, abs=0.05)
    assert not torch.allclose(ours.hidden(tokens), plain.hidden(tokens))


def test_tied_weights_are_stored_once() -> None:
    ours = network("gru", tie_embeddings=True)
    assert ours.head.weight is ours.embedding.weight
    stored = ours.stored_weights()
    assert "head.weight" not in stored
    other = registry.build(ours.model, VOCAB_SIZE, 9)
    other.load_stored_weights(stored)
    torch.testing.assert_close(other(ids(1, 4)), ours(ids(1, 4)))


def test_segments_are_rejected() -> None:
    with pytest.raises(ValueError, match="do not support segments"):
        network("rnn").hidden(ids(1, 4), segments=torch.zeros(1, 4, dtype=torch.long))
