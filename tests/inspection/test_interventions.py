"""Ablation and patching match the same changes made by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import ids, model
from torch import Tensor

from tinylm.errors import InputError
from tinylm.inspection import Ablation, ablate, logit_difference, patch, top_activations
from tinylm.model.transformer import Transformer


def _loss(network: Transformer, tokens: Tensor) -> float:
    with torch.no_grad():
        logits = network(tokens[:, :-1])
    return float(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def test_ablating_a_head_equals_moving_its_mean_output_into_the_projection_bias() -> None:
    network, tokens = model("gpt2"), ids(3, 12)
    result = ablate(network, tokens)
    with torch.no_grad():
        _, cache = network.run_with_cache(tokens[:, :-1])
    for layer in range(2):
        for head in range(4):
            changed = copy.deepcopy(network)
            projection = changed.blocks[layer].attention.output
            columns = slice(8 * head, 8 * head + 8)
            with torch.no_grad():
                mean = cache[f"blocks.{layer}.attn.z"][:, :, head].mean((0, 1))
                projection.bias += projection.weight[:, columns] @ mean
                projection.weight[:, columns] = 0
            assert float(result.heads[layer, head]) == pytest.approx(_loss(changed, tokens) - _loss(network, tokens), abs=2e-6)


def test_ablating_a_feed_forward_layer_equals_replacing_its_output_with_the_mean() -> None:
    network, tokens = model("gpt2"), ids(3, 12)
    result = ablate(network, tokens)
    with torch.no_grad():
        _, cache = network.run_with_cache(tokens[:, :-1])
    for layer in range(2):
        changed = copy.deepcopy(network)
        projection = changed.blocks[layer].feed_forward.output
        with torch.no_grad():
            projection.weight.zero_()
            projection.bias.copy_(cache[f"blocks.{layer}.mlp_out"].mean((0, 1)))
        assert float(result.feed_forward[layer]) == pytest.approx(_loss(changed, tokens) - _loss(network, tokens), abs=2e-6)
    assert result.loss == pytest.approx(_loss(network, tokens), abs=1e-6)
    assert result.tokens == 33
    assert Ablation.bits_per_byte_factor(33, 100) == pytest.approx(33 / 100 / 0.693147, rel=1e-5)


def test_tokens_with_a_negative_target_are_not_scored() -> None:
    network, tokens = model("llama"), ids(2, 12)
    targets = tokens[:, 1:].clone()
    targets[1] = -1
    result = ablate(network, tokens[:, :-1], targets)
    assert result.tokens == 11
    assert result.loss == pytest.approx(_loss(network, tokens[:1]), abs=1e-6)


def _texts() -> tuple[Tensor, Tensor]:
    """Return two texts that differ only in token 4."""
    clean = ids(1, 10)
    corrupt = clean.clone()
    corrupt[0, 4] = (corrupt[0, 4] + 7) % 50
    return clean, corrupt


@pytest.mark.parametrize("preset", ["gpt2", "llama"])
def test_patching_the_only_different_token_restores_the_prediction(preset: str) -> None:
    network, (clean, corrupt) = model(preset), _texts()
    effects = patch(network, clean, corrupt, logit_difference(3, 5))
    assert effects.shape == (2, 10)
    assert float(effects[0, 4]) == pytest.approx(1.0, abs=1e-4)
    others = [position for position in range(10) if position != 4]
    assert effects[0, others].abs().max() < 1e-4
    assert effects[1, :4].abs().max() < 1e-4, "earlier positions cannot depend on a later token"


def test_patching_a_head_equals_a_forward_pass_with_the_clean_activation() -> None:
    network, (clean, corrupt) = model("gpt2"), _texts()
    effects = patch(network, clean, corrupt, lambda logits: logits[:, 3], at="z")
    with torch.no_grad():
        clean_logits, cache = network.run_with_cache(clean)
        start, end = float(network(corrupt)[0, -1, 3]), float(clean_logits[0, -1, 3])

        def insert_clean_head(z: Tensor, name: str) -> None:
            z[:, :, 2] = cache[name][:, :, 2]

        with network.hooks({"blocks.0.attn.z": insert_clean_head}):
            patched = float(network(corrupt)[0, -1, 3])
    assert float(effects[0, 2]) == pytest.approx((patched - start) / (end - start), abs=1e-4)


def test_texts_that_cannot_be_compared_are_rejected() -> None:
    network = model("gpt2")
    with pytest.raises(InputError, match="same number of tokens, not 10 and 9"):
        patch(network, ids(1, 10), ids(1, 9), logit_difference(1, 2))
    with pytest.raises(InputError, match="predicts the same after both texts"):
        patch(network, ids(1, 10), ids(1, 10), logit_difference(1, 2))
    with pytest.raises(InputError, match="has no activations nothing"):
        patch(network, *_texts(), logit_difference(1, 2), at="nothing")


def test_top_activations_are_the_largest_over_all_windows_and_positions() -> None:
    network, windows = model("gpt2"), ids(3, 12)
    with torch.no_grad():
        _, cache = network.run_with_cache(windows)
    activations = cache["blocks.1.mlp.post"]
    top = top_activations(network, windows, 1, torch.tensor([5, 70]), count=4)
    assert top.values.shape == (2, 4)
    for row, neuron in enumerate((5, 70)):
        expected = activations[..., neuron].flatten().sort(descending=True).values[:4]
        torch.testing.assert_close(top.values[row], expected)
        torch.testing.assert_close(activations[top.windows[row], top.positions[row], neuron], expected)
    assert top_activations(network, windows, 0).values.shape == (128, 5)
    with pytest.raises(InputError, match="has no feed-forward layer 2"):
        top_activations(network, windows, 2)
