"""`model.init_from`: which weights are loaded, which keep their initialization, and which models are rejected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import PRESETS, VOCAB_SIZE, ids, model, section

from tinylm.errors import InputError
from tinylm.model.init_from import check_compatible, load_pretrained
from tinylm.model.transformer import Transformer


def init_from(
    source: Transformer, *, vocab_size: int = VOCAB_SIZE, same_tokenizer: bool = True, **overrides: Any
) -> tuple[Transformer, list[str]]:
    """Return a network initialized from `source` and the names of the weights that were not loaded."""
    values = {**source.model.model_dump(), "init_from": {"run": "runs/source"}, **overrides}
    network = Transformer(section(**values), vocab_size, seed=5).eval()
    check_compatible(network.model, source.model)
    return network, load_pretrained(network, source, same_tokenizer=same_tokenizer)


@pytest.mark.parametrize("preset", PRESETS)
def test_all_weights_are_loaded(preset: str) -> None:
    source = model(preset)
    network, reinitialized = init_from(source, dropout=0.1, attention_dropout=0.2)
    assert reinitialized == []
    with torch.no_grad():
        assert torch.equal(network(ids()), source(ids()))


def test_a_context_can_be_shortened_but_not_extended_if_position_embeddings_are_learned() -> None:
    tokens = ids(length=8)
    for preset, context in (("gpt2", 8), ("llama", 8), ("llama", 32)):
        source = model(preset)
        network, _ = init_from(source, context_length=context)
        with torch.no_grad():
            torch.testing.assert_close(network(tokens), source(tokens))
    with pytest.raises(InputError, match=r"model\.context_length 32 \(source: 16\)"):
        init_from(model("gpt2"), context_length=32)


def test_head_off_loads_all_weights_except_the_head() -> None:
    source = model("gpt2", tie_embeddings=True)
    network, reinitialized = init_from(source, init_from={"run": "runs/source", "head": False}, tie_embeddings=False)
    assert reinitialized == ["head.weight"]
    with torch.no_grad():
        assert torch.equal(network.hidden(ids()), source.hidden(ids()))
    assert not torch.equal(network.head.weight, source.head.weight)
    with pytest.raises(InputError, match="tied embeddings share the head"):
        init_from(source, init_from={"run": "runs/source", "head": False})


def test_a_different_tokenizer_reinitializes_every_weight_that_depends_on_the_vocabulary() -> None:
    source = model("modern", ngram_embeddings=[2], value_embeddings=1)
    with pytest.raises(InputError, match="the tokenizer differs from the source run's"):
        init_from(source, vocab_size=70, same_tokenizer=False)
    without_head = {"run": "runs/source", "head": False}
    network, reinitialized = init_from(source, vocab_size=70, same_tokenizer=False, init_from=without_head)
    assert reinitialized == [
        "embedding.weight",
        "ngrams.table.weight",
        "blocks.0.value_embedding.weight",
        "blocks.1.value_embedding.weight",
        "head.weight",
    ]
    for name, parameter in network.named_parameters():
        if name not in reinitialized:
            assert torch.equal(parameter, source.get_parameter(name))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_layer": 3}, r"model\.n_layer 3 \(source: 2\)"),
        ({"n_kv_head": 2}, r"model\.n_kv_head 2 \(source: 4\)"),
        ({"rope_theta": 500.0}, r"model\.rope_theta 500\.0 \(source: 10000\.0\)"),
        ({"n_inner": 40}, "hidden width 40"),
        ({"tie_embeddings": True}, "model.tie_embeddings True"),
        ({"ngram_embeddings": [2]}, "model.ngram_embeddings"),
    ],
)
def test_the_error_for_an_incompatible_model_contains_the_key(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        init_from(model("llama"), **overrides)


def test_setting_keys_to_the_source_defaults_is_compatible() -> None:
    source = model("llama")
    defaults = {"n_kv_head": 4, "head_dim": 8, "rope_theta": 10000.0, "n_inner": source.model.feed_forward_width}
    assert all(getattr(source.model, key) != value for key, value in defaults.items()), "the source must leave these keys unset"
    network, reinitialized = init_from(source, **defaults)
    assert reinitialized == []
    with torch.no_grad():
        assert torch.equal(network(ids()), source(ids()))
