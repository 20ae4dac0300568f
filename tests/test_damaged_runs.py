"""Damaged and forged run folders: `tinylm runs` marks damaged runs, and no file makes a command hang or crash."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command import RunCli

from tinylm.errors import InputError, WorkError
from tinylm.pipeline import train
from tinylm.run import LOCK, Run, check_run_folder
from tinylm.training.checkpoint import CheckpointWriter
from tinylm.training.jsonl_log import JsonLinesLog


@pytest.fixture
def run(tiny_run: Run, tmp_path: Path) -> Run:
    shutil.copytree(tiny_run.path, tmp_path / "runs" / "a")
    return Run(tmp_path / "runs" / "a")


def test_runs_marks_damaged_runs(run: Run, tiny_run: Run, run_cli: RunCli) -> None:
    shutil.copytree(tiny_run.path, run.path.with_name("b"))
    (run.path.with_name("c") / "metrics.jsonl").mkdir(parents=True)
    (run.path.with_name("c") / "recipe.yaml").touch()
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "eval", "step": "ten"}\n' + "[" * 100_000 + "\n")
    os.utime(run.path / "metrics.jsonl", (4e9, 4e9))
    listed = run_cli("runs", run.path.parent, "--json")
    assert listed.code == 0
    a, b, c = listed.json
    assert a["problem"] == "metrics.jsonl has 2 damaged lines"
    assert a["age_seconds"] == 0
    assert (b["problem"], b["step"], a["step"]) == (None, 20, 20)
    assert "is not a file" in c["problem"]


DAMAGED_LINES = (
    *("{", "[]", "null", '{"kind": "eval"}', '{"kind": ["eval"], "step": 1}', '{"kind": "eval", "step": 1e400}'),
    *(
        '{"kind": "step", "step": 4, "tokens": 5, "loss": "low"}',
        '{"kind": "step", "step": -1, "tokens": 5, "loss": 1.0}',
        "\ud800",
    ),
)


def test_plot_and_compare_skip_the_damaged_lines_of_one_log(run: Run, tiny_run: Run, run_cli: RunCli) -> None:
    with open(run.path / "metrics.jsonl", "a", encoding="utf-8", errors="surrogatepass") as file:
        file.write("\n".join(DAMAGED_LINES) + "\n" + "[" * 100_000 + "\n")
    assert list(run.metrics()) == list(tiny_run.metrics())
    assert run.damaged_metrics() == len(DAMAGED_LINES) + 1
    image = run.path.parent / "loss.svg"
    plotted = run_cli("plot", run.path, tiny_run.path, "--out", image)
    assert plotted.code == 0, plotted.err
    assert b"<svg" in image.read_bytes()
    compared = run_cli("compare", run.path, tiny_run.path, "--json")
    assert compared.code == 0, compared.err
    assert compared.json


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes")
@pytest.mark.parametrize("name", ["recipe.yaml", "tokenizer.json", "metrics.jsonl", "heldout/heldout.npy", "checkpoints/last"])
def test_a_named_pipe_is_rejected_without_reading_it(name: str, run: Run) -> None:
    (run.path / name).unlink()
    os.mkfifo(run.path / name)
    with pytest.raises(InputError, match="is neither a file nor a folder"):
        Run.open(run.path)


@pytest.mark.skipif(os.name == "nt", reason="Windows requires a privilege for symbolic links")
@pytest.mark.parametrize("name", ["metrics.jsonl", "heldout", "samples.md"])
def test_a_link_to_itself_is_rejected(name: str, run: Run) -> None:
    path = run.path / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(path)
    with pytest.raises(InputError, match="symbolic links"):
        Run.open(run.path)


@pytest.mark.parametrize("name", ["step-²", "step-", "step-1x", "step-" + "9" * 5000])
def test_a_folder_with_an_invalid_step_is_not_a_checkpoint(name: str, run: Run) -> None:
    if len(name) < 200:
        shutil.copytree(run.checkpoint("last").path, run.path / "checkpoints" / name)
    assert all(checkpoint.step > 0 for checkpoint in run.checkpoints())
    with pytest.raises(InputError, match="is not best, last or a step"):
        run.checkpoint(name)


FORGED: list[Callable[[dict[str, object]], object]] = [
    lambda state: state.pop("cursor"),
    lambda state: state.update(tokens="many"),
    lambda state: state.update(watch=[]),
    lambda state: state.update(fingerprints=None),
    lambda state: state.update(step=1.5),
    lambda state: state.update(seconds=None),
]


@pytest.mark.parametrize("forge", FORGED)
def test_a_state_with_missing_or_invalid_values_is_rejected(forge: Callable[[dict[str, object]], object], run: Run) -> None:
    for checkpoint in run.checkpoints():
        state = json.loads((checkpoint.path / "state.json").read_text())
        forge(state)
        (checkpoint.path / "state.json").write_text(json.dumps(state))
        (checkpoint.path / "manifest.json").unlink()
        from tinylm.run import write_manifest

        write_manifest(checkpoint.path)
    with pytest.raises(InputError, match=r"state\.json has"):
        train(run.recipe, run.path, device="cpu", resume=True)


def test_a_folder_with_only_leftovers_from_a_killed_process_counts_as_empty(tmp_path: Path) -> None:
    for name in (LOCK, ".recipe.yaml.0123456789ab.tmp"):
        (tmp_path / name).touch()
    check_run_folder(tmp_path, resume=False, overwrite=False)
    (tmp_path / "letter.txt").touch()
    with pytest.raises(InputError, match="not empty and not a run folder"):
        check_run_folder(tmp_path, resume=False, overwrite=False)


def test_a_rollback_that_cannot_remove_checkpoints_is_reported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run.checkpoints()[0]

    def fail(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(WorkError, match=r"could not be (removed|saved).*Read-only"):
        CheckpointWriter(run.path, keep=1).discard_after(first, first.step)


def test_a_log_that_cannot_be_rewritten_stays_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with JsonLinesLog(tmp_path / "log.jsonl", lambda record: True) as log:
        log.write({"step": 1})
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            with pytest.raises(OSError, match="No space left"):
                log.remove_unless(lambda record: False)
        log.write({"step": 2})
        assert [record["step"] for record in log.records()] == [1, 2]
