"""The summary at the end of training agrees with the run folder."""

from __future__ import annotations

import io
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_recipe
from tinylm_cli.console import StderrConsole
from tinylm_cli.train_summary import show_summary

from tinylm.evaluation.evaluate_run import BreakdownOptions, evaluate_run
from tinylm.pipeline import TrainResult, train
from tinylm.run import Run
from tinylm.training.metrics import MetricsFile, SampleEvent
from tinylm.training_summary import SavedSample, TrainingSummary, read_samples, summarize

SUMMARY = TrainingSummary(8.32, 8.4, 4.33, 1.62, (), {"2-gram Kneser-Ney": 2.1, "5-gram Kneser-Ney": 1.7, "xz": 2.0})


def result(**changes: object) -> TrainResult:
    values = {"loss": 4.33, "perplexity": 75.9, "bits_per_byte": 1.62}
    finished = TrainResult(
        run="runs/a b",
        step=575,
        steps=575,
        fraction_done=1.0,
        limited_by_time=True,
        vocab_size=4096,
        tokens=1_177_600,
        train_loss=4.2,
        metrics=values,  # type: ignore[arg-type]
        best_step=575,
        best_value=4.33,
        seconds=300.0,
        train_seconds=280.0,
        tokens_per_second=4205.0,
        parameters=1_000_000,
        device="cpu",
        precision="fp32",
        peak_memory_bytes=None,
        stopped="done",
    )
    return replace(finished, **changes)  # type: ignore[arg-type]


def shown(trained: TrainResult, summary: TrainingSummary = SUMMARY, width: int = 100, *, terminal: bool = False) -> str:
    console = StderrConsole(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, highlight=False)
    show_summary(trained, summary, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_summary_of_a_finished_run_shows_losses_baselines_and_next_commands() -> None:
    text = shown(result())
    assert "8.40 at the first step -> 4.33 on held-out text, like a choice among 76 equally likely tokens" in text
    assert "uniform guessing: 8.32, 4,096 tokens" in text
    assert "2-gram Kneser-Ney 2.10, xz 2.00, 5-gram Kneser-Ney 1.70, this model 1.62 bits per byte" in text
    assert "575 of 575 steps" in text
    for command in ("sample --run 'runs/a b'", "serve --run 'runs/a b'", "eval --run 'runs/a b' --html", "plot 'runs/a b'"):
        assert f"tinylm {command}" in text


def test_a_suggested_command_says_which_extra_it_needs_if_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs an extra" not in shown(result())
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    text = shown(result(), width=200)
    assert 'draw the loss curves (needs an extra: pip install "tinylm[plot]")' in text
    assert text.count("needs an extra") == 1


@pytest.mark.parametrize("task", ["chat", "classification", "masked_lm", "translation"])
def test_the_next_commands_suit_the_task(task: str) -> None:
    text = shown(result(), replace(SUMMARY, task=task))
    command = {"chat": "chat", "classification": "classify", "masked_lm": "fill", "translation": "translate"}[task]
    assert f"tinylm {command} " in text
    assert "tinylm sample" not in text
    assert "--html" not in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"limited_by_time": True, "steps": 575}, "16%: 92 of about 575 steps"),
        ({"limited_by_time": False, "steps": 575}, "16%: 92 of 575 steps"),
    ],
)
def test_the_summary_of_a_stopped_run_shows_its_progress(changes: dict[str, object], expected: str) -> None:
    unevaluated = {"loss": None, "perplexity": None, "bits_per_byte": None}
    stopped = result(step=92, fraction_done=0.16, stopped="signal", metrics=unevaluated, **changes)
    text = shown(stopped, replace(SUMMARY, heldout_loss=None, bits_per_byte=None))
    assert expected in text
    assert "not evaluated yet" in text
    assert "tinylm train 'runs/a b' --resume" in text
    assert "tinylm serve" not in text


def test_a_run_stopped_before_its_final_evaluation_is_complete() -> None:
    text = shown(result(stopped="signal", metrics={"loss": None}), replace(SUMMARY, heldout_loss=None, bits_per_byte=None), 200)
    assert "575 of 575 steps" in text
    assert "100%" not in text
    assert "training is complete, but the final evaluation is missing. Run it with: tinylm train 'runs/a b' --resume" in text
    assert "stopped early" not in text


@pytest.mark.parametrize(("width", "side_by_side"), [(45, False), (80, True), (120, True)])
def test_the_first_and_last_sample_are_side_by_side_if_they_fit(width: int, side_by_side: bool) -> None:
    samples = (SavedSample(10, "The xq zz"), SavedSample(500, "The for statement\n\nis used"))
    text = shown(result(), replace(SUMMARY, samples=samples), width, terminal=True)
    assert ("The xq zz" in next(line for line in text.splitlines() if "The for statement" in line)) == side_by_side
    assert all(len(line) <= width for line in text.splitlines())
    assert "is used" in text


def test_samples_are_read_as_they_were_written(tmp_path: Path, tiny_run: Run) -> None:
    texts = ["a\n\n## Step 3\n\n    b", "", "  indented\n", "\u2028x\r\ny"]
    (tmp_path / "recipe.yaml").write_bytes((tiny_run.path / "recipe.yaml").read_bytes())
    log = MetricsFile(tmp_path, 0)
    for step, text in enumerate(texts):
        log.sample(SampleEvent(step, "The ", text))
    log.close()
    assert read_samples(Run(tmp_path)) == [SavedSample(step, f"The {text}") for step, text in enumerate(texts)]


def test_the_summary_matches_the_run(text_file: Path, tmp_path: Path) -> None:
    sampling = ("sampling.every=5", "sampling.prompts=[The, A]", "sampling.max_new_tokens=3", "training.steps=10")
    trained = train(tiny_recipe(text_file, "modern", *sampling), tmp_path / "run", device="cpu")
    run = Run.open(tmp_path / "run")
    summary = summarize(run, seconds=1000)
    lines = list(run.metrics())
    assert summary.first_loss == lines[0]["loss"]
    assert summary.heldout_loss == trained.metrics["loss"]
    assert summary.equally_likely_tokens == pytest.approx(trained.metrics["perplexity"])
    assert summary.uniform_loss == pytest.approx(math.log(trained.vocab_size))
    assert [sample.step for sample in summary.samples] == [5, 10]
    assert all(sample.text.startswith("The") for sample in summary.samples)
    evaluated = evaluate_run(run, details=BreakdownOptions(baselines=True), device="cpu")
    assert summary.baselines == pytest.approx(evaluated.baselines)
    assert summarize(run, seconds=0).baselines == {}, "computing them would take more than a tenth of the training time"
