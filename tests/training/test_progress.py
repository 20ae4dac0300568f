"""Progress is written to and restored from state.json, for language models and for objectives with other metrics."""

from __future__ import annotations

import json
from typing import Any

from tinylm.evaluation.metrics import BITS_PER_BYTE, LANGUAGE_MODEL, LOSS, Metric, Metrics
from tinylm.run import FORMAT
from tinylm.training.guards import GuardState
from tinylm.training.progress import Progress, check_state

FORMAT_3 = """{
 "step": 10, "cursor": 80, "tokens": 2560, "seconds": 1.5, "train_seconds": 1.25, "train_loss": 5.5,
 "val_loss": 5.75, "val_bits_per_byte": 2.5, "evaluated_step": 10, "best_step": 5, "best_val_loss": 5.625,
 "evaluations_since_best": 1,
 "watch": {"in_a_row": 0, "skipped": 1, "spikes": 2, "rollbacks": 0, "recent": [6.0, 5.5]}
}"""
ACCURACY = Metric("accuracy", "accuracy", "", lower_is_better=False, format=".1%")


def state(**changes: Any) -> dict[str, Any]:
    return {**json.loads(FORMAT_3), **changes}


def test_a_format_3_state_round_trips_with_the_same_keys_in_the_same_order() -> None:
    assert FORMAT == 3
    progress = Progress.from_state(state(), LANGUAGE_MODEL)
    assert progress.metrics == Metrics("loss", {"loss": 5.75, "bits_per_byte": 2.5})
    assert (progress.best_step, progress.best_value, progress.evaluations_since_best) == (5, 5.625, 1)
    assert progress.watch == GuardState(0, 1, 2, 0, [6.0, 5.5])
    assert list(progress.as_state(LANGUAGE_MODEL).items()) == list(state().items())


def test_results_are_null_before_the_first_evaluation() -> None:
    fresh = Progress(watch=GuardState())
    saved = fresh.as_state(LANGUAGE_MODEL)
    assert saved.keys() == state().keys()
    assert [saved[key] for key in ("val_loss", "val_bits_per_byte", "best_val_loss")] == [None, None, None]
    assert Progress.from_state(saved, LANGUAGE_MODEL) == fresh


def test_a_checkpoint_without_the_number_of_evaluations_since_the_best_one_can_be_restored() -> None:
    older = state(scaler={})
    del older["evaluations_since_best"]
    check_state(older, "state.json")
    assert Progress.from_state(older, LANGUAGE_MODEL).evaluations_since_best == 0


def test_a_checkpoint_without_a_best_step_has_no_best_value() -> None:
    assert Progress.from_state(state(best_step=0), LANGUAGE_MODEL).best_value is None


def test_the_keys_depend_on_the_metrics_of_the_objective() -> None:
    defined = (ACCURACY, LOSS)
    progress = Progress(step=3, metrics=Metrics("accuracy", {"accuracy": 0.5, "loss": 2.0}), best_step=3, best_value=0.5)
    saved = progress.as_state(defined)
    assert (saved["val_accuracy"], saved["val_loss"], saved["best_val_accuracy"]) == (0.5, 2.0, 0.5)
    assert BITS_PER_BYTE.key not in saved
    assert Progress.from_state(saved, defined) == progress


def test_the_best_value_is_not_restored_if_the_primary_metric_has_changed() -> None:
    """The next evaluation is then the best so far."""
    restored = Progress.from_state(state(), (ACCURACY, LOSS))
    assert (restored.metrics, restored.best_value) == (None, None)
