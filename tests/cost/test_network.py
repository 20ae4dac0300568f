"""Test the estimates for encoders, classifiers and translation models against their networks."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from peaks import DTYPES, peak_bytes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinylm.cost.examples import ExampleSize
from tinylm.cost.memory import PassConfig
from tinylm.cost.network import network_cost
from tinylm.data.batch import Batch
from tinylm.model import registry
from tinylm.model.base import Model
from tinylm.recipe import Recipe
from tinylm.recipe.values import ComputeDtype
from tinylm.training import objectives
from tinylm.translation.loss import pair_batch, pair_losses

VOCAB_SIZE, SOURCE, TARGET = 61, 20, 28
MASKED = {"architecture": "encoder", "n_layer": 3, "n_head": 4, "n_embd": 32, "context_length": 24}
TRANSFORMER = {**MASKED, "architecture": "encoder_decoder", "n_layer": 2, "n_decoder_layer": 3, "context_length": 32}
RECURRENT = {"architecture": "recurrent_encoder_decoder", "n_embd": 32, "context_length": 32}
LAYERS = {"n_embd": 32, "context_length": 24, "burn_in": 8}
WINDOW = {"architecture": "feed_forward", "window": 4, "n_hidden": 48, "context_length": 24}
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
    "classifier with a pooler norm": recipe(MASKED, LABELS, labels=("a", "b"), label_counts=(1, 1), pooler="gelu_norm"),
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
    **{
        name: recipe({"architecture": name, "n_embd": 32, "context_length": 24, "burn_in": 8}, TEXT)
        for name in ("rnn", "lstm", "gru")
    },
    "tied gru": recipe({"architecture": "gru", "n_embd": 32, "context_length": 24, "burn_in": 0, "tie_embeddings": True}, TEXT),
    "feed_forward": recipe({**WINDOW}, TEXT),
    "direct": recipe({**WINDOW, "direct": True}, TEXT),
    "one_hot": recipe({**WINDOW, "input": "one_hot", "n_embd": 32}, TEXT),
}


def network_and_cost(loaded: Recipe, size: ExampleSize | None = None, vocab_size: int = VOCAB_SIZE) -> tuple[Model, Any]:
    network = registry.build(loaded.model, vocab_size, seed=0, objective=loaded.objective).train()
    return network, network_cost(loaded, vocab_size, size)


def batch_and_size(loaded: Recipe, rows: int, vocab_size: int) -> tuple[Batch, ExampleSize]:
    """Return a batch of random tokens with little padding, as long as the context allows, and the size of its examples."""
    random = np.random.default_rng(0)
    if loaded.data.format == "pairs":
        recurrent = loaded.model.architecture == "recurrent_encoder_decoder"
        sources, targets = (6, 8) if recurrent else (SOURCE, TARGET)
        source: np.ndarray = random.integers(1, 40, (rows, sources))
        target: np.ndarray = random.integers(1, vocab_size, (rows, targets))
        source[0, -1] = -1
        return pair_batch(source, target), ExampleSize(sources + targets, targets, targets, sources, sources)
    length = loaded.model.context_length + (loaded.model.warmup_tokens if loaded.data.format == "text" else 0)
    tokens = random.integers(0, vocab_size, (rows, length))
    size = ExampleSize(length, length, length)
    if loaded.data.format == "labels":
        tokens[0, -1] = -1
        examples = {"tokens": tokens, "labels": np.zeros((rows, 1), dtype=np.int64)}
        return objectives.build(loaded.objective).batch(examples, 0, 0), size
    if loaded.objective.name == "causal_lm":
        return Batch(torch.from_numpy(tokens), torch.from_numpy(tokens)), size
    masked = np.where(random.random(tokens.shape) < 0.15, tokens, -100)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(masked)), size


@pytest.mark.parametrize("name", RECIPES)
def test_parameter_counts_match_the_network(name: str) -> None:
    network, cost = network_and_cost(RECIPES[name])
    assert cost.parameter_count == network.parameter_count()
    muon = {parameter: weight for parameter, weight in network.named_parameters() if parameter in network.muon_weights()}
    assert cost.counts["matrices"] == sum(weight.numel() for weight in muon.values())
    rows = network.stacked_matrices()
    matrices = [m for parameter, weight in muon.items() for m in torch.split(weight, list(rows.get(parameter, (len(weight),))))]
    shapes = [tuple(matrix.shape) for matrix in matrices]
    assert {shape: shapes.count(shape) for shape in shapes} == dict(cost.matrix_shapes)


@pytest.mark.parametrize("name", ["masked bert", "classifier bert", "classifier decoder", "transformer", "separate vocabularies"])
def test_flops_match_those_that_torch_counts(name: str) -> None:
    """Unlike the estimate, unfused attention also computes the scores that a causal mask hides."""
    loaded = RECIPES[name]
    batch, size = batch_and_size(loaded, 4, VOCAB_SIZE)
    network, cost = network_and_cost(loaded, size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objectives.build(loaded.objective).loss_sum(network, batch).backward()  # type: ignore[no-untyped-call]
    attention = 12 * 8 * cost.scores  # a head has 8 units
    assert cost.attention_flops <= attention
    assert counter.get_total_flops() == pytest.approx(4 * (cost.weight_flops() + attention), rel=0.01)


def test_flops_of_recurrent_layers_match_a_hand_calculation() -> None:
    cell, head = 2 * 4 * 2 * 32 * 32, VOCAB_SIZE * 32  # two layers with four gates, each with two matrices
    assert network_cost(RECIPES["lstm"], VOCAB_SIZE).flops() == 6 * 24 * cell + 2 * 8 * cell + 6 * 32 * head
    hidden, head = 48 * 4 * 32, VOCAB_SIZE * (48 + 1)  # the window has three more positions
    assert network_cost(RECIPES["feed_forward"], VOCAB_SIZE).flops() == 6 * 27 * (hidden + head)
    cost = network_cost(RECIPES["bahdanau"], VOCAB_SIZE, ExampleSize(48, 28, 28, 20, 20))
    encoder = 2 * 3 * 32 * (32 + 32) + 64 * 32  # two directions with three gates each, and the keys of attention
    decoder = 3 * 32 * (32 + 64 + 32) + 32 * 32 + (64 + 64) * 64 + VOCAB_SIZE * 32  # gates, query, readout and head
    bridge, means = 64 * 32, 20 * 28 * 64
    assert cost.flops() == 6 * (20 * encoder + 28 * decoder + bridge + means)


@pytest.mark.parametrize(
    ("name", "vocab_size", "precision"),
    [
        ("masked modern", 2000, "fp32"),
        ("masked modern", 100, "bf16"),
        ("masked bert", 2000, "bf16"),
        ("masked modernbert", 100, "fp32"),
        ("classifier bert", 100, "fp32"),
        ("classifier decoder", 2000, "bf16"),
        ("classifier without pooler", 100, "fp32"),
        ("transformer", 100, "fp32"),
        ("transformer", 2000, "bf16"),
        ("modern", 2000, "fp32"),
        ("modern with biases", 100, "bf16"),
        ("untied", 2000, "fp32"),
        ("bahdanau", 100, "fp32"),
        ("bahdanau", 2000, "fp32"),
        ("sutskever", 100, "fp32"),
        ("sutskever", 2000, "bf16"),
        ("deep", 2000, "fp32"),
        ("bidirectional without attention", 100, "bf16"),
        ("bidirectional without attention", 2000, "fp32"),
        ("rnn", 100, "fp32"),
        ("lstm", 100, "fp32"),
        ("lstm", 2000, "fp32"),
        ("gru", 100, "fp32"),
        ("tied gru", 2000, "fp32"),
        ("feed_forward", 100, "fp32"),
        ("feed_forward", 2000, "fp32"),
        ("direct", 100, "fp32"),
        ("one_hot", 100, "fp32"),
    ],
)
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
        loss.backward()  # type: ignore[no-untyped-call]

    counted = cost.activation_bytes(PassConfig(vocab_size, 16, precision))
    recurrent = "encoder" not in loaded.model.architecture or loaded.model.architecture == "recurrent_encoder_decoder"
    assert counted == pytest.approx(peak_bytes(work), rel=0.2 if recurrent else 0.15)


@pytest.mark.parametrize("vocab_size", [61, 4000])
@pytest.mark.parametrize("name", ["transformer", "modern"])
def test_evaluation_bytes_match_the_peak_of_an_evaluation_batch(name: str, vocab_size: int) -> None:
    loaded = RECIPES[name]
    rows = 4096 // (SOURCE + TARGET)
    batch, size = batch_and_size(loaded, rows, vocab_size)
    network, cost = network_and_cost(loaded, size, vocab_size)

    @torch.no_grad()
    def work() -> None:
        pair_losses(network.eval(), batch)

    assert max(cost.evaluation_bytes()) == pytest.approx(peak_bytes(work), rel=0.15)
