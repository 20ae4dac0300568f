"""A model and an objective defined outside the library can be trained, resumed, evaluated, sampled and listed."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bigram
import numpy as np
import pytest
import torch
import training_processes
from bigram import BigramSection, SparseLMObjective
from command import tinylm
from safetensors.torch import load_file

from tinylm.data.datasets import TokenStream
from tinylm.data.prepare import prepare
from tinylm.embedding.from_run import contextual_vectors, static_vectors
from tinylm.errors import InputError
from tinylm.evaluation.evaluate_run import evaluate_run
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.interchange.exporting import export
from tinylm.model import registry
from tinylm.model.base import Model
from tinylm.model.init_from import check_compatible, load_pretrained
from tinylm.optim import groups
from tinylm.pipeline import train
from tinylm.recipe import Recipe, loads
from tinylm.recipe.schema import AdamWOptimizer, MuonOptimizer
from tinylm.reporting import SILENT, CollectingReporter
from tinylm.run import Run
from tinylm.training.compilation import Trial, compile_units

RECIPE = """\
name: bigrams
seed: 3
data: {{train: {text}, heldout: {{share: 0.1, by: tail}}}}
tokenizer: {{kind: bpe, vocab_size: 300}}
model: {{architecture: bigram, context_length: 32}}
training:
  {{steps: 14, global_batch_size: 8, micro_batch_size: 4, precision: fp32, compile: off, log_every: 1,
  optimizer: {{name: adamw, lr: 0.1}}}}
evaluation: {{every: 7}}
checkpoint: {{every: 2}}
sampling: {{every: 7, prompts: [The], max_new_tokens: 5}}
"""


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    with bigram.registered():
        yield


@pytest.fixture(scope="module")
def recipe(short_file: Path) -> Recipe:
    return loads(RECIPE.format(text=short_file))


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "bigrams"
    train(recipe, folder, device="cpu")
    return Run.open(folder)


def _table(run: Run) -> torch.Tensor:
    """Return the last checkpoint's table of logits (vocabulary, vocabulary)."""
    return load_file(run.checkpoint("last").path / "model.safetensors")["table.weight"]


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    last = run.checkpoint("last").path
    return {name: tensor for file in sorted(last.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _losses(run: Run) -> list[tuple[Any, ...]]:
    return [tuple(line.get(key) for key in ("kind", "step", "loss", "val_loss", "batch")) for line in run.metrics()]


def test_the_recipe_selects_the_architecture_and_its_default_objective(recipe: Recipe) -> None:
    assert type(recipe.model) is BigramSection
    assert type(recipe.objective) is SparseLMObjective


def test_the_first_step_changes_only_rows_with_a_gradient(recipe: Recipe, tmp_path: Path) -> None:
    """The table is initialized to zeros, so the first loss is log(vocabulary size)."""
    train(recipe, tmp_path / "one", device="cpu", stop_after=0.0)
    run = Run.open(tmp_path / "one")
    first = next(line for line in run.metrics() if line["kind"] == "step")
    assert first["loss"] == pytest.approx(np.log(run.tokenizer.vocab_size), rel=1e-6)
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    tokens = TokenStream(prepared.train.tokens, 32, recipe.seed).examples(0, 8)["tokens"]
    predicting = {
        int(token)
        for position, example in enumerate(tokens)
        for token in example[:-1][bigram.kept_targets(recipe.seed, position, 32, 0.5)]
    }
    changed = _table(run).any(dim=1).nonzero().flatten().tolist()
    assert set(changed) == predicting
    assert 0 < len(predicting) < len(set(tokens[:, :-1].flatten().tolist()))


def test_resuming_a_killed_run_produces_bitwise_equal_weights(recipe: Recipe, run: Run, tmp_path: Path) -> None:
    processes = training_processes.start(
        recipe, tmp_path / "killed", observer=training_processes.Killer(9), registered=bigram.registered
    )
    assert training_processes.wait(processes) == [-signal.SIGKILL]
    before = Run.open(tmp_path / "killed")
    assert 0 < before.checkpoint("last").step < 9
    train(recipe, before.path, device="cpu", resume=True)
    resumed = Run.open(before.path)
    assert _losses(resumed) == _losses(run)
    tensors, expected = _tensors(resumed), _tensors(run)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    assert (resumed.path / "samples.md").read_text() == (run.path / "samples.md").read_text()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_the_same_model_up_to_rounding(recipe: Recipe, run: Run, parallel: str, tmp_path: Path) -> None:
    training = recipe.training.model_copy(update={"parallel": parallel})
    distributed = recipe.model_copy(update={"training": training})
    training_processes.run(distributed, tmp_path / "both", world_size=2, registered=bigram.registered)
    both = Run.open(tmp_path / "both")
    assert json.loads((both.path / "environment.json").read_text())["parallel"] == parallel
    torch.testing.assert_close(_table(both), _table(run), atol=1e-5, rtol=1e-4)
    assert (both.path / "samples.md").read_text() == (run.path / "samples.md").read_text()


def test_the_evaluated_loss_equals_the_mean_over_bigrams(run: Run) -> None:
    table = _table(run).double()
    logprobs = (table - table.logsumexp(dim=1, keepdim=True)).numpy()
    shard = run.heldout()
    nats, count = 0.0, 0
    for start, end in shard.documents():
        for before, token in zip(shard.tokens[start - 1 : end - 1], shard.tokens[start:end], strict=True):
            if token != shard.end_of_text:
                nats, count = nats - logprobs[before, token], count + 1
    evaluated = evaluate_run(run, checkpoint="last", device="cpu").perplexity
    assert evaluated.tokens == count
    assert evaluated.loss == pytest.approx(nats / count, rel=1e-6)
    assert evaluated.loss < 0.9 * np.log(run.tokenizer.vocab_size)
    logged = [line["val_loss"] for line in run.metrics() if line["kind"] == "eval"]
    assert logged[-1] == pytest.approx(evaluated.loss, rel=1e-6)


def test_greedy_samples_follow_the_table(run: Run) -> None:
    network = run.network(run.checkpoint("last"), torch.device("cpu"))
    assert isinstance(network, bigram.Bigram)
    [sample] = generate(network, run.tokenizer, "The", SamplingOptions(max_new_tokens=40, temperature=0.0))
    expected = run.tokenizer.encode("The")[-1:]
    while len(expected) < 41 and expected[-1] != run.tokenizer.end_of_text:
        expected.append(int(_table(run)[expected[-1]].argmax()))
    assert sample.token_ids == [id for id in expected[1:] if id != run.tokenizer.end_of_text]


def test_tinylm_runs_lists_a_run_with_an_unregistered_architecture(run: Run) -> None:
    result = tinylm("runs", run.path.parent, "--json")
    assert result.returncode == 0, result.stderr
    [row] = json.loads(result.stdout)
    assert (row["name"], row["step"]) == ("bigrams", 14)
    assert row["best_val_loss"] == min(line["val_loss"] for line in run.metrics() if line["kind"] == "eval")


def test_auto_settings_are_chosen_without_a_cost_estimate(recipe: Recipe, tmp_path: Path) -> None:
    training = {"micro_batch_size": "auto", "precision": "auto", "compile": "auto", "steps": 2}
    reporter = CollectingReporter()
    train(
        recipe.model_copy(update={"training": recipe.training.model_copy(update=training)}),
        tmp_path / "auto",
        device="cpu",
        threads="auto",
        reporter=reporter,
    )
    run = Run.open(tmp_path / "auto")
    assert run.recipe.training.micro_batch_size == 8
    assert any("architecture bigram" in note for note in reporter.notes)
    assert all(line["mfu"] is None for line in run.metrics() if line["kind"] == "step")


def test_init_from_loads_the_table_and_rejects_another_architecture(run: Run, recipe: Recipe) -> None:
    network = registry.build(recipe.model, run.tokenizer.vocab_size, seed=0)
    source = run.network(run.checkpoint("last"), torch.device("cpu"))
    assert load_pretrained(network, source, same_tokenizer=True) == []
    assert torch.equal(network.get_parameter("table.weight"), _table(run))
    check_compatible(recipe.model, run.recipe.model)
    decoder = loads("data: {train: x}\ntraining: {steps: 1}", check_files=False).model
    with pytest.raises(InputError, match=r"model\.architecture bigram \(source: decoder\)"):
        check_compatible(recipe.model, decoder)


def test_a_model_without_units_is_compiled_as_a_whole(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    network = registry.build(recipe.model, 20, seed=0)
    compiled: list[Model] = []
    monkeypatch.setattr(bigram.Bigram, "compile", lambda self, **options: compiled.append(self))
    monkeypatch.setattr(Trial, "run", lambda self: None)
    compile_units(network, Trial.__new__(Trial), required=True, reporter=SILENT)
    assert compiled == [network]


def test_adamw_updates_the_table_and_muon_rejects_a_model_without_matrices(recipe: Recipe) -> None:
    network = registry.build(recipe.model, 20, seed=0)
    assert list(groups.build(AdamWOptimizer(name="adamw"), network).parts) == ["adamw"]
    with pytest.raises(InputError, match="Muon updates matrices, and this model has none"):
        groups.build(MuonOptimizer(name="muon"), network)


@pytest.mark.parametrize("format", ["hf", "gguf", "onnx"])
def test_exports_reject_an_unsupported_architecture(run: Run, format: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bigram"):
        export(run, format, tmp_path / "exported")


def test_vectors_need_a_model_with_embeddings_and_blocks(run: Run) -> None:
    with pytest.raises(InputError, match="a model with the bigram architecture has no input embedding"):
        static_vectors(run, run.checkpoint(), "input")
    with pytest.raises(InputError, match="a model with the bigram architecture has no residual stream"):
        contextual_vectors(run, run.checkpoint(), ["-"])


def test_weights_that_do_not_match_the_recipe_are_rejected(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "copy")
    recipe = (
        run.recipe.to_yaml()
        .replace("architecture: bigram", "architecture: decoder")
        .replace("name: sparse_lm, share: 0.5", "name: causal_lm")
    )
    (tmp_path / "copy" / "recipe.yaml").write_text(recipe)
    copy = Run.open(tmp_path / "copy")
    with pytest.raises(InputError, match="does not match the recipe: 0 layers instead of 6"):
        copy.network(copy.checkpoint(), torch.device("cpu"))


def test_an_architecture_can_be_registered_only_once() -> None:
    with pytest.raises(ValueError, match="bigram already exists"):
        registry.register(BigramSection, bigram.Bigram)
