"""Test the estimated sizes of labeled texts and sentence pairs, and the plans that they result in."""

from __future__ import annotations

from pathlib import Path

import pytest
from encoders import classifier_recipe, masked_recipe
from pairs import REVERSE, reversed_pairs, write_jsonl
from planning import IDLE

from tinylm.cost.plan import Plan, make_plan
from tinylm.data import estimate, formats
from tinylm.data.estimate import DataSize, estimate_data_size
from tinylm.model import registry
from tinylm.recipe import Recipe, loads
from tinylm.reporting import SILENT


def pairs_recipe(folder: Path, *settings: str) -> Recipe:
    file = write_jsonl(folder / "pairs.jsonl", reversed_pairs(300))
    return loads(REVERSE.format(pairs=file, preset="modern", steps=10), settings)


def planned(data: DataSize) -> Plan:
    tokens = data.tokens
    return make_plan(data.recipe, tokens.vocab_size, tokens.train_tokens, size=data.example, processor=IDLE)


@pytest.mark.parametrize("kind", ["labels", "pairs", "separate", "batch_tokens"])
def test_a_plan_matches_the_dataset_and_the_network(kind: str, tmp_path: Path) -> None:
    settings = ["data.vocabulary=separate", "model.tie_embeddings=output"] if kind == "separate" else []
    settings = ["data.batch_tokens=100"] if kind == "batch_tokens" else settings
    recipe = classifier_recipe(tmp_path) if kind == "labels" else pairs_recipe(tmp_path, *settings)
    data = estimate_data_size(recipe, SILENT)
    data_format = formats.find(recipe.data)
    prepared = data_format.prepare(recipe, SILENT, 1)
    dataset = data_format.dataset(recipe, prepared)
    plan = planned(data)
    batch = recipe.training.global_batch_size
    assert plan.tokens_per_step == round(batch * dataset.tokens_per_example)
    assert plan.epochs == pytest.approx(plan.steps * batch / dataset.examples_per_epoch, rel=0.01)
    filled = prepared.fill_in(recipe)
    network = registry.build(filled.model, prepared.tokenizer.vocab_size, None, objective=filled.objective)
    assert plan.parameters == network.parameter_count()
    assert plan.not_estimated == ()
    assert plan.compute_optimal is None


@pytest.mark.parametrize("kind", ["labels", "pairs"])
def test_the_padded_length_is_that_of_the_batches_of_an_epoch(kind: str, tmp_path: Path) -> None:
    recipe = classifier_recipe(tmp_path) if kind == "labels" else pairs_recipe(tmp_path)
    size = estimate_data_size(recipe, SILENT).example
    assert size is not None
    data_format = formats.find(recipe.data)
    dataset = data_format.dataset(recipe, data_format.prepare(recipe, SILENT, 1))
    batch = recipe.training.global_batch_size
    widths = [dataset.examples(start, batch)["tokens"].shape[1] for start in range(0, dataset.examples_per_epoch, batch)]
    assert size.length == pytest.approx(sum(widths) / len(widths))
    assert size.longest == max(widths)


@pytest.mark.parametrize("kind", ["labels", "pairs"])
def test_the_size_of_large_data_is_estimated_from_a_sample(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = classifier_recipe(tmp_path) if kind == "labels" else pairs_recipe(tmp_path)
    exact = estimate_data_size(recipe, SILENT)
    monkeypatch.setattr(estimate, "EXACT_LIMIT_BYTES", 10)
    monkeypatch.setattr(estimate, "SAMPLE_CHARACTERS", 800)
    sampled = estimate_data_size(recipe, SILENT)
    assert (exact.tokens.exact, sampled.tokens.exact) == (True, False)
    labels = [getattr(data.recipe.objective, "labels", None) for data in (sampled, exact)]
    assert labels[0] == labels[1]
    assert exact.example is not None
    assert sampled.example is not None
    assert sampled.example.tokens == pytest.approx(exact.example.tokens, rel=0.1)
    assert sampled.example.source_length == pytest.approx(exact.example.source_length, rel=0.2)
    assert sampled.tokens.train_tokens == pytest.approx(exact.tokens.train_tokens, rel=0.15)


def test_the_vocabulary_of_an_encoder_includes_its_control_tokens(tmp_path: Path) -> None:
    recipe = masked_recipe(tmp_path)
    data = estimate_data_size(recipe, SILENT)
    prepared = formats.find(recipe.data).prepare(recipe, SILENT, 1)
    assert data.tokens.vocab_size == prepared.tokenizer.vocab_size
    assert data.tokens.train_tokens == len(prepared.train)
    assert data.example is None
    assert planned(data).tokens_per_step == recipe.training.global_batch_size * recipe.model.context_length
