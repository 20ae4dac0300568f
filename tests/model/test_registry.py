"""The transformer's implementation of `Model`: stored, tied, frozen and adapted weights, and their optimizer groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import PRESETS, VOCAB_SIZE, add_noise_, ids, section
from torch import nn

from tinylm.model import registry
from tinylm.model.base import Model
from tinylm.model.lora import LoraLinear
from tinylm.model.transformer import Transformer
from tinylm.optim import groups
from tinylm.recipe.schema import LoraSection, MuonOptimizer


def _built(preset: str = "modern", **overrides: Any) -> Model:
    return add_noise_(registry.build(section(preset, **overrides), VOCAB_SIZE, seed=5)).eval()


@pytest.mark.parametrize("preset", PRESETS)
def test_building_a_decoder_returns_a_transformer_with_the_same_weights(preset: str) -> None:
    built, direct = registry.build(section(preset), VOCAB_SIZE, seed=7), Transformer(section(preset), VOCAB_SIZE, seed=7)
    assert type(built) is Transformer
    assert built.state_dict().keys() == direct.state_dict().keys()
    assert all(torch.equal(tensor, direct.state_dict()[name]) for name, tensor in built.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_stored_weights_restore_the_network_with_its_dtype_and_tied_weights(tied: bool, dtype: torch.dtype) -> None:
    source = _built("gpt2", tie_embeddings=tied).to(dtype)
    stored = source.stored_weights()
    assert ("head.weight" in stored) is not tied
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert not any(tensor.requires_grad for tensor in stored.values())
    loaded = registry.build(source.model, VOCAB_SIZE, None).to(dtype).eval()
    loaded.load_stored_weights(stored)
    assert torch.equal(loaded(ids()), source(ids()))
    assert (loaded.output_embedding().weight is loaded.input_embedding().weight) is tied
    assert loaded.parameter_count() == sum(tensor.numel() for tensor in stored.values())


def test_missing_and_unexpected_weights_raise_errors() -> None:
    network = _built("gpt2")
    stored = network.stored_weights()
    with pytest.raises(RuntimeError, match=r"Missing key.*final_norm\.weight"):
        network.load_stored_weights({name: tensor for name, tensor in stored.items() if name != "final_norm.weight"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        network.load_stored_weights({**stored, "extra": torch.zeros(1)})


def test_frozen_embeddings_stay_frozen_after_loading() -> None:
    recipe_section = section("llama", init_embeddings="vectors", freeze_embeddings=True)
    network = registry.build(recipe_section, VOCAB_SIZE, seed=0)
    network.load_stored_weights(_built("llama").stored_weights())
    assert [name for name, parameter in network.named_parameters() if not parameter.requires_grad] == ["embedding.weight"]


def test_a_network_can_be_built_with_lora_layers() -> None:
    network = registry.build(section(), VOCAB_SIZE, None, with_lora=LoraSection(rank=2))
    adapted = {name for name, module in network.named_modules() if isinstance(module, LoraLinear)}
    assert adapted
    assert {name for name, parameter in network.named_parameters() if parameter.requires_grad} == {
        f"{name}.lora_{matrix}" for name in adapted for matrix in "ab"
    }
    assert {f"{name}.lora_a" for name in adapted} <= network.stored_weights().keys()


def test_compile_units_contain_all_block_weights() -> None:
    network = _built("modern", ngram_embeddings=())
    inside = {id(parameter) for unit in network.compile_units() for parameter in unit.parameters()}
    outside = {name.split(".")[0] for name, parameter in network.named_parameters() if id(parameter) not in inside}
    assert outside <= {"embedding", "embedding_norm", "final_norm", "head", "positions"}
    assert len(network.compile_units()) == network.depth == 2


def test_muon_updates_all_linear_weights_except_the_head() -> None:
    network = _built("modern", ngram_embeddings=[2])
    expected = [f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Linear) and name != "head"]
    assert network.muon_weights() == expected
    assert set(network.stacked_matrices()) <= set(expected)


def test_only_ngram_tables_have_a_higher_learning_rate() -> None:
    assert _built("modern", ngram_embeddings=[2]).lr_multipliers() == {"ngrams.table.weight": 6.0}
    assert _built("gpt2").lr_multipliers() == {}


class _TiedOutput(Model):
    """A network whose output projection shares its weight with the embedding and is not called `head`."""

    def __init__(self) -> None:
        super().__init__(section(), VOCAB_SIZE)
        self.embedding, self.mixing = nn.Embedding(VOCAB_SIZE, 8), nn.Linear(8, 8)
        self.projection = nn.Linear(8, VOCAB_SIZE, bias=False)
        self.projection.weight = self.embedding.weight

    def tied_weights(self) -> dict[str, str]:
        return {"projection.weight": "embedding.weight"}


def test_muon_does_not_update_tied_weights() -> None:
    network = _TiedOutput()
    assert network.muon_weights() == ["mixing.weight"]
    optimizers = groups.build(MuonOptimizer(name="muon"), network)
    updated = [parameter for part in optimizers.parts.values() for group in part.param_groups for parameter in group["params"]]
    assert len(updated) == len(list(network.parameters())) == 3


@pytest.mark.parametrize("preset", PRESETS)
def test_vocabulary_weights_are_the_weights_that_depend_on_the_vocabulary_size(preset: str) -> None:
    overrides: dict[str, Any] = {"value_embeddings": 1} if preset == "modern" else {}
    network, larger = (registry.build(section(preset, **overrides), size, None) for size in (VOCAB_SIZE, VOCAB_SIZE + 1))
    larger_shapes = {name: parameter.shape for name, parameter in larger.named_parameters()}
    by_shape = {name for name, parameter in network.named_parameters() if parameter.shape != larger_shapes[name]}
    hashed = {"ngrams.table.weight"} & larger_shapes.keys()
    assert network.vocabulary_weights() == by_shape | hashed
