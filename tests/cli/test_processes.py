"""Test behavior that needs separate processes: closed pipes, signals, and decoding in another process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from command import COMMAND, environment, tinylm

from tinylm.pipeline import train
from tinylm.run import Run

posix = pytest.mark.skipif(os.name == "nt", reason="requires POSIX pipes and signals")


@posix
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["recipes"],
        ["recipes", "quickstart"],
        ["recipes", "--json"],
        ["runs", "RUNS"],
        ["tokenize", "encode", "TEXT", "-r", "RUN"],
        ["eval", "-r", "RUN", "-q"],
    ],
)
def test_a_closed_stdout_is_not_an_error(arguments: list[str], tiny_run: Run, text_file: Path) -> None:
    paths = {"RUN": tiny_run.path, "RUNS": tiny_run.path.parent, "TEXT": text_file}
    reading, writing = os.pipe()
    os.close(reading)  # the first write then fails
    command = [*COMMAND, *(str(paths.get(argument, argument)) for argument in arguments)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment(), timeout=600, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@posix
def test_a_closed_stderr_does_not_stop_training(recipe_file: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*COMMAND, "train", str(recipe_file), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writing, env=environment(), timeout=600, check=False)
    os.close(writing)
    assert (done.returncode, done.stdout.decode()) == (0, f"{tmp_path / 'run'}\n")


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_and_stops_training(
    number: signal.Signals, code: int, recipe_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [*COMMAND, "train", str(recipe_file), "--set", "training.steps=100000", "--out", str(folder), "--json"]
    command += ["--set", "training.compile=off"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(b"step "):
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=600)
    result = json.loads(out)
    assert (process.returncode, result["stopped"]) == (code, "signal")
    assert b"stopping after this step" in err
    assert b"Traceback" not in err
    run = Run.open(folder)
    last = run.checkpoint("last")
    assert last.step == result["step"] == max(line["step"] for line in run.metrics())
    assert last.problem() is None
    assert [path.name for path in folder.rglob(".*")] == [".lock"], "no partial files remain"
    assert train(run.recipe, folder, device="cpu", resume=True, stop_after=0.0).step == last.step + 1


@posix
def test_sigterm_leaves_no_temporary_files(tiny_run: Run, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    command = [*COMMAND, "eval", "-", "-r", str(tiny_run.path)]
    variables = {**environment(), "TINYLM_CACHE": str(cache)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables) as process:
        assert process.stdin is not None
        while not list(cache.glob("spool/*/*")):  # the command reads stdin until it is closed
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (143, b"")
    assert b"Traceback" not in err
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_tokens_can_be_decoded_in_another_process(tiny_run: Run) -> None:
    text = "two\r\nlines, a NUL \0 and 🙂".encode()
    ids = tinylm("tokenize", "encode", "-r", tiny_run.path, stdin=text)
    assert tinylm("tokenize", "decode", "-r", tiny_run.path, stdin=ids.stdout).stdout == text
