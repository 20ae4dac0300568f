"""The encoder matches BERT, attends in both directions, and computes the loss only at masked positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tinylm.data.batch import IGNORE_INDEX
from tinylm.interchange.encoders import export_tensors, section_from_config
from tinylm.model import registry
from tinylm.model.base import Model
from tinylm.model.encoder import Encoder
from tinylm.recipe.encoder import EncoderSection

VOCAB = 61


def section(preset: str = "modern", **overrides: Any) -> EncoderSection:
    shape = {"architecture": "encoder", "n_layer": 2, "n_head": 4, "n_embd": 32, "context_length": 16}
    return EncoderSection.model_validate({"preset": preset, **shape, **overrides})


def noisy(preset: str = "modern", **overrides: Any) -> Encoder:
    """Return an encoder in eval mode with noise added to all parameters."""
    network = registry.build(section(preset, **overrides), VOCAB, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    assert isinstance(network, Encoder)
    return network.eval()


def ids(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def padded() -> tuple[Tensor, Tensor, Tensor]:
    """Return ids with padding, their segments, and the equivalent attention mask for transformers, each (B, T)."""
    tokens = ids()
    segments = torch.zeros_like(tokens)
    segments[1, 7:] = -1
    return tokens, segments, (segments == 0).long()


def test_preset_bert_matches_bert_for_masked_lm() -> None:
    transformers = pytest.importorskip("transformers")
    network = noisy("bert", n_inner=48)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        type_vocab_size=2,
    )
    assert section_from_config(config.to_dict(), "here") == network.model.model_copy(update={"dropout": 0.1})
    reference = transformers.BertForMaskedLM(config).eval()
    missing, unexpected = reference.load_state_dict(export_tensors(network, has_head=True), strict=False)
    assert not unexpected
    assert set(missing) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    reference.tie_weights()
    tokens, segments, mask = padded()
    types = (torch.arange(12) > 5).long().expand(2, 12)
    for token_types in (torch.zeros_like(types), types):
        theirs = reference(tokens, attention_mask=mask, token_type_ids=token_types).logits
        ours = network(tokens, segments=segments, token_types=token_types)
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(network(tokens, segments=segments), network(tokens, segments=segments, token_types=0 * types))


@pytest.mark.parametrize("preset", ["modern", "bert"])
def test_every_position_depends_on_later_positions(preset: str) -> None:
    network, tokens = noisy(preset), ids(1)
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % VOCAB
    difference = (network(tokens) - network(changed)).abs().amax(dim=-1)[0]
    assert (difference > 1e-6).all()


@pytest.mark.parametrize("preset", ["modern", "bert"])
def test_padding_does_not_change_the_logits_of_the_text(preset: str) -> None:
    network, (tokens, segments, _) = noisy(preset), padded()
    alone = network(tokens[1:, :7])
    torch.testing.assert_close(network(tokens, segments=segments)[1:, :7], alone, atol=1e-5, rtol=1e-5)


def test_an_attention_window_is_symmetric() -> None:
    network, tokens = noisy(n_layer=1, attention_window=3), ids(1)
    for position in range(12):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % VOCAB
        reached = ((network(tokens) - network(changed)).abs().amax(dim=-1)[0] > 1e-6).nonzero().flatten().tolist()
        assert reached == [other for other in range(12) if abs(other - position) < 3]


@pytest.mark.parametrize("preset", ["modern", "bert"])
def test_the_loss_is_computed_only_at_masked_positions(preset: str) -> None:
    network = noisy(preset)
    tokens, targets = ids(), ids()
    targets[torch.rand(targets.shape, generator=torch.Generator().manual_seed(3)) < 0.7] = IGNORE_INDEX
    rows: list[int] = []
    network.head.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[0]))
    loss = network(tokens, targets=targets)
    assert all(count == int((targets >= 0).sum()) for count in rows)
    expected = torch.nn.functional.cross_entropy(
        network(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None or name == "token_types.weight", name


@pytest.mark.parametrize("preset", ["modern", "bert"])
def test_a_batch_without_masked_tokens_has_zero_loss_and_gradients(preset: str) -> None:
    network = noisy(preset)
    loss = network(ids(), targets=torch.full((2, 12), IGNORE_INDEX))
    loss.backward()
    assert float(loss) == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in network.parameters())


def test_removing_the_head_does_not_change_the_hidden_states() -> None:
    network: Model = noisy("bert")
    before = network.hidden(ids())
    network.remove_head()
    assert torch.equal(network.hidden(ids()), before)
    assert not network.head_weights()
    assert not network.tied_weights()
