"""The encoder-decoder matches `MarianMTModel` in transformers and `torch.nn.Transformer`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pairs import END, VOCAB_SIZE, network, section
from torch import nn

from tinylm.errors import InputError
from tinylm.interchange import marian
from tinylm.model import registry
from tinylm.model.encoder_decoder import EncoderDecoder
from tinylm.model.sequence_to_sequence import START
from tinylm.recipe.pairs import TranslationObjective

PRESETS = ("transformer", "modern")


def _batch(rows: int = 3, source_length: int = 7, target_length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(1, VOCAB_SIZE, (rows, source_length), generator=generator)
    target = torch.randint(1, VOCAB_SIZE, (rows, target_length), generator=generator)
    target[:, 0] = START
    return source, target


@pytest.mark.parametrize(
    ("tie", "activation", "bias"), [("all", "relu", False), ("output", "silu", True), ("all", "gelu_exact", True)]
)
@torch.no_grad()
def test_the_transformer_preset_computes_the_same_logits_as_marian(tie: str, activation: str, bias: bool) -> None:
    transformers = pytest.importorskip("transformers")
    ours = network(tie_embeddings=tie, feed_forward=activation, head_bias=bias)
    theirs = transformers.MarianMTModel(transformers.MarianConfig(**marian._config(ours, END))).eval()
    theirs.load_state_dict(marian.export_state_dict(ours), strict=False)
    theirs.tie_weights()
    source, target = _batch()
    segments = torch.zeros_like(source)
    segments[1, 4:] = -1
    start = target.where(target != START, torch.tensor(VOCAB_SIZE))
    padded = source.where(segments >= 0, torch.tensor(VOCAB_SIZE))
    expected = theirs(input_ids=padded, attention_mask=(segments >= 0).long(), decoder_input_ids=start).logits
    actual = ours(target, source=source, source_segments=segments)
    torch.testing.assert_close(actual, expected[..., :VOCAB_SIZE], atol=1e-4, rtol=0)


@torch.no_grad()
def test_blocks_match_torch_nn_transformer() -> None:
    ours = network()
    model = ours.model
    theirs = nn.Transformer(
        model.n_embd,
        model.n_head,
        model.n_layer,
        model.decoder_layers,
        ours.decoder.model.feed_forward_width,
        dropout=0.0,
        batch_first=True,
        norm_first=False,
        layer_norm_eps=1e-5,
    ).eval()
    theirs.encoder.norm = theirs.decoder.norm = None
    for stack, layers in ((ours.encoder, theirs.encoder.layers), (ours.decoder, theirs.decoder.layers)):
        for block, layer in zip(stack.blocks, layers, strict=True):
            attentions = [(block.attention, layer.self_attn)]
            norms = [(block.attention_norm, layer.norm1)]
            if block.cross_attention is not None:
                attentions.append((block.cross_attention, layer.multihead_attn))
                norms.append((block.cross_attention_norm, layer.norm2))
            norms.append((block.feed_forward_norm, layer.norm3 if block.cross_attention is not None else layer.norm2))
            for attention, reference in attentions:
                reference.in_proj_weight.copy_(attention.qkv.weight)
                reference.in_proj_bias.copy_(attention.qkv.bias)
                reference.out_proj.load_state_dict(attention.output.state_dict())
            for norm, reference in norms:
                reference.load_state_dict(norm.state_dict())
            layer.linear1.load_state_dict(block.feed_forward.input.state_dict())
            layer.linear2.load_state_dict(block.feed_forward.output.state_dict())
    source, target = _batch()
    embedded_source = ours.encoder._embed(source, 0, source.shape[1], None, None, None)
    embedded_target = ours.decoder._embed(target, 0, target.shape[1], None, None, None)
    mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
    expected = theirs(embedded_source, embedded_target, tgt_mask=mask, tgt_is_causal=True)
    torch.testing.assert_close(ours.hidden(target, source=source), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_source_padding_does_not_change_the_logits(preset: str) -> None:
    model = network(preset)
    source, target = _batch()
    expected = model(target, source=source)
    padded = F.pad(source, (0, 5), value=3)
    segments = torch.where(torch.arange(12) < 7, 0, -1).expand(3, -1)
    torch.testing.assert_close(model(target, source=padded, source_segments=segments), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_loss_is_the_label_smoothed_cross_entropy_over_targets_that_are_not_ignored(preset: str) -> None:
    model = network(preset)
    source, target = _batch()
    targets = torch.randint(0, VOCAB_SIZE, target.shape)
    targets[0, 3:] = -100
    logits = model(target, source=source)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(model(target, targets=targets, source=source, label_smoothing=0.1), expected)


def test_tied_weights_are_stored_once() -> None:
    model = network(tie_embeddings="all")
    assert model.decoder.head.weight is model.encoder.embedding.weight is model.decoder.embedding.weight
    stored = model.stored_weights()
    assert not {"decoder.head.weight", "decoder.embedding.weight"} & stored.keys()
    loaded = registry.build(model.model, VOCAB_SIZE, None)
    loaded.load_stored_weights(stored)
    source, target = _batch()
    assert torch.equal(loaded.eval()(target, source=source), model(target, source=source))


def test_muon_updates_only_the_matrices_in_the_blocks() -> None:
    names = network("modern").muon_weights()
    assert "decoder.blocks.2.cross_attention.qkv.weight" in names
    assert not any("embedding" in name or "head" in name for name in names)


def test_a_separate_source_vocabulary_has_its_own_embedding() -> None:
    objective = TranslationObjective(source_vocab_size=11)
    model = registry.build(section("modern"), VOCAB_SIZE, 0, objective=objective)
    assert isinstance(model, EncoderDecoder)
    assert model.encoder.embedding.weight.shape[0] == 11
    assert model.decoder.head.weight.shape[0] == VOCAB_SIZE
    with pytest.raises(InputError, match="needs a shared vocabulary"):
        registry.build(section("transformer"), VOCAB_SIZE, 0, objective=objective)


def test_the_model_cannot_continue_text_without_a_source() -> None:
    with pytest.raises(InputError, match="needs a source text"):
        network()(torch.zeros(1, 3, dtype=torch.long))
