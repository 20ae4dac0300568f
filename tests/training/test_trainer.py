"""The loop: its numbers are true, and stopping, resuming, measuring or sampling never change what is learned."""

from __future__ import annotations

import itertools
import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_recipe
from safetensors.torch import load_file

from tinylm.data.batches import Batches
from tinylm.data.prepare import prepare
from tinylm.errors import WorkError
from tinylm.model.transformer import Transformer
from tinylm.pipeline import TrainResult, train
from tinylm.recipe import Recipe
from tinylm.reporting import SILENT
from tinylm.run import Run
from tinylm.training import compilation
from tinylm.training import trainer as room
from tinylm.training.metrics import EvaluationEvent, Observer, SampleEvent, StepEvent
from tinylm.training.step import accumulate

HARD = ("model.dropout=0.2", "training.micro_batch_size=2", "model.n_embd=16", "evaluation.every=4", "evaluation.max_tokens=200")
"""Dropout on, four micro-batches a step, and with `short_file` an epoch's border in the middle."""


@pytest.fixture(scope="module")
def short_file(english: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(english[1000:7000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def recipe(short_file: Path) -> Recipe:
    return tiny_recipe(short_file, "modern", *HARD)


@pytest.fixture(scope="module")
def in_one_go(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(recipe, folder, device="cpu")
    return folder


def _lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind without what the clock decides."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if "second" not in key and key not in ("done", "mfu")}
        for line in lines
        if line["kind"] == kind
    ]


def _losses(folder: Path) -> list[float]:
    return [line["loss"] for line in _lines(folder, "step")]


def _same_training(one: Path, two: Path) -> None:
    """Equal to the bit: weights, optimizer, every logged number, every evaluation, and which checkpoint is best."""
    last = [Run(folder).checkpoint("last").path for folder in (one, two)]
    assert (last[0] / "model.safetensors").read_bytes() == (last[1] / "model.safetensors").read_bytes()
    moments = [load_file(path / "training-00001.safetensors") for path in last]
    assert moments[0].keys() == moments[1].keys()
    assert all(torch.equal(value, moments[1][name]) for name, value in moments[0].items())
    for kind in ("step", "eval"):
        assert _lines(one, kind) == _lines(two, kind)
    for pointer in ("best", "last"):
        assert (one / "checkpoints" / pointer).read_text() == (two / "checkpoints" / pointer).read_text()


class _Signals(Observer):
    """Sends a signal at the first event that `when` accepts."""

    def __init__(self, number: int, when: Callable[[str, int], bool]) -> None:
        self.number, self.when, self.sent, self.at = number, when, False, 0

    def _maybe(self, what: str) -> None:
        if not self.sent and self.when(what, self.at):
            self.sent = True
            signal.raise_signal(self.number)

    def step(self, event: StepEvent) -> None:
        self.at = event.step
        self._maybe("step")

    def phase(self, name: str) -> None:
        self._maybe(name)


# What is reported.


def test_the_logged_loss_is_the_mean_over_the_whole_global_batch(short_file: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(short_file, "gpt2", "training.steps=2", "training.micro_batch_size=1")
    train(recipe, tmp_path / "run", device="cpu")
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    tokens = torch.from_numpy(Batches(prepared.train.tokens, 32, recipe.seed).sequences(0, 8))
    network = Transformer(recipe.model, prepared.tokenizer.vocab_size, seed=recipe.seed)
    loss = F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    first = _lines(tmp_path / "run", "step")[0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-6)
    norm = torch.stack([parameter.grad.norm() for parameter in network.parameters()]).norm()
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert (first["step"], first["tokens"]) == (1, 8 * 32)


def test_the_utilisation_is_the_models_flops_a_second_over_the_machines(
    short_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token costs 6 FLOPs per weight of every product and, in each layer, 6 C for each position of the context."""
    monkeypatch.setattr("tinylm.training.precision.matmul_flops", lambda precision: 2e9)
    recipe = tiny_recipe(short_file, "gpt2", "training.steps=3", "evaluation.max_tokens=50")
    train(recipe, tmp_path / "run", device="cpu")
    vocabulary = Run(tmp_path / "run").tokenizer.vocab_size
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 32 * vocabulary
    per_token = 6 * weights + 2 * 6 * 32 * 32
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert len(steps) == 3
    for line in steps:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * per_token / 2e9)


def test_micro_batches_change_losses_by_rounding_only(short_file: Path, tmp_path: Path) -> None:
    for micro in (1, 8):
        recipe = tiny_recipe(short_file, "llama", "training.steps=6", f"training.micro_batch_size={micro}")
        train(recipe, tmp_path / str(micro), device="cpu")
    assert _losses(tmp_path / "1") == pytest.approx(_losses(tmp_path / "8"), rel=1e-4)


def test_rates_follow_the_schedule(short_file: Path, tmp_path: Path) -> None:
    options = ("training.steps=5", "training.optimizer={name: adamw, lr: 0.01}", "training.schedule={name: linear, warmup: 2}")
    train(tiny_recipe(short_file, "modern", *options), tmp_path / "run", device="cpu")
    assert [line["lr"] for line in _lines(tmp_path / "run", "step")] == pytest.approx([0.005, 0.01, 0.01, 0.02 / 3, 0.01 / 3])


def test_clipping_bounds_the_step_and_off_does_not(short_file: Path, tmp_path: Path) -> None:
    losses = {}
    for clip in ("off", "1e9", "1e-9"):
        options = ("training.steps=4", "training.optimizer={name: adamw, lr: 0.05, eps: 1e-3}", f"training.clip_grad_norm={clip}")
        train(tiny_recipe(short_file, "modern", *options), tmp_path / clip, device="cpu")
        losses[clip] = _losses(tmp_path / clip)
    assert losses["off"] == losses["1e9"]
    assert losses["1e-9"][-1] > losses["off"][-1] + 0.01  # it hardly moves


def test_a_model_learns(in_one_go: Path) -> None:
    losses = _losses(in_one_go)
    assert sum(losses[-3:]) / 3 < losses[0] - 0.2


# What never changes what is learned.


def test_measuring_sampling_and_saving_more_often_change_no_loss_by_a_bit(recipe: Recipe, in_one_go: Path, tmp_path: Path) -> None:
    busy = {
        "evaluation": {"every": 1},
        "checkpoint": {"every": 1},
        "sampling": {"every": 1, "prompts": ("The", ""), "max_new_tokens": 3},
    }
    changed = recipe.model_copy(update={name: getattr(recipe, name).model_copy(update=values) for name, values in busy.items()})
    train(changed, tmp_path / "run", device="cpu")
    assert _losses(tmp_path / "run") == _losses(in_one_go)
    final = [Run(folder).checkpoint("last").path / "model.safetensors" for folder in (tmp_path / "run", in_one_go)]
    assert final[0].read_bytes() == final[1].read_bytes()
    assert (tmp_path / "run" / "samples.md").read_text().count("## Step ") == 40


def test_the_same_recipe_trains_the_same_model_whatever_the_global_random_state(
    recipe: Recipe, in_one_go: Path, tmp_path: Path
) -> None:
    torch.manual_seed(4321)
    train(recipe, tmp_path / "run", device="cpu")
    _same_training(tmp_path / "run", in_one_go)


def test_another_seed_trains_another_model(recipe: Recipe, in_one_go: Path, tmp_path: Path) -> None:
    train(recipe.model_copy(update={"seed": 2}), tmp_path / "run", device="cpu")
    assert _losses(tmp_path / "run") != _losses(in_one_go)


def test_every_micro_batch_of_every_step_drops_out_by_a_seed_of_its_own(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []

    def noted(*arguments: Any) -> torch.Tensor:
        *rest, seeds, together = arguments
        chosen = [next(seeds) for _ in range(4)]
        used.extend(chosen)
        return accumulate(*rest, iter(chosen), together)

    monkeypatch.setattr(room, "accumulate", noted)
    train(recipe, tmp_path / "run", device="cpu")
    assert len(used) == len(set(used)) == 20 * 4


def test_the_epochs_border_lies_inside(recipe: Recipe) -> None:
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    windows = Batches(prepared.train.tokens, 32, recipe.seed).windows
    assert 3 * 8 < windows < 15 * 8


def test_stopping_after_every_step_and_resuming_is_training_in_one_go(recipe: Recipe, in_one_go: Path, tmp_path: Path) -> None:
    results = [train(recipe, tmp_path / "run", device="cpu", stop_after=0.0)]
    while results[-1].stopped != "done":
        assert results[-1].stopped == "time"
        results.append(train(recipe, tmp_path / "run", device="cpu", resume=True, stop_after=0.0))
    assert [result.step for result in results] == list(range(1, 21))
    _same_training(tmp_path / "run", in_one_go)


@pytest.mark.parametrize("what", ["step", "evaluating", "saving"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_at_any_moment_and_resuming_is_training_in_one_go(
    number: signal.Signals, what: str, recipe: Recipe, in_one_go: Path, tmp_path: Path
) -> None:
    observer = _Signals(number, lambda now, step: now == what and step == 12)
    result = train(recipe, tmp_path / "run", device="cpu", observer=observer)
    assert (result.stopped, result.signal_number) == ("signal", number)
    assert result.step == 12
    assert Run(tmp_path / "run").checkpoint("last").step == 12
    result = train(recipe, tmp_path / "run", device="cpu", resume=True)
    assert (result.stopped, result.signal_number) == ("done", None)
    _same_training(tmp_path / "run", in_one_go)


def test_a_signal_in_the_last_evaluation_is_a_signal_and_resuming_measures(recipe: Recipe, in_one_go: Path, tmp_path: Path) -> None:
    observer = _Signals(signal.SIGINT, lambda now, step: now == "evaluating" and step == 20)
    result = train(recipe, tmp_path / "run", device="cpu", observer=observer)
    assert (result.stopped, result.step) == ("signal", 20)
    assert _lines(tmp_path / "run", "eval")[-1]["step"] == 16
    assert train(recipe, tmp_path / "run", device="cpu", resume=True).stopped == "done"
    _same_training(tmp_path / "run", in_one_go)


def test_a_signal_while_sampling_loses_no_step(short_file: Path, tmp_path: Path) -> None:
    rare = ("evaluation.every=100", "checkpoint.every=100", "sampling.every=1", "sampling.max_new_tokens=2")
    observer = _Signals(signal.SIGTERM, lambda now, step: now == "sampling" and step == 3)
    result = train(tiny_recipe(short_file, "modern", *rare), tmp_path / "run", device="cpu", observer=observer)
    assert (result.stopped, result.step) == ("signal", 3)
    assert Run(tmp_path / "run").checkpoint("last").step == 3


def test_resuming_a_finished_run_trains_no_further(recipe: Recipe, in_one_go: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = train(recipe, folder, device="cpu")
    again = train(recipe, folder, device="cpu", resume=True)
    assert (again.step, again.val_loss, again.best_step) == (first.step, first.val_loss, first.best_step)
    _same_training(folder, in_one_go)


def test_the_handlers_of_signals_are_put_back(short_file: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(tiny_recipe(short_file, "modern", "training.steps=1"), tmp_path / "run", device="cpu")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_is_held_out_is_measured_as_the_recipe_says(recipe: Recipe, in_one_go: Path, tmp_path: Path) -> None:
    for key, value in (("stride", 4), ("max_tokens", 100)):
        evaluation = recipe.evaluation.model_copy(update={key: value})
        train(recipe.model_copy(update={"evaluation": evaluation}), tmp_path / key, device="cpu")
        assert _losses(tmp_path / key) == _losses(in_one_go)
        for ours, usual in zip(_lines(tmp_path / key, "eval"), _lines(in_one_go, "eval"), strict=True):
            assert ours["val_loss"] != usual["val_loss"]


# How long.


@pytest.mark.parametrize(
    ("length", "steps"),
    [("steps=3", 3), ("tokens=1000", 4), ("tokens=1024", 4), ("tokens=1025", 5), ("epochs=1", None), ("epochs=0.5", None)],
)
def test_lengths_in_steps_tokens_and_epochs(length: str, steps: int | None, short_file: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(short_file, "modern", f"training.{length}", "evaluation.max_tokens=50")
    if steps is None:
        windows = (len(prepare(recipe.data, recipe.tokenizer, SILENT).train) - 1) // 32
        steps = math.ceil(windows * float(length.partition("=")[2]) / 8)
    result = train(recipe, tmp_path / "run", device="cpu")
    assert (result.step, result.steps, result.tokens) == (steps, steps, steps * 8 * 32)
    assert len(_losses(tmp_path / "run")) == steps


def test_minutes_end_near_their_time_saved_and_measured_with_the_rate_at_its_floor(short_file: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(short_file, "modern", "training.minutes=0.02", "evaluation.every=100000", "checkpoint.every=100000")
    began = time.perf_counter()
    result = train(recipe, tmp_path / "run", device="cpu")
    assert 1.2 <= result.seconds < 3.5
    assert result.seconds <= time.perf_counter() - began
    assert result.stopped == "done"
    assert Run(tmp_path / "run").checkpoint("last").step == result.step
    assert _lines(tmp_path / "run", "eval")[-1]["step"] == result.step
    rates = [line["lr"] for line in _lines(tmp_path / "run", "step")]
    assert rates[-1] < 0.2 * max(rates)


def test_minutes_that_run_out_while_sampling_still_end_saved_and_measured(short_file: Path, tmp_path: Path) -> None:
    class Slow(Observer):
        def sample(self, event: SampleEvent) -> None:
            time.sleep(0.7 if event.step == 2 else 0)

    options = ("training.minutes=0.01", "sampling.every=2", "sampling.max_new_tokens=1", "evaluation.every=100000")
    recipe = tiny_recipe(short_file, "modern", *options, "checkpoint.every=100000")
    result = train(recipe, tmp_path / "run", device="cpu", observer=Slow())
    assert result.stopped == "done"
    assert Run(tmp_path / "run").checkpoint("last").step == result.step
    assert _lines(tmp_path / "run", "eval")[-1]["step"] == result.step


def test_stop_after_ends_near_its_time_and_saves(short_file: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(short_file, "modern", "training.steps=100000", "evaluation.every=100000", "checkpoint.every=100000")
    result = train(recipe, tmp_path / "run", device="cpu", stop_after=0.5)
    assert result.stopped == "time"
    assert 0.5 <= result.seconds < 2.5
    assert Run(tmp_path / "run").checkpoint("last").step == result.step


# When it goes wrong.


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[Transformer, torch.Tensor], torch.Tensor]], list[Any]]:
    """Change what one step computes; returns the weights before each step."""

    def install(step: int, change: Callable[[Transformer, torch.Tensor], torch.Tensor]) -> list[Any]:
        seen: list[Any] = []

        def spoiled(network: Transformer, *rest: Any) -> torch.Tensor:
            seen.append([parameter.detach().clone() for parameter in network.parameters()])
            loss = accumulate(network, *rest)
            return change(network, loss) if len(seen) == step else loss

        monkeypatch.setattr(room, "accumulate", spoiled)
        return seen

    return install


@pytest.mark.parametrize("part", ["embedding.weight", "blocks.0.attention.qkv.weight"], ids=["adamw", "muon"])
def test_fp16_skips_a_step_that_overflowed_in_any_part_of_the_model(part: str, spoil: Any, recipe: Recipe, tmp_path: Path) -> None:
    def overflow(network: Transformer, loss: torch.Tensor) -> torch.Tensor:
        network.get_parameter(part).grad[0, 0] = math.inf
        return loss

    weights = spoil(3, overflow)
    options = recipe.training.model_copy(update={"precision": "fp16", "steps": 5})
    result = train(recipe.model_copy(update={"training": options}), tmp_path / "run", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(weights[2], weights[3], strict=True))  # the third step changed nothing
    assert not all(torch.equal(a, b) for a, b in zip(weights[3], weights[4], strict=True))
    assert result.precision == "fp16"
    assert Run(tmp_path / "run").checkpoint("last").state["scaler"]["scale"] == 32768.0
    assert _lines(tmp_path / "run", "step")[2]["grad_norm"] is None


def test_a_scale_that_an_overflow_has_halved_is_resumed(spoil: Any, recipe: Recipe, tmp_path: Path) -> None:
    def overflow(network: Transformer, loss: torch.Tensor) -> torch.Tensor:
        network.embedding.weight.grad[0, 0] = math.inf
        return loss

    training = recipe.training.model_copy(update={"precision": "fp16", "steps": 6})
    short = recipe.model_copy(update={"training": training})
    spoil(3, overflow)
    train(short, tmp_path / "whole", device="cpu")
    spoil(3, overflow)
    train(short, tmp_path / "run", device="cpu", observer=_Signals(signal.SIGINT, lambda now, step: step == 5))
    train(short, tmp_path / "run", device="cpu", resume=True)
    _same_training(tmp_path / "run", tmp_path / "whole")
    scalers = [Run(tmp_path / name).checkpoint("last").state["scaler"] for name in ("run", "whole")]
    assert scalers[0] == scalers[1]
    assert scalers[0]["scale"] == 32768.0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_learns_as_fp32_does_and_resumes_bit_for_bit(
    precision: str, recipe: Recipe, in_one_go: Path, tmp_path: Path
) -> None:
    training = recipe.training.model_copy(update={"precision": precision, "steps": 6})
    short = recipe.model_copy(update={"training": training})
    train(short, tmp_path / "whole", device="cpu")
    train(short, tmp_path / "run", device="cpu", observer=_Signals(signal.SIGINT, lambda now, step: step == 3))
    train(short, tmp_path / "run", device="cpu", resume=True)
    _same_training(tmp_path / "run", tmp_path / "whole")
    assert _losses(tmp_path / "run")[:2] == pytest.approx(_losses(in_one_go)[:2], rel=0.01)


# When memory runs out.


@pytest.fixture
def cramped(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], list[int]]:
    """Learning runs out of memory with more than so many sequences; returns how many each pass was given."""

    def install(most: int, on_a_gpu: bool) -> list[int]:
        forward, seen = Transformer.forward, []

        def limited(network: Transformer, tokens: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
            if "targets" in options:
                seen.append(len(tokens))
                if len(tokens) > most and on_a_gpu:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                if len(tokens) > most:
                    torch.empty(1 << 58, dtype=torch.uint8)  # the CPU's allocator says it in its own words
            return forward(network, tokens, *rest, **options)

        monkeypatch.setattr(Transformer, "forward", limited)
        return seen

    return install


class _Notes(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize(
    ("batch", "micro", "most", "tried"),
    [(8, 8, 4, [4]), (8, 8, 2, [4, 2]), (12, 12, 4, [6, 3]), (12, 4, 3, [2]), (15, 15, 5, [5]), (10, 5, 3, [2]), (7, 7, 6, [1])],
)
@pytest.mark.parametrize("on_a_gpu", [True, False], ids=["gpu", "cpu"])
def test_a_batch_that_does_not_fit_is_done_in_smaller_pieces_that_give_the_same_training(
    batch: int, micro: int, most: int, tried: list[int], on_a_gpu: bool, cramped: Any, short_file: Path, tmp_path: Path
) -> None:
    """Each at most half of what was tried before, and a divisor of the batch."""
    short = ("training.steps=3", "training.compile=off", f"training.global_batch_size={batch}", "evaluation.max_tokens=50")
    recipes = {
        size: tiny_recipe(short_file, "modern", *short, "model.n_embd=16", "model.dropout=0.2", f"training.micro_batch_size={size}")
        for size in (micro, tried[-1])
    }
    train(recipes[tried[-1]], tmp_path / "small", device="cpu")
    seen, notes = cramped(most, on_a_gpu), _Notes()
    train(recipes[micro], tmp_path / "large", device="cpu", observer=notes)
    assert seen == [micro, *tried[:-1]] + 3 * (batch // tried[-1]) * [tried[-1]]
    assert _losses(tmp_path / "large") == _losses(tmp_path / "small")
    sizes = [micro, *tried]
    assert notes.texts == [
        f"out of memory: going on with {batch // small} micro-batches of {small} instead of {batch // large} of {large}; "
        f"the global batch stays {batch}"
        for large, small in itertools.pairwise(sizes)
    ]


def test_memory_that_runs_out_in_the_middle_of_a_batch_leaves_nothing_of_its_first_half(
    cramped: Any, short_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(short_file, "modern", "training.steps=4", "training.compile=off", "evaluation.max_tokens=50")
    train(recipe, tmp_path / "whole", device="cpu")
    calls, forward = [], Transformer.forward

    def once(network: Transformer, tokens: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        calls.append(len(tokens))
        if len(calls) == 6:  # the second micro-batch of the third step
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(network, tokens, *rest, **options)

    monkeypatch.setattr(Transformer, "forward", once)
    notes = _Notes()
    train(recipe, tmp_path / "run", device="cpu", observer=notes)
    assert calls[:14] == [4, 4, 4, 4, 4, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert len(notes.texts) == 1
    assert _losses(tmp_path / "run") == pytest.approx(_losses(tmp_path / "whole"), rel=1e-5)


def test_one_sequence_that_does_not_fit_is_an_error_that_says_what_to_do(cramped: Any, recipe: Recipe, tmp_path: Path) -> None:
    seen, notes = cramped(0, True), _Notes()
    with pytest.raises(WorkError, match="one sequence does not fit into memory: CUDA out of memory") as caught:
        train(recipe, tmp_path / "run", device="cpu", observer=notes)
    assert "activation_checkpointing" in str(caught.value.hint)
    assert seen[-2:] == [2, 1]
    assert len(notes.texts) == 1


def test_a_micro_batch_left_to_auto_is_one_that_fits(cramped: Any, short_file: Path, tmp_path: Path) -> None:
    seen, notes = cramped(2, True), _Notes()
    options = ("training.steps=2", "training.micro_batch_size=auto", "training.compile=off", "evaluation.max_tokens=50")
    train(tiny_recipe(short_file, "modern", *options), tmp_path / "run", device="cpu", observer=notes)
    assert seen[:3] == [8, 4, 2]
    assert set(seen[3:]) == {2}
    assert notes.texts == []
    assert Run(tmp_path / "run").recipe.training.micro_batch_size == 2


def test_memory_that_runs_out_in_a_trial_of_the_compiler_ends_nothing(
    cramped: Any, short_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "compiler", lambda device: "g++")
    cramped(2, True)
    notes = _Notes()
    recipe = tiny_recipe(short_file, "modern", "training.steps=2", "training.compile=auto", "evaluation.max_tokens=50")
    assert train(recipe, tmp_path / "run", device="cpu", observer=notes).step == 2
    assert len(notes.texts) == 1


def test_other_errors_are_not_tried_again(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(room, "accumulate", broken)
    notes = _Notes()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        train(recipe, tmp_path / "run", device="cpu", observer=notes)
    assert notes.texts == []


def test_computing_blocks_again_trains_the_same_model(recipe: Recipe, in_one_go: Path, tmp_path: Path) -> None:
    training = recipe.training.model_copy(update={"activation_checkpointing": True})
    train(recipe.model_copy(update={"training": training}), tmp_path / "run", device="cpu")
    assert _losses(tmp_path / "run") == pytest.approx(_losses(in_one_go), rel=1e-5)


def test_events_come_in_order_and_every_checkpoint_before_its_evaluation(recipe: Recipe, tmp_path: Path) -> None:
    heard: list[tuple[str, int]] = []

    class Ear(Observer):
        def step(self, event: StepEvent) -> None:
            heard.append(("step", event.step))

        def saved(self, step: int) -> None:
            heard.append(("saved", step))

        def evaluation(self, event: EvaluationEvent) -> None:
            heard.append(("evaluated", event.step))

    short = recipe.training.model_copy(update={"steps": 6})
    result: TrainResult = train(recipe.model_copy(update={"training": short}), tmp_path / "run", device="cpu", observer=Ear())
    assert result.step == 6
    assert [what for what in heard if what[0] == "step"] == [("step", step) for step in range(1, 7)]
    assert [what for what in heard if what[0] == "saved"] == [("saved", 4), ("saved", 5), ("saved", 6)]
    for step in (4, 6):
        assert heard.index(("step", step)) < heard.index(("saved", step)) < heard.index(("evaluated", step))
