"""Test that metrics define their labels, their direction and the keys under which their values are stored."""

from __future__ import annotations

import math

import pytest

from tinylm.evaluation.metrics import (
    BITS_PER_BYTE,
    LOSS,
    METRICS,
    PERPLEXITY,
    Metric,
    Metrics,
    best_index,
    perplexity_of,
    primary_metric,
)

ACCURACY = Metric("accuracy", "accuracy", "", lower_is_better=False, format=".1%")


@pytest.fixture(autouse=True)
def _accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "accuracy", ACCURACY)


def accuracies(*values: float) -> list[Metrics]:
    return [Metrics("accuracy", {"accuracy": value, "loss": value}) for value in values]


def test_descriptions_contain_the_label_the_value_and_the_unit() -> None:
    assert LOSS.described(2.5) == "loss 2.5000"
    assert LOSS.described(2.5, unit=True) == "loss 2.5000 nats per token"
    assert BITS_PER_BYTE.described(1.2) == BITS_PER_BYTE.described(1.2, unit=True) == "1.2000 bits per byte"
    assert PERPLEXITY.described(12.345, unit=True) == "perplexity 12.35"
    assert ACCURACY.described(0.5, unit=True) == "accuracy 50.0%"


def test_headings_and_axes_show_the_metric_and_whether_higher_is_better() -> None:
    assert [metric.heading for metric in (LOSS, BITS_PER_BYTE, ACCURACY)] == ["held-out loss", "bits per byte", "held-out accuracy"]
    assert [metric.axis for metric in (LOSS, BITS_PER_BYTE)] == ["nats per token", "bits per byte"]
    assert ACCURACY.axis == "accuracy (higher is better)"


@pytest.mark.parametrize("metric", [LOSS, ACCURACY])
def test_better_values_are_lower_or_higher_depending_on_the_metric(metric: Metric) -> None:
    assert metric.better(1.0, 2.0) is metric.lower_is_better
    assert metric.better(2.0, 1.0) is not metric.lower_is_better
    assert not metric.better(1.0, 1.0)
    assert metric.better(1.0, None)
    for value in (math.nan, math.inf, -math.inf):
        assert not metric.better(value, None)
        assert not metric.better(value, 1.0)


def test_values_are_stored_with_the_primary_metric_first() -> None:
    metrics = Metrics("accuracy", {"loss": 1.5, "accuracy": 0.25})
    document = metrics.as_dict()
    assert list(document.items()) == [("val_accuracy", 0.25), ("val_loss", 1.5)]
    restored = Metrics.from_dict({"step": 3, **document, "seconds": 1.0, "best": True})
    assert restored == metrics
    assert (restored.metric, restored.value, restored["loss"]) == (ACCURACY, 0.25, 1.5)


def test_unknown_metrics_are_skipped_and_null_is_nan() -> None:
    restored = Metrics.from_dict({"val_made_up": 3.0, "val_loss": None})
    assert restored is not None
    assert restored.primary == "loss"
    assert math.isnan(restored.value)
    assert Metrics.from_dict({"kind": "step", "loss": 1.0, "val_made_up": 2.0}) is None


def test_the_best_evaluation_is_the_first_one_with_the_best_value() -> None:
    assert best_index(accuracies(0.2, 0.5, 0.5, math.nan, 0.4)) == 1
    losses = [Metrics("loss", {"loss": value}) for value in (3.0, 2.0, math.inf, 2.0)]
    assert best_index(losses) == 1
    assert best_index([*losses, *accuracies(0.1)]) == 4
    assert best_index([]) is None
    assert best_index(accuracies(math.nan)) is None


def test_the_first_evaluation_in_a_log_determines_the_primary_metric() -> None:
    step = {"kind": "step", "step": 1, "loss": 2.0}
    assert primary_metric([step, {"kind": "eval", "val_accuracy": 0.5, "val_loss": 1.0}]) is ACCURACY
    assert primary_metric([step]) is LOSS


def test_every_metric_is_registered_under_its_name() -> None:
    assert all(name == metric.name for name, metric in METRICS.items())


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    assert perplexity_of(math.log(50)) == pytest.approx(50)
    assert math.isfinite(perplexity_of(1e6))
