"""LoRA: the added weights initially have no effect, are the only trained weights, and can be merged into the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model.parts import case_network, cases_and_presets
from tiny import ids, model

from tinylm.cost.parameters import lora_parameters
from tinylm.errors import InputError
from tinylm.model import lora
from tinylm.model.decoder import Decoder
from tinylm.model.lora import LoraLinear
from tinylm.model.transformer import Transformer
from tinylm.optim import groups
from tinylm.recipe.schema import AdamWOptimizer, LoraSection
from tinylm.recipe.support import unsupported
from tinylm.recipe.values import LORA_TARGETS

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {}),
    ("llama", {"n_kv_head": 2}),
    ("modern", {"ngram_embeddings": [2]}),
]


def with_lora(
    preset: str = "gpt2", *, rank: int = 3, alpha: float = 6.0, targets: Any = LORA_TARGETS, **overrides: Any
) -> Transformer:
    network = model(preset, **overrides)
    lora.attach(network, LoraSection(rank=rank, alpha=alpha, targets=targets), seed=1)
    return network


def with_random_b(network: Transformer) -> Transformer:
    """Fill every `lora_b`, which is initially zero, with random values in place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("lora_b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize(("preset", "overrides"), SETTINGS, ids=str)
def test_lora_initially_has_no_effect_and_merging_does_not_change_the_output(preset: str, overrides: dict[str, Any]) -> None:
    plain, network = model(preset, **overrides), with_lora(preset, **overrides)
    tokens = ids()
    with torch.no_grad():
        torch.testing.assert_close(network(tokens), plain(tokens))
        changed = with_random_b(network)(tokens)
        assert not torch.allclose(changed, plain(tokens), atol=1e-2)
        lora.merge(network)
        torch.testing.assert_close(network(tokens), changed, atol=1e-4, rtol=1e-4)
    assert list(network.state_dict()) == list(plain.state_dict())
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("compiled", [False, True])
@torch.inference_mode()
def test_decoding_uses_the_lora_weights_and_leaves_the_network_unmerged(compiled: bool) -> None:
    network, tokens = with_random_b(with_lora()).eval(), ids(1, 8)
    decoder = Decoder(network, compiled=compiled)
    cache = decoder.new_state(1)
    logits = [decoder.prefill(cache, 0, tokens[0, :5])[None], *(decoder.step(cache, tokens[:, position]) for position in (5, 6))]
    torch.testing.assert_close(torch.cat(logits), network(tokens)[0, 4:7], atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, LoraLinear) for module in decoder.network.modules())
    assert isinstance(network.blocks[0].attention.qkv, LoraLinear)


def test_a_lora_layer_matches_the_formula_in_the_paper() -> None:
    layer = with_random_b(with_lora(rank=2, alpha=5.0)).blocks[0].attention.qkv
    assert isinstance(layer, LoraLinear)
    x = torch.randn(4, 32)
    expected = x @ layer.weight.T + layer.bias + 5.0 / 2 * (x @ layer.lora_a.T @ layer.lora_b.T)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(("preset", "overrides"), SETTINGS, ids=str)
@pytest.mark.parametrize("targets", [LORA_TARGETS, LORA_TARGETS[:1], LORA_TARGETS[2:]])
def test_only_the_lora_weights_of_the_targets_are_trained(preset: str, overrides: dict[str, Any], targets: tuple[str, ...]) -> None:
    network = with_lora(preset, targets=targets, **overrides)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    optimizers = groups.build(AdamWOptimizer(name="adamw"), network)
    for _ in range(2):
        network(ids(), targets=ids(seed=1)).backward()
        optimizers.scale_lr(1.0)
        optimizers.step()
    changed = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
    expected = {f"blocks.{layer}.{target}.lora_{matrix}" for layer in range(2) for target in targets for matrix in "ab"}
    assert changed == expected
    trainable = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert trainable == lora_parameters(network.model, LoraSection(rank=3, targets=targets))
    assert {key.split("/")[1] for key in optimizers.state()} == expected


@pytest.mark.parametrize(("preset", "case"), cases_and_presets(), ids=str)
@torch.no_grad()
def test_every_model_key_is_either_supported_or_rejected(preset: str, case: dict[str, Any]) -> None:
    plain, network = case_network(case, preset), case_network(case, preset)
    if unsupported(network.model, lora.SUPPORTS):
        with pytest.raises(InputError, match="LoRA does not support"):
            lora.attach(network, LoraSection())
        return
    lora.attach(network, LoraSection(rank=2), seed=1)
    plain, network = plain.double(), network.double()
    torch.testing.assert_close(network(ids()), plain(ids()))
    changed = with_random_b(network)(ids())
    assert not torch.allclose(changed, plain(ids()), atol=1e-2)
    lora.merge(network)
    torch.testing.assert_close(network(ids()), changed)
