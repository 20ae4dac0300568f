"""A fine-tuning recipe inherits from its source run, the model learns the new text, and the result is an ordinary run."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import training_processes
from safetensors.torch import load_file

from tinylm.errors import InputError, WorkError
from tinylm.evaluation.evaluate_run import evaluate_run
from tinylm.interchange.card import model_card
from tinylm.interchange.generation_check import Snippet
from tinylm.pipeline import train
from tinylm.recipe import Recipe, RecipeError, load, loads
from tinylm.reporting import CollectingReporter
from tinylm.run import Run
from tinylm.training.replay import replay

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def code_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of Python source code. The tiny run was trained on English text."""
    path = tmp_path_factory.mktemp("code") / "code.txt"
    path.write_text(Path(shutil.__file__).read_text(encoding="utf-8")[:30_000], encoding="utf-8")
    return path


def recipe_from(run: Run, text: Path, *overrides: str) -> Recipe:
    return loads(
        f"data: {{train: {text}}}\nmodel: {{init_from: {run.path}}}\n"
        "training: {steps: 12, global_batch_size: 4, micro_batch_size: 4, precision: fp32, compile: off}\n"
        "evaluation: {every: 6}\ncheckpoint: {every: 3, keep: 1}\n",
        overrides,
    )


def bits_per_byte(run: Run, text: Path) -> float:
    return evaluate_run(run, [str(text)], device="cpu").perplexity.bits_per_byte


def test_a_recipe_inherits_the_model_and_tokenizer_of_its_source_run(tiny_run: Run, text_file: Path) -> None:
    recipe = recipe_from(tiny_run, text_file, "model.dropout=0.2")
    expected = tiny_run.recipe.model.model_dump() | {"dropout": 0.2, "init_from": {"run": str(tiny_run.path), "head": True}}
    assert recipe.model.model_dump() == expected
    assert recipe.tokenizer.model_dump() == {"kind": "file", "path": str(tiny_run.path / "tokenizer.json")}
    from_checkpoint = loads(
        f"data: {{train: {text_file}}}\nmodel: {{init_from: {tiny_run.checkpoint('last').path}}}\ntraining: {{steps: 1}}"
    )
    assert from_checkpoint.model.n_embd == tiny_run.recipe.model.n_embd


def test_fine_tuning_starts_from_the_weights_of_the_source_run_and_learns_the_new_text(
    tiny_run: Run, code_file: Path, text_file: Path, tmp_path: Path
) -> None:
    reporter = CollectingReporter()
    train(recipe_from(tiny_run, code_file), tmp_path / "tuned", device="cpu", reporter=reporter)
    assert f"initializing from {tiny_run.path} {tiny_run.checkpoint().name}" in reporter.notes
    tuned = Run.open(tmp_path / "tuned")
    first_loss = next(line["loss"] for line in tuned.metrics())
    assert first_loss < 5.5, "with random weights, the loss would be about log(400) = 6"
    assert bits_per_byte(tuned, code_file) < bits_per_byte(tiny_run, code_file)
    assert bits_per_byte(tuned, text_file) != bits_per_byte(tiny_run, text_file)


def test_lora_trains_only_its_own_weights_and_is_merged_when_loaded(tiny_run: Run, code_file: Path, tmp_path: Path) -> None:
    reporter = CollectingReporter()
    recipe = recipe_from(tiny_run, code_file, "training.lora={rank: 4}", "training.optimizer={lr: 0.02}")
    assert recipe.training.optimizer.name == "adamw"
    train(recipe, tmp_path / "tuned", device="cpu", reporter=reporter)
    assert any(note.startswith("LoRA: training 4,096 of ") for note in reporter.notes)
    tuned = Run.open(tmp_path / "tuned")
    saved = load_file(tuned.checkpoint("last").path / "model.safetensors")
    before = load_file(tiny_run.checkpoint().path / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())
    assert {name.rpartition(".")[2] for name in saved.keys() - before.keys()} == {"lora_a", "lora_b"}
    network = tuned.network(tuned.checkpoint("last"), CPU)
    assert set(network.state_dict()) - {"head.weight"} == set(before) - {"head.weight"}
    assert bits_per_byte(tuned, code_file) < bits_per_byte(tiny_run, code_file)

    again = recipe_from(tuned, code_file, "training.steps=1", "training.optimizer={name: adamw, lr: 1e-9}")
    train(again, tmp_path / "further", device="cpu")
    assert bits_per_byte(Run.open(tmp_path / "further"), code_file) == pytest.approx(bits_per_byte(tuned, code_file), abs=1e-3)


@pytest.mark.parametrize("lora", [False, True])
def test_a_stopped_run_resumes_exactly_even_if_its_source_run_was_removed(
    lora: bool, tiny_run: Run, code_file: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_run.path, source)
    extra = ("training.lora={}",) if lora else ()
    recipe = recipe_from(Run.open(source), code_file, *extra, f"tokenizer.path={tiny_run.path / 'tokenizer.json'}")
    train(recipe, tmp_path / "full", device="cpu")
    train(recipe, tmp_path / "parts", device="cpu", stop_after=0.0)
    shutil.rmtree(source)
    train(load(tmp_path / "parts" / "recipe.yaml", check_files=False), tmp_path / "parts", device="cpu", resume=True)
    expected, actual = (
        load_file(Run.open(tmp_path / name).checkpoint("last").path / "model.safetensors") for name in ("full", "parts")
    )
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_run_killed_before_its_first_checkpoint_starts_again_from_its_source_run(
    tiny_run: Run, code_file: Path, tmp_path: Path
) -> None:
    recipe = recipe_from(tiny_run, code_file)
    train(recipe, tmp_path / "full", device="cpu")
    shutil.copytree(tmp_path / "full", tmp_path / "killed", ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl"))
    train(recipe, tmp_path / "killed", device="cpu", resume=True)
    expected, actual = (
        load_file(Run(tmp_path / name).checkpoint("last").path / "model.safetensors") for name in ("full", "killed")
    )
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.skipif(os.name == "nt", reason="gloo is tested only on POSIX")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_learn_the_same_lora_weights_as_one_process(
    kind: str, tiny_run: Run, code_file: Path, tmp_path: Path
) -> None:
    settings = ("training.lora={rank: 4}", "training.micro_batch_size=2", f"training.parallel={kind}")
    recipe = recipe_from(tiny_run, code_file, *settings, "sampling.every=6", "sampling.prompts=[The]", "checkpoint.every=6")
    train(recipe, tmp_path / "one", device="cpu")
    training_processes.run(recipe, tmp_path / "two", world_size=2)
    one, two = (load_file(Run(tmp_path / name).checkpoint("last").path / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-2, msg=name)
    val_losses = [
        [line["val_loss"] for line in Run(tmp_path / name).metrics() if line["kind"] == "eval"] for name in ("one", "two")
    ]
    assert val_losses[0] == pytest.approx(val_losses[1], abs=1e-4)
    assert (tmp_path / "one" / "samples.md").read_text() == (tmp_path / "two" / "samples.md").read_text()


def test_an_unrecoverable_step_with_lora_can_be_replayed(tiny_run: Run, code_file: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkError):
        train(
            recipe_from(tiny_run, code_file, "training.lora={alpha: 1000}", "training.optimizer={lr: 1000}"),
            tmp_path / "run",
            device="cpu",
        )
    [report] = (tmp_path / "run" / "reports").iterdir()
    replayed = replay(report)
    assert replayed.agreement == "bits"
    assert {name.rpartition(".")[2] for name in replayed.gradients} == {"lora_a", "lora_b"}


def test_a_different_tokenizer_requires_a_new_head(tiny_run: Run, code_file: Path, tmp_path: Path) -> None:
    recipe = recipe_from(tiny_run, code_file, "tokenizer={kind: byte}", "training.steps=1")
    with pytest.raises(InputError, match="the tokenizer differs from the source run's"):
        train(recipe, tmp_path / "tuned", device="cpu")
    assert not (tmp_path / "tuned").exists()
    reporter = CollectingReporter()
    settings = ("tokenizer={kind: byte}", "training.steps=1", f"model.init_from={{run: {tiny_run.path}, head: off}}")
    train(recipe_from(tiny_run, code_file, *settings), tmp_path / "tuned", device="cpu", reporter=reporter)
    assert "initialized at random: embedding.weight, head.weight" in reporter.notes


@pytest.mark.parametrize(
    ("model", "training", "message"),
    [
        ("{init_from: nowhere}", "{steps: 1}", "model.init_from: nowhere: no such run"),
        ("{init_from: {rnu: a}}", "{steps: 1}", "model.init_from.rnu: unknown key (did you mean run?)"),
        ("{}", "{steps: 1, lora: {rank: 4}}", "training.lora: requires a trained model to adapt"),
        ("{init_from: RUN}", "{steps: 1, lora: {}, optimizer: muon}", "training.optimizer: must be adamw if lora is set"),
        ("{init_from: RUN}", "{steps: 1, lora: {rank: 0}}", "training.lora.rank: must be a whole number of at least 1"),
        ("{init_from: RUN}", "{steps: 1, lora: {targets: [attention]}}", "training.lora.targets: must be a list of attention.qkv,"),
    ],
)
def test_an_invalid_fine_tuning_recipe_is_rejected(model: str, training: str, message: str, tiny_run: Run, text_file: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        loads(f"data: {{train: {text_file}}}\nmodel: {model.replace('RUN', str(tiny_run.path))}\ntraining: {training}\n")
    assert message in str(caught.value)


def test_an_unsuitable_source_run_is_rejected_before_any_text_is_read(tiny_run: Run, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        train(recipe_from(Run(tmp_path), text_file), tmp_path / "a")
    with pytest.raises(InputError, match=r"model\.n_layer 3 \(source: 2\)"):
        train(recipe_from(tiny_run, text_file, "model.n_layer=3"), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_held_out_text_that_the_source_run_was_trained_on_is_reported_everywhere(
    tiny_run: Run, text_file: Path, tmp_path: Path
) -> None:
    """The new run is trained on other text, so only the n-grams recorded by the source run reveal the overlap."""
    known = tmp_path / "known.txt"
    known.write_text(text_file.read_text(encoding="utf-8")[:9000], encoding="utf-8")
    reporter = CollectingReporter()
    recipe = recipe_from(tiny_run, Path(shutil.__file__), f"data.heldout={known}", "training.steps=1")
    train(recipe, tmp_path / "tuned", device="cpu", reporter=reporter)
    expected = f"of the held-out text also occurs in the training text of {tiny_run.name}"
    assert any(expected in warning for warning in reporter.warnings)
    run = Run.open(tmp_path / "tuned")
    own, inherited = evaluate_run(run, device="cpu").as_dict()["trained_on"]
    assert (own["run"], inherited["run"]) == (None, tiny_run.name)
    assert own["share"] < 0.01
    assert inherited["share"] > 0.98
    assert inherited["sources"] == [str(text_file)]
    card = model_card(run, run.checkpoint(), 1, "Class", (), Snippet("Once", 3, False))
    assert f"started from the weights of the run `{tiny_run.name}`, which was trained on `{text_file}`" in card
    assert re.search(rf"\d+% of the text's \d+-token sequences also occur in the training text of {tiny_run.name}", card)


def test_an_unrecorded_training_text_is_reported_as_unknown(tiny_run: Run, code_file: Path, tmp_path: Path) -> None:
    old = shutil.copytree(tiny_run.path, tmp_path / "old")
    shutil.rmtree(old / "training_text")
    reporter = CollectingReporter()
    recipe = recipe_from(Run.open(old), code_file, "training.steps=1", "data.test=0.1")
    train(recipe, tmp_path / "tuned", device="cpu", reporter=reporter)
    assert any("not known how much of the held-out text occurs in the training text of old" in note for note in reporter.notes)
    run = Run.open(tmp_path / "tuned")
    card = model_card(run, run.checkpoint(), 1, "Class", (), Snippet("Once", 3, False))
    assert "the overlap with the training text of old is unknown" in card
    rows = [line.split(" | ")[0] for line in card.splitlines() if line.startswith("| ")]
    assert rows == ["| split", "| held-out, used to choose the checkpoint", "| test, never used during training"]
