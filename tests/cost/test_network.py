"""Test the estimates for encoders, classifiers and translation models against their networks."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from cost.test_memory import DTYPES, peak_bytes
from torch.utils.flop_counter import FlopCounterMode

from tinylm.cost.examples import ExampleSize
from tinylm.cost.memory import PassConfig
from tinylm.cost.network import NetworkCost, network_cost
from tinylm.data.batch import Batch
from tinylm.model import registry
from tinylm.model.base import Model
from tinylm.recipe import Recipe
from tinylm.recipe.values import ComputeDtype
from tinylm.training import objectives
from tinylm.translation.loss import pair_batch

VOCAB_SIZE, SOURCE, TARGET = 61, 20, 28
MASKED = {"architecture": "encoder", "n_layer": 3, "n_head": 4, "n_embd": 32, "context_length": 24}
TRANSFORMER = {**MASKED, "architecture": "encoder_decoder", "n_layer": 2, "n_decoder_layer": 3, "context_length": 32}
RECURRENT = {"architecture": "recurrent_encoder_decoder", "n_embd": 32, "context_length": 32}
TEXT, LABELS, PAIRS = ({"train": "a.jsonl", "format": name} for name in ("text", "labels", "pairs"))


def recipe(model: dict[str, Any], data: dict[str, str], **objective: Any) -> Recipe:
    document = {"data": data, "model": model, "training": {"steps": 1}, "objective": objective}
    return Recipe.model_validate(document)


def classifier(**model: Any) -> Recipe:
    return recipe({**MASKED, **model}, LABELS, labels=("a", "b", "c"), label_counts=(1, 1, 1))


RECIPES = {
    "masked modern": recipe(MASKED, TEXT),
    "masked bert": recipe({**MASKED, "preset": "bert"}, TEXT),
    "masked modernbert": recipe(
        {**MASKED, "norm_first_block": False, "embedding_norm": True, "norm": "layernorm", "head_transform": True}, TEXT
    ),
    "masked untied with bias": recipe({**MASKED, "tie_embeddings": False, "bias": True, "head_bias": True}, TEXT),
    "classifier bert": classifier(preset="bert"),
    "classifier decoder": classifier(architecture="decoder", preset="gpt2"),
    "classifier without pooler": recipe(MASKED, LABELS, labels=("a", "b"), label_counts=(1, 1), pooler="none"),
    "transformer": recipe({**TRANSFORMER, "preset": "transformer"}, PAIRS),
    "modern": recipe(TRANSFORMER, PAIRS),
    "modern with biases": recipe({**TRANSFORMER, "bias": True, "norm_gain": True, "norm": "layernorm", "n_kv_head": 2}, PAIRS),
    "separate vocabularies": recipe({**TRANSFORMER, "tie_embeddings": "output"}, PAIRS, source_vocab_size=40),
    "untied": recipe({**TRANSFORMER, "tie_embeddings": "none", "position": "learned"}, PAIRS, source_vocab_size=40),
    "both norms": recipe({**TRANSFORMER, "norm_position": "both", "norm_gain": True}, PAIRS),
    "bahdanau": recipe(RECURRENT, PAIRS, source_vocab_size=40),
    "sutskever": recipe({**RECURRENT, "preset": "sutskever", "n_layer": 2, "tie_embeddings": "all"}, PAIRS),
    "deep": recipe({**RECURRENT, "cell": "lstm", "n_layer": 2, "tie_embeddings": "output"}, PAIRS),
    "bidirectional without attention": recipe({**RECURRENT, "attention": "none", "n_layer": 2}, PAIRS),
}


def network_and_cost(loaded: Recipe, size: ExampleSize | None = None, vocab_size: int = VOCAB_SIZE) -> tuple[Model, Any]:
    network = registry.build(loaded.model, vocab_size, seed=0, objective=loaded.objective).train()
    return network, network_cost(loaded, vocab_size, size)


def batch_and_size(loaded: Recipe, rows: int, vocab_size: int) -> tuple[Batch, ExampleSize]:
    """Return a batch of random tokens with little padding, as long as the context allows, and the size of its examples."""
    random = np.random.default_rng(0)
    if loaded.data.format == "pairs":
        source, target = random.integers(1, 40, (rows, SOURCE)), random.integers(1, vocab_size, (rows, TARGET))
        source[0, -1] = -1
        return pair_batch(source, target), ExampleSize(SOURCE + TARGET, TARGET, TARGET, SOURCE, SOURCE)
    length = loaded.model.context_length
    tokens = random.integers(0, vocab_size, (rows, length))
    size = ExampleSize(length, length, length)
    if loaded.data.format == "labels":
        tokens[0, -1] = -1
        return objectives.build(loaded.objective).batch({"tokens": tokens, "labels": np.zeros((rows, 1), dtype=np.int64)}, 0, 0), size
    targets = np.where(random.random(tokens.shape) < 0.15, tokens, -100)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets)), size


@pytest.mark.parametrize("name", RECIPES)
def test_parameter_counts_match_the_network(name: str) -> None:
    network, cost = network_and_cost(RECIPES[name])
    assert cost.parameter_count == network.parameter_count()
    muon = {parameter: weight for parameter, weight in network.named_parameters() if parameter in network.muon_weights()}
    assert cost.counts["matrices"] == sum(weight.numel() for weight in muon.values())
    rows = network.stacked_matrices()
    matrices = [m for parameter, weight in muon.items() for m in torch.split(weight, rows.get(parameter, (len(weight),)))]
    shapes = [tuple(matrix.shape) for matrix in matrices]
    assert {shape: shapes.count(shape) for shape in shapes} == dict(cost.matrix_shapes)


@pytest.mark.parametrize("name", ["masked bert", "classifier bert", "classifier decoder", "transformer", "untied", "sutskever"])
def test_flops_match_those_that_torch_counts(name: str) -> None:
    loaded = RECIPES[name]
    batch, size = batch_and_size(loaded, 4, VOCAB_SIZE)
    network, cost = network_and_cost(loaded, size)
    objective = objectives.build(loaded.objective)
    with torch.device("cpu"), FlopCounterMode(display=False) as counter:
        objective.loss_sum(network, batch).backward()
    print(name, counter.get_total_flops() / 4 / cost.flops(), counter.get_total_flops() / 4, cost.flops(), cost.attention_flops)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("vocab_size", [100, 2000])
@pytest.mark.parametrize("name", RECIPES)
def test_activation_bytes_match_the_peak_of_a_forward_and_backward_pass(
    name: str, vocab_size: int, precision: ComputeDtype
) -> None:
    loaded = RECIPES[name]
    batch, size = batch_and_size(loaded, 16, vocab_size)
    network, cost = network_and_cost(loaded, size, vocab_size)
    objective = objectives.build(loaded.objective)

    def work() -> None:
        with contextlib.nullcontext() if precision == "fp32" else torch.autocast("cpu", dtype=DTYPES[precision]):
            loss = objective.loss_sum(network, batch)
        loss.backward()

    print(f"{name:32} {vocab_size} {precision} {cost.activation_bytes(PassConfig(vocab_size, 16, precision)) / peak_bytes(work):.3f}")
