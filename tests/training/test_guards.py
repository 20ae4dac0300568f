"""Guards skip non-finite steps, roll back, and finally abort with a replayable report. They also flag loss spikes."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Change, Corrupt, NoteCollector, tiny_recipe
from safetensors.torch import load_file, save_file

from tinylm.data.datasets import TokenStream
from tinylm.data.order import fingerprint
from tinylm.data.prepare import prepare
from tinylm.errors import InputError, WorkError
from tinylm.model.transformer import Transformer
from tinylm.pipeline import train
from tinylm.recipe import Recipe
from tinylm.recipe.schema import GuardsSection
from tinylm.reporting import SILENT
from tinylm.run import Run
from tinylm.training import trainer
from tinylm.training.guards import Guard, GuardState, robust_z_score
from tinylm.training.metrics import GuardEvent, Observer
from tinylm.training.pending import PendingStep, StepResult
from tinylm.training.replay import replay


@pytest.fixture(scope="module")
def recipe(text_file: Path) -> Recipe:
    small = ("model.n_embd=16", "model.dropout=0.2", "evaluation.max_tokens=200")
    return tiny_recipe(text_file, "modern", *small, "evaluation.every=10", "checkpoint.every=4", "training.steps=16")


_GUARD_EVENTS = ("skipped", "spike", "rollback")


def _nan_loss(network: Transformer, loss: torch.Tensor) -> torch.Tensor:
    return loss * math.nan


def _nan_gradient(network: Transformer, loss: torch.Tensor) -> torch.Tensor:
    network.blocks[1].attention.qkv.weight.grad[0, 0] = math.nan
    return loss


def _lines(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] in kinds]


@pytest.mark.parametrize("change", [_nan_loss, _nan_gradient])
def test_a_non_finite_step_is_skipped_and_counted(change: Change, corrupt: Corrupt, recipe: Recipe, tmp_path: Path) -> None:
    weights, observer = corrupt({6}, change), NoteCollector()
    result = train(recipe, tmp_path / "run", device="cpu", observer=observer)
    assert result.step == 16
    assert all(torch.equal(before, after) for before, after in zip(weights[5], weights[6], strict=True))
    assert not all(torch.equal(before, after) for before, after in zip(weights[4], weights[5], strict=True))
    [line] = _lines(tmp_path / "run", "skipped")
    assert (line["step"], line["cursor"]) == (6, 6 * 8)
    assert "nan" in line["reason"]
    assert observer.notes == [f"step 6: {line['reason']}"]
    assert [line["step"] for line in _lines(tmp_path / "run", "step")] == [*range(1, 6), *range(7, 17)]
    watch = Run(tmp_path / "run").checkpoint("last").state["watch"]
    assert (watch["skipped"], watch["in_a_row"], watch["rollbacks"]) == (1, 0, 0)


@pytest.mark.parametrize(("bad", "patience"), [({6}, 1), ({6}, 3), ({7, 8}, 3), ({10, 11, 12}, 3), ({16}, 3)])
def test_deferred_results_do_not_change_which_steps_are_skipped(
    bad: set[int], patience: int, corrupt: Corrupt, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulate a GPU, which skips the update on the device. The host reads the result after starting the next step."""
    training = recipe.training.model_copy(update={"guards": GuardsSection(patience=patience), "log_every": 5})
    recipe = recipe.model_copy(update={"training": training})
    read = PendingStep.read
    outcomes = []
    for name, deferred in (("immediate", False), ("deferred", True)):
        computed = corrupt(bad, _nan_gradient)
        pending: list[int] = []

        def read_and_count(step: PendingStep, computed: list[Any] = computed, pending: list[int] = pending) -> StepResult:
            pending.append(len(computed) - len(pending) - 1)  # number of steps computed after this one
            return read(step)

        monkeypatch.setattr(PendingStep, "read", read_and_count)
        monkeypatch.setattr(trainer, "defers_results", lambda device, deferred=deferred: deferred)
        train(recipe, tmp_path / name, device="cpu")
        assert max(pending) == (1 if deferred and patience > 1 else 0)
        last = Run(tmp_path / name).checkpoint("last")
        events = [(line["kind"], line["step"], line["cursor"], line["reason"]) for line in _lines(tmp_path / name, *_GUARD_EVENTS)]
        losses = {line["step"]: line["loss"] for line in _lines(tmp_path / name, "step")}
        outcomes.append(((last.path / "model.safetensors").read_bytes(), last.state["watch"], events, losses))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1]["skipped"] == len(bad)


def test_too_many_skipped_steps_cause_a_rollback_that_skips_their_batches(corrupt: Corrupt, recipe: Recipe, tmp_path: Path) -> None:
    weights = corrupt({10, 11, 12}, _nan_gradient)  # The last checkpoint before these steps is at step 8.
    result = train(recipe, tmp_path / "run", device="cpu")
    assert result.step == 16
    assert len(weights) == 12 + 8
    assert all(torch.equal(before, after) for before, after in zip(weights[8], weights[12], strict=True))
    [rollback] = _lines(tmp_path / "run", "rollback")
    assert (rollback["step"], rollback["cursor"]) == (8, 12 * 8)
    steps = _lines(tmp_path / "run", "step")
    assert [line["step"] for line in steps] == list(range(1, 17)), "each step must be logged once"
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    dataset = TokenStream(prepared.train.tokens, 32, recipe.seed)
    cursors = [8 * step for step in range(8)] + [8 * step for step in range(12, 20)]
    hashes = [fingerprint(dataset.examples(cursor, 8)["tokens"]) for cursor in cursors]
    assert [line["batch"] for line in steps] == [f"{value:016x}" for value in hashes]


def test_resuming_a_run_that_was_killed_at_a_rollback_is_bitwise_exact(corrupt: Corrupt, recipe: Recipe, tmp_path: Path) -> None:
    bad = {10, 11, 12}
    corrupt(bad, _nan_gradient)
    train(recipe, tmp_path / "uninterrupted", device="cpu")
    corrupt(bad, _nan_gradient)

    class FailureAtRollback(Observer):
        def guard(self, event: GuardEvent) -> None:
            if event.kind == "rollback":
                raise RuntimeError("simulated kill")

    with pytest.raises(RuntimeError, match="simulated kill"):
        train(recipe, tmp_path / "run", device="cpu", observer=FailureAtRollback())
    corrupt({2, 3, 4}, _nan_gradient)  # These are steps 10 to 12, because training resumes from step 8.
    train(recipe, tmp_path / "run", device="cpu", resume=True)
    files = [Run(tmp_path / name).checkpoint("last").path / "model.safetensors" for name in ("run", "uninterrupted")]
    assert files[0].read_bytes() == files[1].read_bytes()
    losses = [[line["loss"] for line in _lines(tmp_path / name, "step")] for name in ("run", "uninterrupted")]
    assert losses[0] == losses[1]


def test_non_finite_weights_are_rolled_back_and_never_saved(corrupt: Corrupt, recipe: Recipe, tmp_path: Path) -> None:
    def set_weight_to_nan(network: Transformer, loss: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            network.embedding.weight[0, 0] = math.nan  # The gradient is already computed, so this step passes the check.
        return loss

    corrupt({7}, set_weight_to_nan)
    result = train(recipe, tmp_path / "run", device="cpu")
    assert result.step == 16
    [rollback] = _lines(tmp_path / "run", "rollback")
    assert (rollback["step"], rollback["cursor"]) == (4, 8 * 8)
    assert "weights after step 8" in rollback["reason"]
    for checkpoint in Run(tmp_path / "run").checkpoints():
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint.path / "model.safetensors").values())


def test_training_aborts_with_a_report_if_there_is_no_checkpoint(corrupt: Corrupt, recipe: Recipe, tmp_path: Path) -> None:
    corrupt({1, 2, 3}, _nan_loss)
    message = r"loss is nan in step 3 \(3 consecutive skipped steps\); no checkpoint was saved.*--replay .*step-000003"
    with pytest.raises(WorkError, match=message):
        train(recipe, tmp_path / "run", device="cpu")
    assert (tmp_path / "run" / "reports" / "step-000003" / "report.json").exists()


@pytest.fixture(scope="module")
def reported(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report from a run that diverges because of its learning rate, without injected faults."""
    folder = tmp_path_factory.mktemp("runs") / "diverging"
    optimizer = {"optimizer": recipe.training.optimizer.model_copy(update={"lr": 3e37, "adamw_lr": 3e37})}
    guards = {"guards": GuardsSection(patience=2, rollbacks=1)}
    diverging = recipe.model_copy(update={"training": recipe.training.model_copy(update={**optimizer, **guards})})
    with pytest.raises(WorkError) as caught:
        train(diverging, folder, device="cpu")
    assert caught.value.exit_code == 1
    [report] = (folder / "reports").iterdir()
    assert str(report) in str(caught.value)
    return report


def test_replaying_a_report_is_bitwise_exact(reported: Path) -> None:
    replayed = replay(reported)
    assert replayed.agreement == "bits"
    assert not math.isfinite(replayed.grad_norm)
    assert replayed.non_finite
    assert len(replayed.sequence_losses) == 8
    report = json.loads((reported / "report.json").read_text())
    assert report["grad_norm"] == str(replayed.grad_norm)
    assert set(report["gradients"]) == set(report["weights"]) == set(replayed.gradients)


def test_a_report_contains_the_tokens_and_text_of_its_batch(reported: Path, recipe: Recipe) -> None:
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    report = json.loads((reported / "report.json").read_text())
    expected = TokenStream(prepared.train.tokens, 32, recipe.seed).examples(report["cursor"], 8)["tokens"]
    assert np.array_equal(load_file(reported / "batch.safetensors")["tokens"].numpy(), expected)
    texts = (reported / "texts.txt").read_text()
    for number, row in enumerate(expected.tolist()):
        assert f"--- sequence {number}\n{prepared.tokenizer.decode(row)}\n" in texts


def test_replay_computes_the_true_loss_and_norms_if_the_recorded_loss_was_replaced(
    corrupt: Corrupt, recipe: Recipe, tmp_path: Path
) -> None:
    """The NaN is injected and not part of the report, so the replay computes the true loss, with the same dropout masks."""
    true_losses: list[float] = []

    def replace_loss(network: Transformer, loss: torch.Tensor) -> torch.Tensor:
        true_losses.append(float(loss))
        return loss * math.nan

    corrupt({5, 6, 7}, replace_loss)
    guards = recipe.training.model_copy(update={"guards": GuardsSection(rollbacks=0)})
    with pytest.raises(WorkError):
        train(recipe.model_copy(update={"training": guards}), tmp_path / "run", device="cpu")
    replayed = replay(tmp_path / "run" / "reports" / "step-000007")
    assert replayed.agreement == "different"
    assert replayed.loss == true_losses[-1]
    norm = math.sqrt(sum(value**2 for value in replayed.report.gradients.values()))
    assert replayed.grad_norm == pytest.approx(norm, rel=1e-6) == pytest.approx(replayed.report.grad_norm, rel=1e-6)
    for name, value in replayed.gradients.items():
        assert value == pytest.approx(replayed.report.gradients[name], rel=1e-9)


def test_replaying_a_report_with_a_document_mask_is_bitwise_exact(recipe: Recipe, english: str, tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": english[start : start + 80]}) + "\n" for start in range(0, 8000, 100)))
    optimizer = recipe.training.optimizer.model_copy(update={"lr": 3e37, "adamw_lr": 3e37})
    training = recipe.training.model_copy(update={"optimizer": optimizer, "guards": GuardsSection(patience=2, rollbacks=0)})
    data = recipe.data.model_copy(update={"train": (str(path),), "document_mask": True})
    with pytest.raises(WorkError):
        train(recipe.model_copy(update={"training": training, "data": data}), tmp_path / "run", device="cpu")
    [report] = (tmp_path / "run" / "reports").iterdir()
    segments = load_file(report / "batch.safetensors")["segments"]
    assert (segments[:, 0] != segments[:, -1]).any(), "some windows must contain several documents"
    assert replay(report).agreement == "bits"


@pytest.mark.parametrize("damage", ["report.json", "batch.safetensors", "model.safetensors"])
def test_a_damaged_report_is_rejected(damage: str, reported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "report"
    copy.mkdir()
    for file in reported.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / damage).write_bytes(b"\x80\x04garbage")
    with pytest.raises(InputError):
        replay(copy)
    (copy / damage).unlink()
    with pytest.raises(InputError):
        replay(copy)


def test_a_report_with_weights_that_do_not_match_its_recipe_is_rejected(reported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "report"
    copy.mkdir()
    for file in reported.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    save_file({"embedding.weight": torch.zeros(3, 3)}, copy / "model.safetensors")
    with pytest.raises(InputError, match="does not match the recipe"):
        replay(copy)


def test_the_robust_z_score_matches_numpy_and_ignores_outliers() -> None:
    values = np.random.default_rng(0).normal(3.0, 0.1, 64).tolist()
    median = statistics.median(values)
    deviation = np.median(np.abs(np.array(values) - median)) / 0.674489750196
    assert robust_z_score(3.9, values) == pytest.approx((3.9 - median) / deviation, rel=1e-4)
    with_outliers = [*values[:54], *[50.0] * 10]
    assert robust_z_score(3.9, with_outliers) == pytest.approx(robust_z_score(3.9, values), rel=0.4)
    assert robust_z_score(3.9, values[:31]) is None
    assert robust_z_score(3.9, [1.0] * 64) is None


def test_a_spike_is_flagged_once_and_a_smooth_loss_is_not_flagged(text_file: Path) -> None:
    guard = Guard(GuardsSection(), watch := GuardState())
    noise = np.random.default_rng(1).normal(0, 0.05, 400)
    flagged = [step for step in range(400) if guard.spike_score(4 - step / 200 + float(noise[step]) + 3 * (step == 250))]
    assert flagged == [250]
    assert (watch.spikes, len(watch.recent)) == (1, 64)
    assert not any(
        Guard(GuardsSection(spike=None), GuardState()).spike_score(100.0 * (step == 90) + step / 9) for step in range(99)
    )


def test_a_spike_is_reported_and_logged(corrupt: Corrupt, recipe: Recipe, tmp_path: Path) -> None:
    corrupt({40}, lambda network, loss: loss * 3)
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": 42})})
    observer = NoteCollector()
    train(longer, tmp_path / "run", device="cpu", observer=observer)
    [line] = _lines(tmp_path / "run", "spike")
    assert line["step"] == 40
    assert any("spike" in text for text in observer.notes)
    assert Run(tmp_path / "run").checkpoint("last").state["watch"]["spikes"] == 1
