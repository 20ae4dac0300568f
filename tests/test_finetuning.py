"""Recipes that start from a run: what they inherit, what they learn, and that the result is a run like any other."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import lives
import pytest
import torch
from safetensors.torch import load_file

from tinylm.errors import InputError, WorkError
from tinylm.evaluation.measure import measure
from tinylm.pipeline import train
from tinylm.recipe import Recipe, RecipeError, load, loads
from tinylm.reporting import CollectingReporter
from tinylm.run import Run
from tinylm.training.replay import replay

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def second_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python source: unlike the English that the tiny run learned."""
    path = tmp_path_factory.mktemp("second") / "code.txt"
    path.write_text(Path(shutil.__file__).read_text(encoding="utf-8")[:30_000], encoding="utf-8")
    return path


def recipe_from(run: Run, text: Path, *overrides: str) -> Recipe:
    return loads(
        f"data: {{train: {text}}}\nmodel: {{init_from: {run.path}}}\n"
        "training: {steps: 12, global_batch_size: 4, micro_batch_size: 4, precision: fp32, compile: off}\n"
        "evaluation: {every: 6}\ncheckpoint: {every: 3, keep: 1}\n",
        overrides,
    )


def bits(run: Run, text: Path) -> float:
    return measure(run, [str(text)], device="cpu").perplexity.bits_per_byte


def test_a_recipe_has_the_parts_and_the_tokenizer_of_the_run_it_starts_from(tiny_run: Run, text_file: Path) -> None:
    recipe = recipe_from(tiny_run, text_file, "model.dropout=0.2")
    expected = tiny_run.recipe.model.model_dump() | {"dropout": 0.2, "init_from": {"run": str(tiny_run.path), "head": True}}
    assert recipe.model.model_dump() == expected
    assert recipe.tokenizer.model_dump() == {"kind": "file", "path": str(tiny_run.path / "tokenizer.json")}
    from_checkpoint = loads(
        f"data: {{train: {text_file}}}\nmodel: {{init_from: {tiny_run.checkpoint('last').path}}}\ntraining: {{steps: 1}}"
    )
    assert from_checkpoint.model.n_embd == tiny_run.recipe.model.n_embd


def test_training_on_starts_where_the_run_stood_and_learns_the_second_text(
    tiny_run: Run, second_text: Path, text_file: Path, tmp_path: Path
) -> None:
    reporter = CollectingReporter()
    train(recipe_from(tiny_run, second_text), tmp_path / "tuned", device="cpu", reporter=reporter)
    assert f"starting from {tiny_run.path} {tiny_run.checkpoint().name}" in reporter.notes
    tuned = Run.open(tmp_path / "tuned")
    first_loss = next(line["loss"] for line in tuned.metrics())
    assert first_loss < 5.5, "from chance it would be log 400 = 6"
    assert bits(tuned, second_text) < bits(tiny_run, second_text)
    assert bits(tuned, text_file) != bits(tiny_run, text_file)


def test_lora_changes_nothing_but_its_additions_and_merges_by_itself(tiny_run: Run, second_text: Path, tmp_path: Path) -> None:
    reporter = CollectingReporter()
    recipe = recipe_from(tiny_run, second_text, "training.lora={rank: 4}", "training.optimizer={lr: 0.02}")
    assert recipe.training.optimizer.name == "adamw"
    train(recipe, tmp_path / "tuned", device="cpu", reporter=reporter)
    assert any(note.startswith("LoRA: 4,096 of ") for note in reporter.notes)
    tuned = Run.open(tmp_path / "tuned")
    saved = load_file(tuned.checkpoint("last").path / "model.safetensors")
    before = load_file(tiny_run.checkpoint().path / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())
    assert {name.rpartition(".")[2] for name in saved.keys() - before.keys()} == {"lora_a", "lora_b"}
    network = tuned.network(tuned.checkpoint("last"), CPU)
    assert set(network.state_dict()) - {"head.weight"} == set(before) - {"head.weight"}
    assert bits(tuned, second_text) < bits(tiny_run, second_text)

    again = recipe_from(tuned, second_text, "training.steps=1", "training.optimizer={name: adamw, lr: 1e-9}")
    train(again, tmp_path / "further", device="cpu")
    assert bits(Run.open(tmp_path / "further"), second_text) == pytest.approx(bits(tuned, second_text), abs=1e-3)


@pytest.mark.parametrize("lora", [False, True])
def test_a_stopped_training_goes_on_as_if_it_had_not_been_even_when_its_source_is_gone(
    lora: bool, tiny_run: Run, second_text: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_run.path, source)
    extra = ("training.lora={}",) if lora else ()
    recipe = recipe_from(Run.open(source), second_text, *extra, f"tokenizer.path={tiny_run.path / 'tokenizer.json'}")
    train(recipe, tmp_path / "whole", device="cpu")
    train(recipe, tmp_path / "parts", device="cpu", stop_after=0.0)
    shutil.rmtree(source)
    train(load(tmp_path / "parts" / "recipe.yaml", check_files=False), tmp_path / "parts", device="cpu", resume=True)
    one, other = (load_file(Run.open(tmp_path / name).checkpoint("last").path / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_training_that_was_killed_before_its_first_checkpoint_begins_at_its_source(
    tiny_run: Run, second_text: Path, tmp_path: Path
) -> None:
    recipe = recipe_from(tiny_run, second_text)
    train(recipe, tmp_path / "whole", device="cpu")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed", ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl"))
    train(recipe, tmp_path / "killed", device="cpu", resume=True)
    one, other = (load_file(Run(tmp_path / name).checkpoint("last").path / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.skipif(os.name == "nt", reason="gloo")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_learn_the_additions_that_one_learns(kind: str, tiny_run: Run, second_text: Path, tmp_path: Path) -> None:
    settings = ("training.lora={rank: 4}", "training.micro_batch_size=2", f"training.parallel={kind}")
    recipe = recipe_from(tiny_run, second_text, *settings, "sampling.every=6", "sampling.prompts=[The]", "checkpoint.every=6")
    train(recipe, tmp_path / "one", device="cpu")
    lives.run(recipe, tmp_path / "two", count=2)
    one, two = (load_file(Run(tmp_path / name).checkpoint("last").path / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-2, msg=name)
    measured = [[line["val_loss"] for line in Run(tmp_path / name).metrics() if line["kind"] == "eval"] for name in ("one", "two")]
    assert measured[0] == pytest.approx(measured[1], abs=1e-4)
    assert (tmp_path / "one" / "samples.md").read_text() == (tmp_path / "two" / "samples.md").read_text()


def test_a_step_of_low_rank_additions_that_was_beyond_help_is_done_again(tiny_run: Run, second_text: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkError):
        train(
            recipe_from(tiny_run, second_text, "training.lora={}", "training.optimizer={lr: 1e30}"), tmp_path / "run", device="cpu"
        )
    [report] = (tmp_path / "run" / "reports").iterdir()
    again = replay(report)
    assert again.same == "bits"
    assert {name.rpartition(".")[2] for name in again.gradients} == {"lora_a", "lora_b"}


def test_another_tokenizer_needs_a_new_head(tiny_run: Run, second_text: Path, tmp_path: Path) -> None:
    recipe = recipe_from(tiny_run, second_text, "tokenizer={kind: byte}", "training.steps=1")
    with pytest.raises(InputError, match="the tokenizer is not that run's"):
        train(recipe, tmp_path / "tuned", device="cpu")
    assert not (tmp_path / "tuned").exists()
    reporter = CollectingReporter()
    settings = ("tokenizer={kind: byte}", "training.steps=1", f"model.init_from={{run: {tiny_run.path}, head: off}}")
    train(recipe_from(tiny_run, second_text, *settings), tmp_path / "tuned", device="cpu", reporter=reporter)
    assert "starting anew: embedding.weight, head.weight" in reporter.notes


@pytest.mark.parametrize(
    ("model", "training", "told"),
    [
        ("{init_from: nowhere}", "{steps: 1}", "model.init_from: nowhere: no such run"),
        ("{init_from: {rnu: a}}", "{steps: 1}", "model.init_from.rnu: unknown key (did you mean run?)"),
        ("{}", "{steps: 1, lora: {rank: 4}}", "training.lora: adapts a model that is trained already"),
        ("{init_from: RUN}", "{steps: 1, lora: {}, optimizer: muon}", "training.optimizer: with lora it is adamw"),
        ("{init_from: RUN}", "{steps: 1, lora: {rank: 0}}", "training.lora.rank: must be a whole number of at least 1"),
        ("{init_from: RUN}", "{steps: 1, lora: {targets: [attention]}}", "training.lora.targets: must be a list of attention.qkv,"),
    ],
)
def test_a_recipe_that_cannot_start_so_is_refused(model: str, training: str, told: str, tiny_run: Run, text_file: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        loads(f"data: {{train: {text_file}}}\nmodel: {model.replace('RUN', str(tiny_run.path))}\ntraining: {training}\n")
    assert told in str(caught.value)


def test_a_source_that_does_not_fit_is_told_before_the_text_is_read(tiny_run: Run, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        train(recipe_from(Run(tmp_path), text_file), tmp_path / "a")
    with pytest.raises(InputError, match=r"model\.n_layer 3 \(there: 2\)"):
        train(recipe_from(tiny_run, text_file, "model.n_layer=3"), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
