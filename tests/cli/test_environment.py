"""Test commands in unusual environments: unavailable devices, locales, unusual paths, closed streams and memory limits."""

from __future__ import annotations

import gzip
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import COMMAND, RunCli, environment, error_of

from tinylm.errors import InputError
from tinylm.recipe import loads
from tinylm.run import Run
from tinylm.training.out_of_memory import check_training_state


@pytest.mark.parametrize(
    ("device", "problem"),
    [
        ("cuda:0", "cuda is not available on this machine"),
        ("cuda", "cuda is not available on this machine"),
        ("cuda:x", "no such device 'cuda:x'"),
        ("gpu", "no such device 'gpu'"),
        ("CPU ", "no such device 'CPU '"),
        ("", "no such device ''"),
    ],
)
def test_a_dry_run_on_an_unavailable_device_is_rejected(
    device: str, problem: str, run_cli: RunCli, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert f"--device: {problem}" in error_of(run_cli("train", recipe_file, "--dry-run", "--device", device))


LOCALES = {
    "C": {"LC_ALL": "C"},
    "POSIX, not coerced": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "C without UTF-8 mode": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
}


@pytest.mark.parametrize("variables", LOCALES.values(), ids=LOCALES)
def test_arguments_and_text_are_utf8_in_every_locale(variables: dict[str, str], tiny_run: Run) -> None:
    command = [*COMMAND, "tokenize", "encode", "-r", str(tiny_run.path), "-"]
    variables = {**environment(), **variables}
    encoded = subprocess.run(command, input="café →".encode(), capture_output=True, env=variables, check=True)
    assert [int(id) for id in encoded.stdout.split()] == tiny_run.tokenizer.encode("café →")
    failed = subprocess.run([*COMMAND, "tokenize", "encode", "-r", "é→"], capture_output=True, env=variables, check=False)
    assert (failed.returncode, failed.stderr.decode().split(" (")[0]) == (2, "error: é→: no such run")


def test_a_path_that_is_not_utf8_is_rejected_and_shown(run_cli: RunCli, recipe_file: Path, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("the file system accepts only UTF-8")
    (folder / "recipe.yaml").touch()
    for arguments in (["tokenize", "encode", "-r", folder], ["train", recipe_file, "--out", folder / "run"]):
        result = subprocess.run([*COMMAND, *map(os.fsencode, arguments)], capture_output=True, env=environment(), check=False)
        assert (result.returncode, result.stdout) == (2, b"")
        assert os.fsencode(folder) in result.stderr
        assert b"the path is not valid UTF-8 (rename the folder" in result.stderr


def test_training_succeeds_even_if_stdout_is_closed(recipe_file: Path, tmp_path: Path) -> None:
    command = f"exec {' '.join(COMMAND)} train {recipe_file} --out {tmp_path / 'run'} >&-"
    result = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, env=environment(), check=False)
    assert result.returncode == 0, result.stderr
    assert Run.open(tmp_path / "run").checkpoint("last").step == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="requires /dev/full")
def test_a_command_fails_if_stdout_is_on_a_full_disk(tiny_run: Run) -> None:
    with open("/dev/full", "wb") as full:
        command = [*COMMAND, "tokenize", "encode", "-r", str(tiny_run.path), "-"]
        result = subprocess.run(command, input=b"abc", stdout=full, stderr=subprocess.PIPE, env=environment(), check=False)
    assert result.returncode == 1
    assert result.stderr.decode().splitlines()[-1].startswith("error: ")
    assert "No space left on device" in result.stderr.decode()


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Prevent this process from writing files larger than 20 kB, to simulate a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize(
    ("needs", "arguments", "name"),
    [
        ("transformers", ("export", "--to", "hf"), "folder"),
        ("torch", ("embed", "from-run", "--out"), "vectors.txt"),
        ("torch", ("embed", "from-run", "--out"), "vectors.safetensors"),
    ],
)
def test_nothing_is_left_of_a_result_that_does_not_fit_on_the_disk(
    needs: str, arguments: tuple[str, ...], name: str, run_cli: RunCli, tiny_run: Run, tmp_path: Path
) -> None:
    pytest.importorskip(needs)
    result = run_cli(*arguments, tmp_path / name, "-r", tiny_run.path, "--quiet")
    assert error_of(result, code=1) == f"{tmp_path / name}: File too large"
    assert list(tmp_path.iterdir()) == []


TOO_LARGE = [
    ("model.n_embd=65536", "model.n_layer=1000", "model.n_head=64"),
    ("model.n_embd=1048576", "model.n_head=1024"),
    ("model.ngram_embeddings=[2,3]", "model.ngram_rows=1000000000", "model.ngram_width=1024"),
    ("model.n_embd=4096", "model.n_layer=10000", "model.n_head=32", "training.optimizer=adamw"),
    ("model.context_length=16777216", "model.position=learned", "model.n_embd=65536", "model.n_head=64", "tokenizer.kind=byte"),
]


@pytest.mark.parametrize("settings", TOO_LARGE, ids=" ".join)
def test_a_model_that_does_not_fit_in_memory_is_rejected_before_it_is_built(settings: tuple[str, ...], tmp_path: Path) -> None:
    recipe = loads("data: {train: none.txt}\ntraining: {steps: 1}\n", settings, check_files=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"need at least [\d,.]+ GB of memory, but only [\d,.]+ GB are available"):
        check_training_state(recipe, 400, torch.device("cpu"), 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_recurrent_network_that_does_not_fit_in_memory_is_rejected(tmp_path: Path) -> None:
    settings = ("model={architecture: lstm, n_embd: 1048576, n_layer: 4}",)
    recipe = loads("data: {train: none.txt}\ntraining: {steps: 1}\n", settings, check_files=False)
    with pytest.raises(InputError, match="GB of memory"):
        check_training_state(recipe, 400, torch.device("cpu"), 1)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS limits memory only on Linux")
def test_a_memory_limit_is_reported_as_the_cause(run_cli: RunCli, recipe_file: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (200 << 20), before[1]))
    try:
        sizes = ("--set", "model.n_embd=4096", "--set", "model.n_layer=20", "--set", "model.n_head=8")
        result = run_cli("train", recipe_file, *sizes, "--out", tmp_path / "run", "-q")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert re.search(r"model: .* need at least \d+\.\d GB of memory, but only \d+\.\d GB are available", error_of(result))


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("std::bad_alloc")]
)
def test_running_out_of_memory_is_not_reported_as_a_bug(
    error: BaseException, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text"))

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(gzip.GzipFile, "read", fail)
    result = run_cli("tokenize", "train", tmp_path / "a.txt.gz", "--kind", "char", "--out", tmp_path / "t.json", "-q")
    assert error_of(result, code=1).startswith("out of memory: ")
