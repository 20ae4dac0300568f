"""Recurrent encoder-decoders match `torch.nn.LSTM` and `GRU` with attention written out, sentence by sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairs import VOCAB_SIZE, recurrent_network
from torch import Tensor, nn

from tinylm.errors import InputError
from tinylm.model import registry
from tinylm.model.recurrent_encoder_decoder import RecurrentEncoderDecoder
from tinylm.model.sequence_to_sequence import START
from tinylm.recipe.pairs import TranslationObjective

WIDTH, LENGTHS = 32, (7, 4, 1)
VARIANTS: dict[str, dict[str, Any]] = {
    "bahdanau": {},
    "bahdanau-lstm": {"cell": "lstm", "n_layer": 2},
    "attention-backward": {"cell": "gru", "n_layer": 2, "encoder_direction": "backward"},
    "sutskever": {"preset": "sutskever"},
    "no-attention-both": {"cell": "lstm", "n_layer": 2, "attention": "none"},
    "no-attention-forward": {"cell": "gru", "encoder_direction": "forward", "attention": "none"},
}
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
each_variant = pytest.mark.parametrize("keys", VARIANTS.values(), ids=VARIANTS)


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return source ids, their segments and target ids. Padding has arbitrary ids."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(1, VOCAB_SIZE, (3, 7), generator=generator)
    target = torch.randint(1, VOCAB_SIZE, (3, 6), generator=generator)
    target[:, 0] = START
    return source, torch.where(torch.arange(7) < torch.tensor(LENGTHS)[:, None], 0, -1), target


def _weights_of(ours: RecurrentEncoderDecoder) -> dict[str, Tensor]:
    return {name: parameter.detach().clone().requires_grad_() for name, parameter in ours.named_parameters()}


def _torch_layers(ours: RecurrentEncoderDecoder, inputs: int, prefixes: list[list[str]], weights: dict[str, Tensor]) -> nn.Module:
    """Return a `torch.nn.LSTM` or `GRU` that uses our weights. `prefixes` lists the names of the layers, per direction."""
    cell = nn.LSTM if ours.model.cell == "lstm" else nn.GRU
    theirs = cell(inputs, WIDTH, len(prefixes[0]), batch_first=True, bidirectional=len(prefixes) == 2).double()
    names = {}
    for suffix, layers in zip(("", "_reverse"), prefixes, strict=False):
        for index, prefix in enumerate(layers):
            names.update({f"{name}_l{index}{suffix}": weights[f"{prefix}.{name}"] for name in WEIGHTS})
    flat = [names[name] for group in theirs._all_weights for name in group]
    theirs.__dict__["_flat_weights"] = flat
    return theirs


def _reference(ours: RecurrentEncoderDecoder, weights: dict[str, Tensor], source: Tensor, target: Tensor) -> Tensor:
    """Return the logits (T, V) for one sentence pair, computed with torch.nn's layers and loops."""
    model, layers = ours.model, range(ours.model.n_layer)
    both, has_cell = model.encoder_direction == "both", model.cell == "lstm"
    directions = ["layers", "backward_layers"] if both else ["layers"]
    encoder = _torch_layers(ours, WIDTH, [[f"encoder.{each}.{i}" for i in layers] for each in directions], weights)
    read = source.flip(0) if model.encoder_direction == "backward" else source
    outputs, final = encoder(weights["encoder.embedding.weight"][read][None])
    vectors = final if has_cell else (final,)
    states = []  # for each layer, its vectors
    for i in layers:
        state = torch.cat([vector[2 * i + direction if both else i, 0] for direction in range(1 + both) for vector in vectors])
        if both:
            state = (weights[f"encoder.bridges.{i}.weight"] @ state + weights[f"encoder.bridges.{i}.bias"]).tanh()
        states.append(state.chunk(len(vectors)))
    outputs = outputs[0].flip(0) if model.encoder_direction == "backward" else outputs[0]

    embedding = weights["decoder.embedding.weight"]
    embedded = [torch.zeros(WIDTH, dtype=embedding.dtype) if id == START else embedding[id] for id in target.tolist()]
    logits = []
    for vector in embedded:
        x, context = vector, None
        if model.attention == "additive":
            query = weights["decoder.attention.query.weight"] @ states[0][0]
            keys = outputs @ weights["decoder.attention.key.weight"].T + weights["decoder.attention.key.bias"]
            scores = torch.stack([weights["decoder.attention.score"] @ (query + key).tanh() for key in keys])
            context = sum(share * output for share, output in zip(scores.softmax(0), outputs, strict=True))
            x = torch.cat((vector, context))
        for i in layers:
            layer = _torch_layers(ours, len(x), [[f"decoder.layers.{i}"]], weights)
            initial = tuple(each[None, None] for each in states[i])
            x, new = layer(x[None, None], initial if has_cell else initial[0])
            x, states[i] = x[0, 0], tuple(each[0, 0] for each in (new if has_cell else (new,)))
        if context is not None:
            pieces = weights["decoder.readout.weight"] @ torch.cat((x, vector, context)) + weights["decoder.readout.bias"]
            x = torch.maximum(pieces[0::2], pieces[1::2])
        logits.append(weights["head.weight"] @ x)
    return torch.stack(logits)


@each_variant
def test_loss_and_gradients_match_torch(keys: dict[str, Any]) -> None:
    ours = recurrent_network(**keys).double()
    weights, (source, segments, target) = _weights_of(ours), _batch()
    targets = target.roll(-1, dims=1)
    targets[:, -1] = 0
    pairs = zip(source, LENGTHS, target, targets, strict=True)
    expected = sum(
        F.cross_entropy(_reference(ours, weights, ids[:length], inputs), labels, reduction="sum", label_smoothing=0.1)
        for ids, length, inputs, labels in pairs
    )
    assert isinstance(expected, Tensor)
    expected.backward()
    logits = ours(target, source=source, source_segments=segments)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=0.1).backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-9, atol=1e-12)
    loss = ours(target, targets=targets, source=source, source_segments=segments, label_smoothing=0.1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)  # the model computes the loss in float32


@each_variant
@torch.no_grad()
def test_logits_match_torch(keys: dict[str, Any]) -> None:
    ours = recurrent_network(**keys).double()
    weights, (source, segments, target) = _weights_of(ours), _batch()
    actual = ours(target, source=source, source_segments=segments)
    for row, length in enumerate(LENGTHS):
        expected = _reference(ours, weights, source[row, :length], target[row])
        torch.testing.assert_close(actual[row], expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_without_padding_the_logits_are_the_same() -> None:
    ours = recurrent_network()
    source, _, target = _batch()
    padded, segments = F.pad(source, (0, 5), value=3), torch.where(torch.arange(12) < 7, 0, -1).expand(3, -1)
    torch.testing.assert_close(ours(target, source=padded, source_segments=segments), ours(target, source=source))


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@torch.no_grad()
def test_attention_weights_are_in_the_order_of_the_source(direction: str) -> None:
    ours = recurrent_network(encoder_direction=direction)
    source, _, target = _batch()
    weights = ours.attention_weights(source[0], target[0])
    assert weights.shape == (1, 6, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 6))
    encoded = ours.encode(source[:1])
    assert ours.decoder.attention is not None
    _, expected = ours.decoder.attention(encoded.state[:, 0, 0], encoded)
    torch.testing.assert_close(weights[0, :1], expected)
    assert encoded.outputs is not None
    last = ours.encode(source[:1, :-1]).outputs
    assert last is not None
    reads_left_to_right = torch.allclose(encoded.outputs[:, :-1, :WIDTH], last[..., :WIDTH])
    assert reads_left_to_right == (direction != "backward")


def test_a_model_without_attention_has_no_alignment() -> None:
    source, _, target = _batch()
    with pytest.raises(InputError, match=r"no attention, so it has no alignment \(train with model.attention: additive\)"):
        recurrent_network("sutskever").attention_weights(source[0], target[0])


def test_variational_dropout_uses_the_same_mask_at_all_positions() -> None:
    ours = recurrent_network("sutskever", dropout=0.5).train()
    source, segments, target = _batch()
    torch.manual_seed(0)
    zero = ours.hidden(target, source=source, source_segments=segments) == 0
    assert (zero == zero[:, :1]).all()
    assert 0.2 < zero.float().mean() < 0.8


@pytest.mark.parametrize("tie", ["all", "output"])
@torch.no_grad()
def test_tied_weights_are_stored_once(tie: str) -> None:
    ours = recurrent_network(tie_embeddings=tie)
    assert ours.head.weight is ours.decoder.embedding.weight
    assert (ours.decoder.embedding.weight is ours.encoder.embedding.weight) == (tie == "all")
    stored = ours.stored_weights()
    assert "head.weight" not in stored
    loaded = registry.build(ours.model, VOCAB_SIZE, None)
    loaded.load_stored_weights(stored)
    source, _, target = _batch()
    assert torch.equal(loaded.eval()(target, source=source), ours(target, source=source))


def test_a_separate_source_vocabulary_has_its_own_embedding() -> None:
    objective = TranslationObjective(source_vocab_size=11)
    ours = registry.build(recurrent_network().model, VOCAB_SIZE, 0, objective=objective)
    assert isinstance(ours, RecurrentEncoderDecoder)
    assert ours.encoder.embedding.weight.shape[0] == 11
    assert ours.decoder.embedding.weight.shape[0] == VOCAB_SIZE
    with pytest.raises(InputError, match="needs a shared vocabulary"):
        registry.build(recurrent_network(tie_embeddings="all").model, VOCAB_SIZE, 0, objective=objective)


def test_muon_updates_the_stacked_matrices_of_the_layers_and_the_linear_layers() -> None:
    ours = recurrent_network()
    names = ours.muon_weights()
    assert {"decoder.layers.0.weight_ih", "encoder.backward_layers.0.weight_hh", "decoder.attention.query.weight"} <= set(names)
    assert not any("embedding" in name or "head" in name or "bias" in name for name in names)
    assert ours.stacked_matrices()["decoder.layers.0.weight_ih"] == (WIDTH, WIDTH, WIDTH)


def test_the_model_cannot_continue_text_without_a_source() -> None:
    with pytest.raises(InputError, match="needs a source text"):
        recurrent_network()(torch.zeros(1, 3, dtype=torch.long))
