"""Test checkpoints, logs, views and commands with an objective whose primary metric is accuracy (higher is better)."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pytest
from command import RunCli
from conftest import tiny_recipe
from rich.console import Console
from tinylm_cli.live import PlainView, TerminalView

from tinylm.evaluation.metrics import LOSS, METRICS, Metric, Metrics
from tinylm.model.base import Model
from tinylm.pipeline import TrainResult, train
from tinylm.recipe import ObjectiveVariant
from tinylm.run import Run
from tinylm.training import objectives
from tinylm.training.metrics import Observers
from tinylm.training.objectives import CausalLM, Heldout

ACCURACY = Metric("accuracy", "accuracy", "", lower_is_better=False, format=".1%")
SCORES = {5: (0.2, 3.0), 10: (0.5, 4.0), 15: (0.4, 5.0)}
"""Accuracy and loss by step. The accuracy is best at step 10, and the loss is best at step 5."""


class AccuracySection(ObjectiveVariant):
    """Predict each token, and evaluate the predictions by accuracy."""

    architectures = ("decoder",)
    name: Literal["accuracy_lm"] = "accuracy_lm"


class AccuracyObjective(CausalLM):
    name = "accuracy_lm"
    metrics: Sequence[Metric] = (ACCURACY, LOSS)

    def __init__(self) -> None:
        self._scores = iter(SCORES.values())

    def evaluate(self, network: Model, heldout: Heldout) -> Metrics:
        accuracy, loss = next(self._scores)
        return Metrics("accuracy", {"accuracy": accuracy, "loss": loss})


@pytest.fixture(scope="module")
def trained(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TrainResult, Run, str, str]]:
    """The result, the run, the lines of the plain view and the final panel of the terminal view."""
    built_in, METRICS["accuracy"] = METRICS["accuracy"], ACCURACY
    objectives.register(AccuracySection, lambda section: AccuracyObjective())
    folder = tmp_path_factory.mktemp("runs") / "accurate"
    recipe = tiny_recipe(text_file, "modern", "objective=accuracy_lm", "training.steps=15", "evaluation.every=5")
    plain, panel = (Console(file=io.StringIO(), width=110, color_system=None, highlight=False) for _ in range(2))
    view = TerminalView(panel, "tinylm train accurate")
    with view:
        result = train(recipe, folder, device="cpu", observer=Observers([PlainView(plain), view]))
    panel.print(view.render())
    texts = [console.file.getvalue() for console in (plain, panel) if isinstance(console.file, io.StringIO)]
    yield result, Run(folder), texts[0], texts[1]
    objectives.unregister(AccuracySection)
    METRICS["accuracy"] = built_in


Trained = tuple[TrainResult, Run, str, str]


def test_the_checkpoint_with_the_highest_accuracy_is_the_best(trained: Trained) -> None:
    result, run, _, _ = trained
    assert (result.best_step, result.best_value) == (10, 0.5)
    assert run.checkpoint("best").step == 10
    state = run.checkpoint("last").state  # saved at step 15, before its evaluation
    assert (state["val_accuracy"], state["val_loss"], state["best_val_accuracy"], state["best_step"]) == (0.5, 4.0, 0.5, 10)
    assert not {"val_bits_per_byte", "best_val_loss"} & state.keys()


def test_the_log_and_the_json_result_have_the_keys_of_the_metrics(trained: Trained) -> None:
    result, run, _, _ = trained
    evaluations = [line for line in run.metrics() if line["kind"] == "eval"]
    assert {line["step"]: (line["val_accuracy"], line["val_loss"]) for line in evaluations} == SCORES
    assert [line["best"] for line in evaluations] == [True, True, False]
    assert "val_bits_per_byte" not in evaluations[0]
    document = result.as_dict()
    assert (document["val_accuracy"], document["val_loss"], document["best_val_accuracy"]) == (0.4, 5.0, 0.5)
    assert not {"val_perplexity", "val_bits_per_byte", "best_val_loss", "metrics"} & document.keys()
    json.dumps(document)


def test_plain_lines_show_the_accuracy(trained: Trained) -> None:
    lines = [re.sub(" +", " ", line).strip() for line in trained[2].splitlines() if "held-out" in line]
    assert lines == [
        "step 5 held-out accuracy 20.0% loss 3.0000 best so far",
        "step 10 held-out accuracy 50.0% loss 4.0000 best so far",
        "step 15 held-out accuracy 40.0% loss 5.0000",
    ]


def test_the_panel_shows_the_accuracy_in_its_own_chart(trained: Trained) -> None:
    panel = trained[3]
    assert "50.0% at step 10" in panel
    assert "bits/byte" not in panel
    chart = panel[panel.index("held-out accuracy") :].splitlines()
    assert "50.0%" in chart[1]
    assert "20.0%" in chart[4]


def test_runs_lists_the_best_accuracy(trained: Trained, run_cli: RunCli) -> None:
    folder = trained[1].path.parent
    (row,) = run_cli("runs", folder, "--json").json
    assert (row["best_step"], row["best_val_accuracy"], row["best_val_loss"]) == (10, 0.5, 4.0)
    table = run_cli("runs", folder).out
    assert "held-out accuracy" in table
    assert "50.0%" in table
    assert "bits per byte" not in table


def test_compare_shows_the_curves_of_the_accuracy(trained: Trained, run_cli: RunCli) -> None:
    path = trained[1].path
    document = run_cli("compare", path, path, "--json").json
    assert document["curve_metric"] == "accuracy"
    assert document["curves"] == [{"name": step, "values": [accuracy] * 2} for step, (accuracy, _) in SCORES.items()]
    shown = run_cli("compare", path, path).out
    assert "held-out accuracy at step (higher is better)" in " ".join(shown.split())
    assert shown.count("50.0%") == 2


def test_plot_draws_the_accuracy_or_a_chosen_metric(
    trained: Trained, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # keep text as text in the SVG
    path, image = trained[1].path, tmp_path / "curve.svg"
    assert run_cli("plot", path, "--out", image).code == 0
    picture = image.read_text(encoding="utf-8")
    assert "accuracy (higher is better)" in picture
    assert re.search(r"\b50(\.0)?%", picture)
    assert run_cli("plot", path, "--metric", "loss", "--out", image).code == 0
    assert "nats per token" in image.read_text(encoding="utf-8")
    missing = run_cli("plot", path, "--metric", "bits_per_byte", "--out", image)
    assert missing.code == 2
    assert "the run does not measure bits_per_byte" in missing.err
    unknown = run_cli("plot", path, "--metric", "acuracy", "--out", image)
    assert unknown.code == 2
    assert "unknown metric: acuracy (did you mean accuracy?)" in unknown.err
