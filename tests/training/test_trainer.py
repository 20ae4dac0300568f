"""The trainer logs correct numbers. Stopping, resuming, evaluating and sampling do not change the trained model."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Corrupt, tiny_recipe
from safetensors.torch import load_file

from tinylm.data.datasets import ShuffledDocuments, TokenStream
from tinylm.data.prepare import prepare
from tinylm.model.transformer import Transformer
from tinylm.pipeline import TrainResult, train
from tinylm.recipe import Recipe
from tinylm.reporting import SILENT
from tinylm.run import Run
from tinylm.training import gradient, trainer
from tinylm.training.metrics import EvaluationEvent, Observer, SampleEvent, StepEvent
from tinylm.training.step import accumulate

STEPS = 12
HARD = ("model.dropout=0.2", "model.n_embd=16", "evaluation.every=4", "evaluation.max_tokens=200", f"training.steps={STEPS}")
"""Settings that make exact resuming hard: dropout, two micro-batches per step and, with `short_file`, an epoch boundary."""


@pytest.fixture(scope="module")
def recipe(short_file: Path) -> Recipe:
    return tiny_recipe(short_file, "modern", *HARD)


@pytest.fixture(scope="module")
def uninterrupted_result(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(recipe, tmp_path_factory.mktemp("runs") / "uninterrupted", device="cpu")


@pytest.fixture(scope="module")
def uninterrupted(uninterrupted_result: TrainResult) -> Path:
    return Path(uninterrupted_result.run)


def _lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the logged lines of one kind without durations, speeds and progress."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if "second" not in key and key not in ("done", "mfu")}
        for line in lines
        if line["kind"] == kind
    ]


def _losses(folder: Path) -> list[float]:
    return [line["loss"] for line in _lines(folder, "step")]


def _assert_same_training(first: Path, second: Path) -> None:
    """Check that weights, optimizer state, logged numbers, evaluations and the best checkpoint are identical."""
    last = [Run(folder).checkpoint("last").path for folder in (first, second)]
    assert (last[0] / "model.safetensors").read_bytes() == (last[1] / "model.safetensors").read_bytes()
    moments = [load_file(path / "training-00001.safetensors") for path in last]
    assert moments[0].keys() == moments[1].keys()
    assert all(torch.equal(value, moments[1][name]) for name, value in moments[0].items())
    for kind in ("step", "eval"):
        assert _lines(first, kind) == _lines(second, kind)
    for pointer in ("best", "last"):
        assert (first / "checkpoints" / pointer).read_text() == (second / "checkpoints" / pointer).read_text()


class _SignalSender(Observer):
    """Send a signal at the first event for which `when(event, last_step)` is true. The event is `step` or a phase name."""

    def __init__(self, number: int, when: Callable[[str, int], bool]) -> None:
        self.number, self.when, self.sent, self.last_step = number, when, False, 0

    def _on_event(self, event: str) -> None:
        if not self.sent and self.when(event, self.last_step):
            self.sent = True
            signal.raise_signal(self.number)

    def step(self, event: StepEvent) -> None:
        self.last_step = event.step
        self._on_event("step")

    def phase(self, name: str) -> None:
        self._on_event(name)


class _Clock:
    """A replacement for `perf_counter`. Each call advances the time by 10 ms."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 0.01
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(trainer, "perf_counter", clock)
    return clock


# Logged numbers


def test_the_logged_loss_is_the_mean_over_the_global_batch(short_file: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(short_file, "gpt2", "training.steps=2", "training.micro_batch_size=1")
    train(recipe, tmp_path / "run", device="cpu")
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    tokens = torch.from_numpy(TokenStream(prepared.train.tokens, 32, recipe.seed).examples(0, 8)["tokens"])
    network = Transformer(recipe.model, prepared.tokenizer.vocab_size, seed=recipe.seed)
    loss = F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    first = _lines(tmp_path / "run", "step")[0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-6)
    norm = torch.stack([parameter.grad.norm() for parameter in network.parameters()]).norm()
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert (first["step"], first["tokens"]) == (1, 8 * 32)


def test_mfu_is_the_ratio_of_achieved_to_peak_flops(short_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token costs 6 FLOPs per matrix weight. Attention adds 6 FLOPs per layer, channel and context position."""
    monkeypatch.setattr("tinylm.training.precision.measure_peak_flops", lambda precision: 2e9)
    recipe = tiny_recipe(short_file, "gpt2", "training.steps=3", "evaluation.max_tokens=50")
    train(recipe, tmp_path / "run", device="cpu")
    vocab_size = Run(tmp_path / "run").tokenizer.vocab_size
    matrix_weights = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 32 * vocab_size
    flops_per_token = 6 * matrix_weights + 2 * 6 * 32 * 32
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert len(steps) == 3
    for line in steps:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops_per_token / 2e9)


def test_the_micro_batch_size_changes_losses_only_by_rounding(short_file: Path, tmp_path: Path) -> None:
    for micro in (1, 8):
        recipe = tiny_recipe(short_file, "llama", "training.steps=6", f"training.micro_batch_size={micro}")
        train(recipe, tmp_path / str(micro), device="cpu")
    assert _losses(tmp_path / "1") == pytest.approx(_losses(tmp_path / "8"), rel=1e-4)


def test_learning_rates_follow_the_schedule(short_file: Path, tmp_path: Path) -> None:
    options = ("training.steps=5", "training.optimizer={name: adamw, lr: 0.01}", "training.schedule={name: linear, warmup: 2}")
    train(tiny_recipe(short_file, "modern", *options), tmp_path / "run", device="cpu")
    assert [line["lr"] for line in _lines(tmp_path / "run", "step")] == pytest.approx([0.005, 0.01, 0.01, 0.02 / 3, 0.01 / 3])


def test_gradient_clipping_limits_the_update_and_can_be_disabled(short_file: Path, tmp_path: Path) -> None:
    losses = {}
    for clip in ("off", "1e9", "1e-9"):
        options = ("training.steps=4", "training.optimizer={name: adamw, lr: 0.05, eps: 1e-3}", f"training.clip_grad_norm={clip}")
        train(tiny_recipe(short_file, "modern", *options), tmp_path / clip, device="cpu")
        losses[clip] = _losses(tmp_path / clip)
    assert losses["off"] == losses["1e9"]
    assert losses["1e-9"][-1] > losses["off"][-1] + 0.01  # The loss stays high because the weights barely change.


def test_the_loss_decreases(tiny_run: Run) -> None:
    losses = _losses(tiny_run.path)
    assert sum(losses[-3:]) / 3 < losses[0] - 0.2


# Settings that do not change the trained model


def test_evaluating_sampling_and_saving_more_often_does_not_change_the_model(
    recipe: Recipe, uninterrupted: Path, tmp_path: Path
) -> None:
    every_step = {
        "evaluation": {"every": 1},
        "checkpoint": {"every": 1},
        "sampling": {"every": 1, "prompts": ("The", ""), "max_new_tokens": 3},
    }
    sections = {name: getattr(recipe, name).model_copy(update=values) for name, values in every_step.items()}
    changed = recipe.model_copy(update=sections)
    train(changed, tmp_path / "run", device="cpu")
    assert _losses(tmp_path / "run") == _losses(uninterrupted)
    final = [Run(folder).checkpoint("last").path / "model.safetensors" for folder in (tmp_path / "run", uninterrupted)]
    assert final[0].read_bytes() == final[1].read_bytes()
    assert (tmp_path / "run" / "samples.md").read_text().count("## Step ") == 2 * STEPS


def test_the_global_random_state_does_not_change_the_model(recipe: Recipe, uninterrupted: Path, tmp_path: Path) -> None:
    torch.manual_seed(4321)
    train(recipe, tmp_path / "run", device="cpu")
    _assert_same_training(tmp_path / "run", uninterrupted)


# Documents


@pytest.fixture(scope="module")
def documents_recipe(english: str, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Return a recipe with 80 short documents, which are shuffled and masked, and an epoch boundary after 10 of the 12 steps."""
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    texts = [english[start : start + 20 + start % 130] for start in range(0, 8000, 100)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    options = ("data.heldout.by=document", "data.shuffle=documents", "data.document_mask=on")
    return tiny_recipe(path, "modern", *HARD, "model.position=learned", *options)


def test_masked_documents_have_the_same_loss_as_separate_documents(documents_recipe: Recipe, tmp_path: Path) -> None:
    model = documents_recipe.model.model_copy(update={"dropout": 0.0})
    recipe = documents_recipe.model_copy(update={"model": model})
    train(recipe, tmp_path / "run", device="cpu", stop_after=0.0)
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    network = Transformer(recipe.model, prepared.tokenizer.vocab_size, seed=recipe.seed)
    end_of_text, losses = prepared.train.end_of_text, []
    for row in ShuffledDocuments(prepared.train, 32, recipe.seed).examples(0, 8)["tokens"]:
        starts = [0, *(np.flatnonzero(row[1:-1] == end_of_text) + 1), len(row) - 1]
        for start, end in pairwise(starts):  # Adjacent documents share one token.
            part = torch.from_numpy(row[start : end + 1])
            losses.append(F.cross_entropy(network(part[None, :-1])[0], part[1:], reduction="none"))
    assert len(losses) > 8, "some windows must contain several documents"
    first = _lines(tmp_path / "run", "step")[0]
    assert first["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)
    assert first["tokens"] == 8 * 32


def test_resuming_with_shuffled_and_masked_documents_is_bitwise_exact(documents_recipe: Recipe, tmp_path: Path) -> None:
    train(documents_recipe, tmp_path / "uninterrupted", device="cpu")
    results = [train(documents_recipe, tmp_path / "run", device="cpu", stop_after=0.0)]
    while results[-1].stopped != "done":
        results.append(train(documents_recipe, tmp_path / "run", device="cpu", resume=True, stop_after=0.0))
    assert len(results) == STEPS
    _assert_same_training(tmp_path / "run", tmp_path / "uninterrupted")
    data = documents_recipe.data.model_copy(update={"shuffle": "windows", "document_mask": False})
    train(documents_recipe.model_copy(update={"data": data}), tmp_path / "default", device="cpu")
    assert _losses(tmp_path / "default") != _losses(tmp_path / "run")


def test_a_different_seed_trains_a_different_model(recipe: Recipe, uninterrupted: Path, tmp_path: Path) -> None:
    train(recipe.model_copy(update={"seed": 2}), tmp_path / "run", device="cpu")
    assert _losses(tmp_path / "run") != _losses(uninterrupted)


def test_every_micro_batch_has_its_own_dropout_seed(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used_seeds: list[int] = []

    def record_seeds(*arguments: Any) -> torch.Tensor:
        *rest, seeds, context = arguments
        step_seeds = [next(seeds) for _ in range(2)]
        used_seeds.extend(step_seeds)
        return accumulate(*rest, iter(step_seeds), context)

    monkeypatch.setattr(gradient, "accumulate", record_seeds)
    train(recipe, tmp_path / "run", device="cpu")
    assert len(used_seeds) == len(set(used_seeds)) == STEPS * 2


def test_training_crosses_an_epoch_boundary(recipe: Recipe) -> None:
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    windows = TokenStream(prepared.train.tokens, 32, recipe.seed).examples_per_epoch
    assert 3 * 8 < windows < (STEPS - 2) * 8


def test_stopping_and_resuming_after_every_step_does_not_change_training(
    recipe: Recipe, uninterrupted: Path, tmp_path: Path
) -> None:
    results = [train(recipe, tmp_path / "run", device="cpu", stop_after=0.0)]
    while results[-1].stopped != "done":
        assert results[-1].stopped == "time"
        results.append(train(recipe, tmp_path / "run", device="cpu", resume=True, stop_after=0.0))
    assert [result.step for result in results] == list(range(1, STEPS + 1))
    _assert_same_training(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, "step"), (signal.SIGTERM, "evaluating"), (signal.SIGINT, "saving")],
    ids=["SIGINT-step", "SIGTERM-evaluating", "SIGINT-saving"],
)
def test_resuming_after_a_signal_at_any_time_does_not_change_training(
    number: signal.Signals, moment: str, recipe: Recipe, uninterrupted: Path, tmp_path: Path
) -> None:
    observer = _SignalSender(number, lambda event, step: event == moment and step == 8)
    result = train(recipe, tmp_path / "run", device="cpu", observer=observer)
    assert (result.stopped, result.signal_number) == ("signal", number)
    assert result.step == 8
    assert Run(tmp_path / "run").checkpoint("last").step == 8
    result = train(recipe, tmp_path / "run", device="cpu", resume=True)
    assert (result.stopped, result.signal_number) == ("done", None)
    _assert_same_training(tmp_path / "run", uninterrupted)


def test_resuming_repeats_an_interrupted_final_evaluation(recipe: Recipe, uninterrupted: Path, tmp_path: Path) -> None:
    observer = _SignalSender(signal.SIGINT, lambda event, step: event == "evaluating" and step == STEPS)
    result = train(recipe, tmp_path / "run", device="cpu", observer=observer)
    assert (result.stopped, result.step) == ("signal", STEPS)
    assert _lines(tmp_path / "run", "eval")[-1]["step"] == 8
    assert train(recipe, tmp_path / "run", device="cpu", resume=True).stopped == "done"
    _assert_same_training(tmp_path / "run", uninterrupted)


def test_a_signal_while_sampling_saves_the_last_step(short_file: Path, tmp_path: Path) -> None:
    rarely = ("evaluation.every=100", "checkpoint.every=100", "sampling.every=1", "sampling.max_new_tokens=2")
    observer = _SignalSender(signal.SIGTERM, lambda event, step: event == "sampling" and step == 3)
    result = train(tiny_recipe(short_file, "modern", *rarely), tmp_path / "run", device="cpu", observer=observer)
    assert (result.stopped, result.step) == ("signal", 3)
    assert Run(tmp_path / "run").checkpoint("last").step == 3


def test_resuming_a_finished_run_changes_nothing(recipe: Recipe, uninterrupted_result: TrainResult, tmp_path: Path) -> None:
    first, folder = uninterrupted_result, tmp_path / "run"
    shutil.copytree(first.run, folder)
    again = train(recipe, folder, device="cpu", resume=True)
    assert (again.step, again.metrics, again.best_step) == (first.step, first.metrics, first.best_step)
    _assert_same_training(folder, Path(first.run))


def test_signal_handlers_are_restored(short_file: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(tiny_recipe(short_file, "modern", "training.steps=1"), tmp_path / "run", device="cpu")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_stride_and_max_tokens_change_the_held_out_loss_but_not_training(
    recipe: Recipe, uninterrupted: Path, tmp_path: Path
) -> None:
    for key, value in (("stride", 4), ("max_tokens", 100)):
        evaluation = recipe.evaluation.model_copy(update={key: value})
        train(recipe.model_copy(update={"evaluation": evaluation}), tmp_path / key, device="cpu")
        assert _losses(tmp_path / key) == _losses(uninterrupted)
        for changed, default in zip(_lines(tmp_path / key, "eval"), _lines(uninterrupted, "eval"), strict=True):
            assert changed["val_loss"] != default["val_loss"]


def test_activation_checkpointing_trains_the_same_model(recipe: Recipe, uninterrupted: Path, tmp_path: Path) -> None:
    training = recipe.training.model_copy(update={"activation_checkpointing": True})
    train(recipe.model_copy(update={"training": training}), tmp_path / "run", device="cpu")
    assert _losses(tmp_path / "run") == pytest.approx(_losses(uninterrupted), rel=1e-5)


# Training length


@pytest.mark.parametrize(
    ("length", "steps"),
    [("steps=3", 3), ("tokens=1000", 4), ("tokens=1024", 4), ("tokens=1025", 5), ("epochs=1", None), ("epochs=0.5", None)],
)
def test_the_training_length_can_be_given_in_steps_tokens_or_epochs(
    length: str, steps: int | None, short_file: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(short_file, "modern", f"training.{length}", "evaluation.max_tokens=50")
    if steps is None:
        windows = (len(prepare(recipe.data, recipe.tokenizer, SILENT).train) - 1) // 32
        steps = math.ceil(windows * float(length.partition("=")[2]) / 8)
    result = train(recipe, tmp_path / "run", device="cpu")
    assert (result.step, result.steps, result.tokens) == (steps, steps, steps * 8 * 32)
    assert len(_losses(tmp_path / "run")) == steps


def _logged_seconds(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["seconds"] for line in lines if line["kind"] == "step"]


@pytest.mark.usefixtures("clock")
def test_the_last_step_is_saved_and_evaluated_at_the_time_limit(short_file: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(short_file, "modern", "training.minutes=0.02", "evaluation.every=100000", "checkpoint.every=100000")
    result = train(recipe, tmp_path / "run", device="cpu")
    *before, last = _logged_seconds(tmp_path / "run")
    assert before
    assert max(before) < 1.2 <= last <= result.seconds
    assert result.stopped == "done"
    assert Run(tmp_path / "run").checkpoint("last").step == result.step
    assert _lines(tmp_path / "run", "eval")[-1]["step"] == result.step
    rates = [line["lr"] for line in _lines(tmp_path / "run", "step")]
    assert rates[-1] < 0.2 * max(rates)


def test_one_more_step_is_trained_and_saved_if_time_runs_out_while_sampling(
    clock: _Clock, short_file: Path, tmp_path: Path
) -> None:
    class SlowSampling(Observer):
        def sample(self, event: SampleEvent) -> None:
            clock.seconds += 0.7 if event.step == 2 else 0

    options = ("training.minutes=0.01", "sampling.every=2", "sampling.max_new_tokens=1", "evaluation.every=100000")
    recipe = tiny_recipe(short_file, "modern", *options, "checkpoint.every=100000")
    result = train(recipe, tmp_path / "run", device="cpu", observer=SlowSampling())
    assert result.step == 3
    assert result.stopped == "done"
    assert Run(tmp_path / "run").checkpoint("last").step == result.step
    assert _lines(tmp_path / "run", "eval")[-1]["step"] == result.step


@pytest.mark.usefixtures("clock")
def test_stop_after_saves_the_first_step_after_that_time(short_file: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(short_file, "modern", "training.steps=100000", "evaluation.every=100000", "checkpoint.every=100000")
    result = train(recipe, tmp_path / "run", device="cpu", stop_after=0.5)
    assert result.stopped == "time"
    *before, last = _logged_seconds(tmp_path / "run")
    assert before
    assert max(before) < 0.5 <= last
    assert Run(tmp_path / "run").checkpoint("last").step == result.step


# Half precision


@pytest.mark.parametrize("part", ["embedding.weight", "blocks.0.attention.qkv.weight"], ids=["adamw", "muon"])
def test_fp16_skips_a_step_that_overflows_in_any_parameter(part: str, corrupt: Corrupt, recipe: Recipe, tmp_path: Path) -> None:
    def overflow(network: Transformer, loss: torch.Tensor) -> torch.Tensor:
        network.get_parameter(part).grad[0, 0] = math.inf
        return loss

    weights = corrupt({3}, overflow)
    options = recipe.training.model_copy(update={"precision": "fp16", "steps": 5})
    result = train(recipe.model_copy(update={"training": options}), tmp_path / "run", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(weights[2], weights[3], strict=True))  # The third step was skipped.
    assert not all(torch.equal(a, b) for a, b in zip(weights[3], weights[4], strict=True))
    assert result.precision == "fp16"
    assert Run(tmp_path / "run").checkpoint("last").state["scaler"]["scale"] == 32768.0
    assert _lines(tmp_path / "run", "step")[2]["grad_norm"] is None


def test_resuming_keeps_the_reduced_loss_scale_after_an_overflow(corrupt: Corrupt, recipe: Recipe, tmp_path: Path) -> None:
    def overflow(network: Transformer, loss: torch.Tensor) -> torch.Tensor:
        network.embedding.weight.grad[0, 0] = math.inf
        return loss

    training = recipe.training.model_copy(update={"precision": "fp16", "steps": 6})
    short = recipe.model_copy(update={"training": training})
    corrupt({3}, overflow)
    train(short, tmp_path / "uninterrupted", device="cpu")
    corrupt({3}, overflow)
    train(short, tmp_path / "run", device="cpu", observer=_SignalSender(signal.SIGINT, lambda event, step: step == 5))
    train(short, tmp_path / "run", device="cpu", resume=True)
    _assert_same_training(tmp_path / "run", tmp_path / "uninterrupted")
    scalers = [Run(tmp_path / name).checkpoint("last").state["scaler"] for name in ("run", "uninterrupted")]
    assert scalers[0] == scalers[1]
    assert scalers[0]["scale"] == 32768.0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_trains_like_fp32_and_resuming_is_bitwise_exact(
    precision: str, recipe: Recipe, uninterrupted: Path, tmp_path: Path
) -> None:
    training = recipe.training.model_copy(update={"precision": precision, "steps": 6})
    short = recipe.model_copy(update={"training": training})
    train(short, tmp_path / "uninterrupted", device="cpu")
    train(short, tmp_path / "run", device="cpu", observer=_SignalSender(signal.SIGINT, lambda event, step: step == 3))
    train(short, tmp_path / "run", device="cpu", resume=True)
    _assert_same_training(tmp_path / "run", tmp_path / "uninterrupted")
    assert _losses(tmp_path / "run")[:2] == pytest.approx(_losses(uninterrupted)[:2], rel=0.01)


# Events


def test_events_arrive_in_order_and_checkpoints_are_saved_before_evaluations(recipe: Recipe, tmp_path: Path) -> None:
    events: list[tuple[str, int]] = []

    class Recorder(Observer):
        def step(self, event: StepEvent) -> None:
            events.append(("step", event.step))

        def saved(self, step: int) -> None:
            events.append(("saved", step))

        def evaluation(self, event: EvaluationEvent) -> None:
            events.append(("evaluated", event.step))

    short = recipe.training.model_copy(update={"steps": 6})
    result: TrainResult = train(recipe.model_copy(update={"training": short}), tmp_path / "run", device="cpu", observer=Recorder())
    assert result.step == 6
    assert [event for event in events if event[0] == "step"] == [("step", step) for step in range(1, 7)]
    assert [event for event in events if event[0] == "saved"] == [("saved", 4), ("saved", 5), ("saved", 6)]
    for step in (4, 6):
        assert events.index(("step", step)) < events.index(("saved", step)) < events.index(("evaluated", step))
