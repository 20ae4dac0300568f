"""What is no number is left out, then gone back from, then reported; a report does its step again."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_recipe
from safetensors.torch import load_file, save_file

from tinylm.data.batches import Batches, fingerprint
from tinylm.data.prepare import prepare
from tinylm.errors import InputError, WorkError
from tinylm.model.transformer import Transformer
from tinylm.pipeline import train
from tinylm.recipe import Recipe
from tinylm.recipe.schema import GuardsSection
from tinylm.reporting import SILENT
from tinylm.run import Run
from tinylm.training import trainer as room
from tinylm.training.guards import Guard, Watch, robust_score
from tinylm.training.metrics import Observer
from tinylm.training.replay import replay
from tinylm.training.step import accumulate

Change = Callable[[Transformer, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def recipe(text_file: Path) -> Recipe:
    small = ("model.n_embd=16", "model.dropout=0.2", "training.micro_batch_size=2", "evaluation.max_tokens=200")
    return tiny_recipe(text_file, "modern", *small, "evaluation.every=10", "checkpoint.every=4", "training.steps=16")


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int], Change], list[Any]]:
    """Change what the n-th gradients are; returns the weights before each."""

    def install(which: set[int], change: Change) -> list[Any]:
        seen: list[Any] = []

        def spoiled(network: Transformer, *rest: Any) -> torch.Tensor:
            seen.append([parameter.detach().clone() for parameter in network.parameters()])
            loss = accumulate(network, *rest)
            return change(network, loss) if len(seen) in which else loss

        monkeypatch.setattr(room, "accumulate", spoiled)
        return seen

    return install


_GUARDED = ("skipped", "spike", "rollback")


def _nan_loss(network: Transformer, loss: torch.Tensor) -> torch.Tensor:
    return loss * math.nan


def _nan_gradient(network: Transformer, loss: torch.Tensor) -> torch.Tensor:
    network.blocks[1].attention.qkv.weight.grad[0, 0] = math.nan
    return loss


def _lines(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] in kinds]


class _Notes(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("change", [_nan_loss, _nan_gradient])
def test_a_step_without_numbers_changes_nothing_and_is_counted(change: Change, spoil: Any, recipe: Recipe, tmp_path: Path) -> None:
    weights, notes = spoil({6}, change), _Notes()
    result = train(recipe, tmp_path / "run", device="cpu", observer=notes)
    assert result.step == 16
    assert all(torch.equal(before, after) for before, after in zip(weights[5], weights[6], strict=True))
    assert not all(torch.equal(before, after) for before, after in zip(weights[4], weights[5], strict=True))
    [line] = _lines(tmp_path / "run", "skipped")
    assert (line["step"], line["cursor"]) == (6, 6 * 8)
    assert "nan" in line["reason"]
    assert notes.texts == [f"step 6: {line['reason']}"]
    assert [line["step"] for line in _lines(tmp_path / "run", "step")] == [*range(1, 6), *range(7, 17)]
    watch = Run(tmp_path / "run").checkpoint("last").state["watch"]
    assert (watch["skipped"], watch["in_a_row"], watch["rollbacks"]) == (1, 0, 0)


@pytest.mark.parametrize(("bad", "patience"), [({6}, 1), ({6}, 3), ({7, 8}, 3), ({10, 11, 12}, 3), ({16}, 3)])
def test_a_device_that_is_not_waited_for_leaves_out_the_same_steps(
    bad: set[int], patience: int, spoil: Any, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the update itself leaves everything as it is, and the host hears of it when the next step is under way."""
    section = recipe.training.model_copy(update={"guards": GuardsSection(patience=patience), "log_every": 5})
    seldom = recipe.model_copy(update={"training": section})
    behind: list[int] = []

    def late(trainer: room.Trainer, **rest: Any) -> Any:
        heard = hear(trainer, **rest)
        behind.append(len(trainer._pending_steps))
        return heard

    ends = []
    for name in ("at once", "late"):
        monkeypatch.setattr(room, "defers_results", lambda device, name=name: name == "late")
        hear = room.Trainer._collect_results
        monkeypatch.setattr(room.Trainer, "_collect_results", late)
        spoil(bad, _nan_gradient)
        train(seldom, tmp_path / name, device="cpu")
        monkeypatch.setattr(room.Trainer, "_collect_results", hear)
        assert (max(behind) == 1) == (name == "late" and patience > 1)
        kept = Run(tmp_path / name).checkpoint("last")
        told = [(line["kind"], line["step"], line["cursor"], line["reason"]) for line in _lines(tmp_path / name, *_GUARDED)]
        losses = {line["step"]: line["loss"] for line in _lines(tmp_path / name, "step")}
        ends.append(((kept.path / "model.safetensors").read_bytes(), kept.state["watch"], told, losses))
    assert ends[0] == ends[1]
    assert ends[0][1]["skipped"] == len(bad)


def test_after_some_in_a_row_it_goes_back_and_on_past_the_text_that_did_it(spoil: Any, recipe: Recipe, tmp_path: Path) -> None:
    weights = spoil({10, 11, 12}, _nan_gradient)  # the last checkpoint is that of step 8
    result = train(recipe, tmp_path / "run", device="cpu")
    assert result.step == 16
    assert len(weights) == 12 + 8
    assert all(torch.equal(before, after) for before, after in zip(weights[8], weights[12], strict=True)), "step 9 begins again"
    [back] = _lines(tmp_path / "run", "rollback")
    assert (back["step"], back["cursor"]) == (8, 12 * 8)
    steps = _lines(tmp_path / "run", "step")
    assert [line["step"] for line in steps] == list(range(1, 17)), "the log has each step once"
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    order = Batches(prepared.train.tokens, 32, recipe.seed)
    cursors = [8 * step for step in range(8)] + [8 * step for step in range(12, 20)]
    assert [line["batch"] for line in steps] == [f"{fingerprint(order.sequences(cursor, 8)):016x}" for cursor in cursors]


def test_a_training_that_went_back_and_was_stopped_is_resumed_to_the_bit(spoil: Any, recipe: Recipe, tmp_path: Path) -> None:
    bad = {10, 11, 12}
    spoil(bad, _nan_gradient)
    train(recipe, tmp_path / "whole", device="cpu")
    spoil(bad, _nan_gradient)

    class _StopsSoon(Observer):
        def guard(self, event: Any) -> None:
            if event.kind == "rollback":
                raise RuntimeError("killed here, in effect")

    with pytest.raises(RuntimeError, match="killed here"):
        train(recipe, tmp_path / "run", device="cpu", observer=_StopsSoon())
    spoil({2, 3, 4}, _nan_gradient)  # the same steps, counted from the checkpoint of step 8
    train(recipe, tmp_path / "run", device="cpu", resume=True)
    files = [Run(tmp_path / name).checkpoint("last").path / "model.safetensors" for name in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    losses = [[line["loss"] for line in _lines(tmp_path / name, "step")] for name in ("run", "whole")]
    assert losses[0] == losses[1]


def test_weights_that_are_no_numbers_are_never_saved_and_gone_back_from(spoil: Any, recipe: Recipe, tmp_path: Path) -> None:
    def poison(network: Transformer, loss: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            network.embedding.weight[0, 0] = math.nan  # after the gradient, so that this step looks good
        return loss

    spoil({7}, poison)
    result = train(recipe, tmp_path / "run", device="cpu")
    assert result.step == 16
    [back] = _lines(tmp_path / "run", "rollback")
    assert (back["step"], back["cursor"]) == (4, 8 * 8)
    assert "weights after step 8" in back["reason"]
    for checkpoint in Run(tmp_path / "run").checkpoints():
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint.path / "model.safetensors").values())


def test_nothing_to_go_back_to_ends_with_a_report(spoil: Any, recipe: Recipe, tmp_path: Path) -> None:
    spoil({1, 2, 3}, _nan_loss)
    with pytest.raises(
        WorkError, match=r"loss is nan in step 3, the last of 3 in a row; nothing was saved.*--replay .*step-000003"
    ):
        train(recipe, tmp_path / "run", device="cpu")
    assert (tmp_path / "run" / "reports" / "step-000003" / "report.json").exists()


@pytest.fixture(scope="module")
def reported(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a training whose weights overflow by themselves: nothing is injected."""
    folder = tmp_path_factory.mktemp("runs") / "wild"
    optimizer = {"optimizer": recipe.training.optimizer.model_copy(update={"lr": 3e37, "adamw_lr": 3e37})}
    guards = {"guards": GuardsSection(patience=2, rollbacks=1)}
    wild = recipe.model_copy(update={"training": recipe.training.model_copy(update={**optimizer, **guards})})
    with pytest.raises(WorkError) as caught:
        train(wild, folder, device="cpu")
    assert caught.value.exit_code == 1
    [report] = (folder / "reports").iterdir()
    assert str(report) in str(caught.value)
    return report


def test_a_report_does_the_step_again_to_the_bit(reported: Path) -> None:
    again = replay(reported)
    assert again.same == "bits"
    assert not math.isfinite(again.grad_norm)
    assert again.broken
    assert len(again.sequence_losses) == 8
    note = json.loads((reported / "report.json").read_text())
    assert note["grad_norm"] == str(again.grad_norm)
    assert set(note["gradients"]) == set(note["weights"]) == set(again.gradients)


def test_a_report_holds_the_text_of_its_batch(reported: Path, recipe: Recipe) -> None:
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    note = json.loads((reported / "report.json").read_text())
    expected = Batches(prepared.train.tokens, 32, recipe.seed).sequences(note["cursor"], 8)
    assert np.array_equal(load_file(reported / "batch.safetensors")["tokens"].numpy(), expected)
    texts = (reported / "texts.txt").read_text()
    for number, row in enumerate(expected.tolist()):
        assert f"--- sequence {number}\n{prepared.tokenizer.decode(row)}\n" in texts


def test_a_report_of_a_healthy_step_gives_its_loss_and_norms_with_dropout(spoil: Any, recipe: Recipe, tmp_path: Path) -> None:
    """What was injected is not in the report, so that the step comes out as it would have been: as in an undisturbed run."""
    real: list[float] = []

    def hide(network: Transformer, loss: torch.Tensor) -> torch.Tensor:
        real.append(float(loss))
        return loss * math.nan

    spoil({5, 6, 7}, hide)
    guards = recipe.training.model_copy(update={"guards": GuardsSection(rollbacks=0)})
    with pytest.raises(WorkError):
        train(recipe.model_copy(update={"training": guards}), tmp_path / "run", device="cpu")
    again = replay(tmp_path / "run" / "reports" / "step-000007")
    assert again.same == "different"
    assert again.loss == real[-1]
    norm = math.sqrt(sum(value**2 for value in again.report.gradients.values()))
    assert again.grad_norm == pytest.approx(norm, rel=1e-6) == pytest.approx(again.report.grad_norm, rel=1e-6)
    for name, value in again.gradients.items():
        assert value == pytest.approx(again.report.gradients[name], rel=1e-9)


@pytest.mark.parametrize("damage", ["report.json", "batch.safetensors", "model.safetensors"])
def test_a_damaged_report_is_told_as_such(damage: str, reported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "report"
    copy.mkdir()
    for file in reported.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / damage).write_bytes(b"\x80\x04rubbish")
    with pytest.raises(InputError):
        replay(copy)
    (copy / damage).unlink()
    with pytest.raises(InputError):
        replay(copy)


def test_a_report_whose_header_asks_for_more_than_it_holds_is_refused(reported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "report"
    copy.mkdir()
    for file in reported.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    save_file({"embedding.weight": torch.zeros(3, 3)}, copy / "model.safetensors")
    with pytest.raises(InputError, match="does not fit the recipe"):
        replay(copy)


def test_a_robust_score_is_that_of_numpy_and_deaf_to_outliers() -> None:
    values = np.random.default_rng(0).normal(3.0, 0.1, 64).tolist()
    middle = statistics.median(values)
    deviation = np.median(np.abs(np.array(values) - middle)) / 0.674489750196
    assert robust_score(3.9, values) == pytest.approx((3.9 - middle) / deviation, rel=1e-4)
    spoiled = [*values[:54], *[50.0] * 10]
    assert robust_score(3.9, spoiled) == pytest.approx(robust_score(3.9, values), rel=0.4)
    assert robust_score(3.9, values[:31]) is None
    assert robust_score(3.9, [1.0] * 64) is None


def test_a_jump_is_flagged_once_and_a_steady_loss_never(text_file: Path) -> None:
    guard = Guard(GuardsSection(), watch := Watch())
    noise = np.random.default_rng(1).normal(0, 0.05, 400)
    flagged = [step for step in range(400) if guard.spike(4 - step / 200 + float(noise[step]) + 3 * (step == 250))]
    assert flagged == [250]
    assert (watch.spikes, len(watch.recent)) == (1, 64)
    assert not any(Guard(GuardsSection(spike=None), Watch()).spike(100.0 * (step == 90) + step / 9) for step in range(99))


def test_a_spike_is_told_and_logged(spoil: Any, recipe: Recipe, tmp_path: Path) -> None:
    spoil({40}, lambda network, loss: loss * 3)
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": 42})})
    notes = _Notes()
    train(longer, tmp_path / "run", device="cpu", observer=notes)
    [line] = _lines(tmp_path / "run", "spike")
    assert line["step"] == 40
    assert any("spike" in text for text in notes.texts)
    assert Run(tmp_path / "run").checkpoint("last").state["watch"]["spikes"] == 1
