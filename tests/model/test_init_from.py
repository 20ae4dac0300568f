"""Starting from another network's weights: what is taken over, what may start anew, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import ids, model, section

from tinylm.errors import InputError
from tinylm.model.init_from import check_parts, load_pretrained
from tinylm.model.transformer import Transformer


def started(
    source: Transformer, *, vocabulary: int = 61, same_tokenizer: bool = True, **parts: Any
) -> tuple[Transformer, list[str]]:
    values = {**source.model.model_dump(), "init_from": {"run": "there"}, **parts}
    network = Transformer(section(**values), vocabulary, seed=5).eval()
    check_parts(network.model, source.model)
    return network, load_pretrained(network, source, same_tokenizer=same_tokenizer)


@pytest.mark.parametrize("preset", ["modern", "gpt2", "llama"])
def test_all_weights_are_taken_over(preset: str) -> None:
    source = model(preset)
    network, anew = started(source, dropout=0.1)
    assert anew == []
    with torch.no_grad():
        assert torch.equal(network(ids()), source(ids()))


def test_a_shorter_context_is_cut_and_a_longer_one_only_where_positions_are_computed() -> None:
    tokens = ids(length=8)
    for preset, context in (("gpt2", 8), ("llama", 8), ("llama", 32)):
        source = model(preset)
        network, _ = started(source, context_length=context)
        with torch.no_grad():
            torch.testing.assert_close(network(tokens), source(tokens))
    with pytest.raises(InputError, match=r"model\.context_length 32 \(there: 16\)"):
        started(model("gpt2"), context_length=32)


def test_without_the_head_only_the_head_starts_anew() -> None:
    source = model("gpt2", tie_embeddings=True)
    network, anew = started(source, init_from={"run": "there", "head": False}, tie_embeddings=False)
    assert anew == ["head.weight"]
    with torch.no_grad():
        assert torch.equal(network.hidden(ids()), source.hidden(ids()))
    assert not torch.equal(network.head.weight, source.head.weight)
    with pytest.raises(InputError, match="untie them"):
        started(source, init_from={"run": "there", "head": False})


def test_with_another_tokenizer_all_that_is_looked_up_by_token_starts_anew() -> None:
    source = model("modern", ngram_embeddings=[2], value_embeddings=1)
    with pytest.raises(InputError, match="the tokenizer is not that run's"):
        started(source, vocabulary=70, same_tokenizer=False)
    without = {"run": "there", "head": False}
    network, anew = started(source, vocabulary=70, same_tokenizer=False, init_from=without)
    assert anew == [
        "embedding.weight",
        "ngrams.table.weight",
        "blocks.0.value_embedding.weight",
        "blocks.1.value_embedding.weight",
        "head.weight",
    ]
    for name, parameter in network.named_parameters():
        if name not in anew:
            assert torch.equal(parameter, source.get_parameter(name))


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"n_layer": 3}, r"model\.n_layer 3 \(there: 2\)"),
        ({"n_kv_head": 2}, r"model\.n_kv_head 2 \(there: 4\)"),
        ({"rope_theta": 500.0}, r"model\.rope_theta 500\.0 \(there: 10000\.0\)"),
        ({"n_inner": 40}, "hidden width 40"),
        ({"tie_embeddings": True}, "model.tie_embeddings True"),
        ({"ngram_embeddings": [2]}, "model.ngram_embeddings"),
    ],
)
def test_a_model_of_other_parts_is_refused_by_the_name_of_the_part(parts: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        started(model("llama"), **parts)


def test_another_spelling_of_the_same_part_is_the_same() -> None:
    started(model("llama"), n_kv_head=4, head_dim=8, rope_theta=10000.0, n_inner=model("llama").model.feed_forward_width)
