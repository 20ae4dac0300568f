"""Trackers receive the same values as metrics.jsonl, including the values from before a run was resumed."""

from __future__ import annotations

import json
import math
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from conftest import StopAt, tiny_recipe

from tinylm.errors import InputError
from tinylm.pipeline import train
from tinylm.run import Run
from tinylm.training import tracking
from tinylm.training.metrics import Observer

Values = list[tuple[str, int, float]]
"""The key, step and value of each logged number."""


def logged(run: Path) -> Values:
    """Return the numbers in metrics.jsonl, sorted."""
    return sorted(
        (key, line["step"], value)
        for line in Run.open(run).metrics()
        for key, value in line.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step"
    )


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Yield the records in a LevelDB log, whose 32 KiB blocks consist of fragments with a checksum, a length and a type."""
    position, parts = 7, b""  # skip the file header
    while position + 7 <= len(content):
        if (1 << 15) - position % (1 << 15) < 7:
            position += (1 << 15) - position % (1 << 15)
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a complete record or its last fragment
            yield parts
            parts = b""


def test_tensorboard_contains_all_metrics_of_a_resumed_run(text_file: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = tiny_recipe(text_file, "modern", "tracking=tensorboard")
    train(recipe, tmp_path / "run", device="cpu", observer=StopAt(7))
    train(recipe, tmp_path / "run", device="cpu", resume=True)

    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"scalars": 0})
    events.Reload()
    shown = {(key, scalar.step): scalar.value for key in events.Tags()["scalars"] for scalar in events.Scalars(key)}
    expected = {(key, step): value for key, step, value in logged(tmp_path / "run")}
    assert shown.keys() == expected.keys()
    assert all(math.isclose(shown[key], expected[key], rel_tol=1e-6) for key in expected)
    assert ("val_loss", 20) in shown


def test_wandb_contains_all_metrics_of_a_killed_and_resumed_run_offline(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = tiny_recipe(text_file, "modern", "tracking=wandb", "training.steps=8", "checkpoint.every=4", "checkpoint.keep=2")
    train(recipe, tmp_path / "run", device="cpu", observer=StopAt(6))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")  # as if it was killed after step 6
    train(recipe, tmp_path / "run", device="cpu", resume=True)

    wandb.teardown()  # wandb's service writes the file in the background
    from wandb.proto import wandb_internal_pb2

    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    shown: Values = []
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        shown += [(key, items["step"], value) for key, value in items.items() if key != "step" and not key.startswith("_")]
    assert sorted(shown) == logged(tmp_path / "run")
    assert [step for key, step, _ in sorted(shown) if key == "loss"] == list(range(1, 9))


class RecordingBackend:
    errors = (OSError,)

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.steps: list[int] = []
        self.started = self.closed = False

    def start(self) -> None:
        self.started = True

    def log(self, step: int, values: object) -> None:
        if step == self.fail_at:
            raise OSError(28, "No space left on device")
        self.steps.append(step)

    def close(self) -> None:
        self.closed = True


def test_training_continues_if_a_tracker_fails(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = RecordingBackend(fail_at=3)
    monkeypatch.setitem(tracking.BACKENDS, "trackio", lambda folder, recipe: backend)
    notes: list[str] = []

    class Collector(Observer):
        def note(self, text: str) -> None:
            notes.append(text)

    result = train(tiny_recipe(text_file, "modern", "tracking=trackio"), tmp_path / "run", device="cpu", observer=Collector())
    assert result.step == 20
    assert backend.steps == [1, 2]
    assert [note for note in notes if "trackio" in note] == [
        "trackio failed: [Errno 28] No space left on device; training continues without it"
    ]


def test_a_resumed_run_sends_its_history_to_the_tracker(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backends: list[RecordingBackend] = []

    def backend(folder: Path, recipe: object) -> RecordingBackend:
        backends.append(RecordingBackend())
        return backends[-1]

    monkeypatch.setitem(tracking.BACKENDS, "trackio", backend)
    recipe = tiny_recipe(text_file, "modern", "tracking=trackio")
    train(recipe, tmp_path / "run", device="cpu", observer=StopAt(4))
    train(recipe, tmp_path / "run", device="cpu", resume=True)
    first, second = backends
    assert first.closed
    assert second.started
    assert list(dict.fromkeys(second.steps)) == list(range(1, 21))


def test_a_resumed_run_becomes_a_new_trackio_run_with_its_history(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Values] = []
    stub = ModuleType("trackio")
    stub.init = lambda project, **options: runs.append([])  # type: ignore[attr-defined]
    stub.log = lambda values, step: runs[-1].extend((key, step, value) for key, value in values.items())  # type: ignore[attr-defined]
    stub.finish = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", stub)
    recipe = tiny_recipe(text_file, "modern", "tracking=trackio")
    train(recipe, tmp_path / "run", device="cpu", observer=StopAt(4))
    train(recipe, tmp_path / "run", device="cpu", resume=True)
    assert len(runs) == 2
    assert sorted(runs[-1]) == logged(tmp_path / "run")


def test_a_missing_tracking_package_is_reported_before_training(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match="trackio"):
        train(tiny_recipe(text_file, "modern", "tracking=trackio"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
