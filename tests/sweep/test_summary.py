"""Sweep summaries: averages over seeds, the best run, failed and pruned runs, and the plot."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tinylm.sweep.runner import Outcome
from tinylm.sweep.summary import summarize


def outcome(run: str, loss: float | None, **values: str) -> Outcome:
    result = {} if loss is None else {"val_loss": loss + 0.1, "best_val_loss": loss, "seconds": 2.0, "tokens": 100, "parameters": 7}
    return Outcome(run, f"runs/{run}", values, "digest", result, None if loss is not None else "it failed")


def test_runs_that_differ_only_in_the_seed_are_averaged() -> None:
    summary = summarize(
        [
            outcome("a", 2.0, width="8", seed="1"),
            outcome("b", 2.4, width="8", seed="2"),
            outcome("c", 2.1, width="16", seed="1"),
            outcome("d", 2.1, width="16", seed="2"),
        ]
    )
    assert [group.values["width"] for group in summary.groups] == ["16", "8"]
    assert summary.groups[1].mean == pytest.approx(2.2)
    assert summary.groups[1].deviation == pytest.approx(math.sqrt(0.08))
    assert summary.best_row is not None
    assert summary.best_row.run == "runs/c"
    document = json.loads(json.dumps(summary.as_dict()))
    assert document["rows"][0] == {
        "run": "runs/a",
        "values": {"width": 8, "seed": 1},
        "val_loss": 2.1,
        "best_val_loss": 2.0,
        "seconds": 2.0,
        "tokens": 100,
        "parameters": 7,
        "status": "done",
    }
    assert document["best"]["mean"] == pytest.approx(2.1)


def test_identical_runs_do_not_count_as_seeds() -> None:
    same = [outcome("a", 2.0, width="8"), outcome("b", 2.0, width="8"), outcome("c", 2.3, width="8", seed="2")]
    group = summarize([*same, same[0]]).groups[0]
    assert [row.run for row in group.rows] == ["runs/a", "runs/b", "runs/c"]
    assert group.scores == [2.0, 2.3]


def test_failed_and_pruned_runs_are_listed_but_never_chosen_as_best() -> None:
    pruned = Outcome("p", "runs/p", {"lr": "9"}, "digest", {"best_val_loss": 1.0, "val_loss": 1.0}, pruned=True)
    summary = summarize([outcome("a", None, lr="1"), pruned, outcome("b", 3.0, lr="2"), outcome("c", math.nan, lr="3")])
    assert [row.status for row in summary.rows] == ["failed", "pruned", "done", "done"]
    assert summary.best_row is not None
    assert summary.best_row.run == "runs/b"


def test_a_sweep_in_which_every_run_failed_has_no_best_run() -> None:
    summary = summarize([outcome("a", None, lr="1")])
    assert summary.best is None
    assert summary.as_dict()["best"] is None


def test_the_best_run_has_the_highest_value_of_a_metric_such_as_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinylm.evaluation import metrics

    accuracy = metrics.Metric("toy_accuracy", "accuracy", "", lower_is_better=False, format=".3f")
    monkeypatch.setitem(metrics.METRICS, "toy_accuracy", accuracy)
    outcomes = [Outcome(name, name, {"x": name}, "", {"best_val_toy_accuracy": value}) for name, value in (("a", 0.5), ("b", 0.7))]
    assert [group.values["x"] for group in summarize(outcomes).groups] == ["b", "a"]


def test_the_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tinylm.sweep.picture import draw

    numeric = summarize(
        [outcome(f"{w}-{s}", 2.0 + 1 / w + s / 50, width=str(w), lr="a", seed=str(s)) for w in (8, 128) for s in (1, 2)]
    )
    named = summarize([outcome("a", 2.0, name="adamw"), outcome("b", 2.1, name="muon")])
    for number, summary in enumerate((numeric, named)):
        draw(summary, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes()[:4] == b"\x89PNG"
