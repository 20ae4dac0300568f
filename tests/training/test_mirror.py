"""Copies of run folders in an object store: resumed and sampled elsewhere, interrupted, and unreachable."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import StopAt, tiny_recipe
from fsspec.implementations.memory import MemoryFileSystem

from tinylm.errors import InputError, WorkError
from tinylm.pipeline import train
from tinylm.recipe import Recipe, loads
from tinylm.remote_runs import RemoteRun
from tinylm.reporting import SILENT
from tinylm.run import Run, write_manifest
from tinylm.text.sources import Corpus
from tinylm.training.metrics import Observer
from tinylm.training.mirror import synchronize

STEPS = ("training.steps=8", "checkpoint.every=2", "evaluation.every=4", "training.optimizer=adamw", "training.compile=off")


class Flaky(MemoryFileSystem):
    """A store that fails after a number of changes, like a connection that breaks."""

    protocol = "flaky"
    changes_left = 10**9

    def _change(self) -> None:
        if Flaky.changes_left <= 0:
            raise ConnectionError("the connection was lost")
        Flaky.changes_left -= 1

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:  # type: ignore[override]
        self._change()
        super().pipe_file(path, value, **options)

    def put_file(self, *arguments: Any, **options: Any) -> None:
        self._change()
        super().put_file(*arguments, **options)

    def rm_file(self, path: str) -> None:
        self._change()
        super().rm_file(path)

    def find(self, *arguments: Any, **options: Any) -> Any:
        if Flaky.changes_left <= 0:
            raise ConnectionError("the connection was lost")
        return super().find(*arguments, **options)


@pytest.fixture(autouse=True)
def _store() -> Iterator[None]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.changes_left = 10**9
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


class Notes(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def mirrored(text_file: Path, *settings: str) -> Recipe:
    return tiny_recipe(text_file, "modern", *STEPS, "checkpoint.mirror=memory://bucket/runs", *settings)


def content(folder: Path) -> dict[str, bytes]:
    """Return the mirrored files."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_the_copy_has_the_same_files_and_can_be_used_like_a_run_folder(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(mirrored(text_file), tmp_path / "run", device="cpu")
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path / "cache"))
    RemoteRun("memory://bucket/runs/run").pull(tmp_path / "copy", [path.name for path in (tmp_path / "run").iterdir()])
    assert content(tmp_path / "copy") == content(tmp_path / "run")
    opened, original = Run.open("memory://bucket/runs/run"), Run.open(tmp_path / "run")
    assert opened.name == "run"
    assert opened.checkpoint("last").step == original.checkpoint("last").step
    assert not opened.checkpoint("last").has_optimizer_state
    weights = original.model("last", device="cpu").state_dict()
    assert all((weight == weights[name]).all() for name, weight in opened.model("last", device="cpu").state_dict().items())
    with pytest.raises(InputError, match="memory://bucket/runs/other: there is no run at this URL"):
        Run.open("memory://bucket/runs/other")


def test_a_run_resumes_from_its_copy_and_equals_an_uninterrupted_run(text_file: Path, tmp_path: Path) -> None:
    train(tiny_recipe(text_file, "modern", *STEPS), tmp_path / "unbroken", device="cpu")
    train(mirrored(text_file), tmp_path / "run", device="cpu", observer=StopAt(5))
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(InputError, match=r"memory://bucket/runs/run: this URL already contains a run \(--resume continues it"):
        train(mirrored(text_file), tmp_path / "run", device="cpu")
    assert train(mirrored(text_file), tmp_path / "run", device="cpu", resume=True).step == 8
    runs = [Run.open(tmp_path / name) for name in ("run", "unbroken")]
    first, second = ((run.checkpoint("last").path / "model.safetensors").read_bytes() for run in runs)
    assert first == second
    first_losses, second_losses = ([line["loss"] for line in run.metrics() if line["kind"] == "step"] for run in runs)
    assert first_losses == second_losses
    shutil.rmtree(tmp_path / "run")
    shutil.move(tmp_path / "old", tmp_path / "run")
    synchronize(mirrored(text_file), tmp_path / "run", SILENT, resume=True, overwrite=False)
    assert Run.open(tmp_path / "run").checkpoint("last").step == 8, "a machine with an older state downloads the newer one"


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A local S3 server with an empty bucket named `bucket`."""
    s3fs = pytest.importorskip("s3fs", reason='needs pip install "tinylm[s3]"')
    moto = pytest.importorskip("moto.server", reason='needs pip install "moto[server]"')
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield
    server.stop()


@pytest.mark.usefixtures("s3_server")
def test_a_run_resumes_from_its_copy_in_an_s3_bucket(text_file: Path, tmp_path: Path) -> None:
    recipe = mirrored(text_file, "checkpoint.mirror=s3://bucket/runs")
    train(recipe, tmp_path / "run", device="cpu", observer=StopAt(5))
    written = content(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    RemoteRun("s3://bucket/runs/run").pull(tmp_path / "copy", [name.partition("/")[0] for name in written])
    assert content(tmp_path / "copy") == written
    assert train(recipe, tmp_path / "run", device="cpu", resume=True).step == 8
    assert RemoteRun("s3://bucket/runs/run").steps()[-1] == 8
    assert Run.open("s3://bucket/runs/run").checkpoint("last").step == 8
    train(recipe, tmp_path / "run", device="cpu", overwrite=True, observer=StopAt(2))
    assert RemoteRun("s3://bucket/runs/run").steps() == [2]


def test_an_unreachable_store_does_not_stop_training_and_the_next_checkpoint_tries_again(text_file: Path, tmp_path: Path) -> None:
    recipe = mirrored(text_file, "checkpoint.mirror=flaky://bucket")

    class Reconnected(Notes):
        def saved(self, step: int) -> None:
            if step == 8:
                Flaky.changes_left = 10**9

    Flaky.changes_left, observer = 0, Reconnected()
    assert train(recipe, tmp_path / "run", device="cpu", observer=observer).stopped == "done"
    problem = "checkpoint.mirror: flaky://bucket/run: cannot be reached: the connection was lost; training continues"
    assert any(note.startswith(problem) for note in observer.notes)
    assert RemoteRun("flaky://bucket/run").steps()[-1] == 8
    Flaky.changes_left = 0
    with pytest.raises(WorkError, match="the connection was lost"):  # it would start from scratch and replace the copy
        train(recipe, tmp_path / "elsewhere" / "run", device="cpu", resume=True)


def test_an_unknown_protocol_is_an_error_before_training(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"checkpoint.mirror: cannot open nowhere://bucket/run: Protocol not known"):
        train(mirrored(text_file, "checkpoint.mirror=nowhere://bucket"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="must be a URL like s3://bucket/runs, or null, not 'backup'"):
        loads("data: {train: a.txt}\ntraining: {steps: 1}\ncheckpoint: {mirror: backup}\n", check_files=False)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket", r'opening s3:// URLs needs an extra package: pip install "tinylm\[s3\]"'),
        ("https://example.org", r'opening https:// URLs needs an extra package: pip install "tinylm\[remote\]"'),
        ("gs://bucket", "cannot open gs://bucket/run: Please install gcsfs"),
    ],
)
def test_a_missing_package_for_a_protocol_is_named(
    url: str, message: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("s3fs", "aiohttp", "gcsfs", "fsspec.implementations.http"):
        monkeypatch.setitem(sys.modules, package, None)
    for protocol in ("s3", "https", "gs"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)  # forget packages in use
    with pytest.raises(InputError, match=f"checkpoint.mirror: {message}"):
        train(mirrored(text_file, f"checkpoint.mirror={url}"), tmp_path / "run", device="cpu")
    with pytest.raises(InputError, match=message), Corpus((f"{url}/run",)):
        pass


def write_run(folder: Path, steps: list[int], weights: str) -> None:
    for step in steps:
        checkpoint = folder / "checkpoints" / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_text(weights)
        (checkpoint / "state.json").write_text(f'{{"step": {step}}}')
        write_manifest(checkpoint)
    (folder / "checkpoints" / "last").write_text(f"step-{steps[-1]:06d}\n")
    (folder / "checkpoints" / "best").write_text(f"step-{steps[0]:06d}\n")
    (folder / "recipe.yaml").write_text("name: a")
    (folder / "metrics.jsonl").write_text(f"{steps}")


NAMES = ("recipe.yaml", "metrics.jsonl", "checkpoints")


def complete_checkpoints() -> list[str]:
    """Return the checkpoints in the store that have a manifest, after checking that their files have the listed hashes."""
    store = MemoryFileSystem.store
    names = [name.removesuffix("/manifest.json") for name in store if name.endswith("/manifest.json")]
    for name in names:
        for file, expected in json.loads(store[f"{name}/manifest.json"].getvalue())["files"].items():
            assert hashlib.sha256(store[f"{name}/{file}"].getvalue()).hexdigest() == expected["sha256"]
    return names


def test_an_interrupted_copy_never_contains_an_incomplete_checkpoint_that_looks_complete(tmp_path: Path) -> None:
    """The second run replaces a checkpoint of the first one, and has an additional one."""
    write_run(tmp_path / "first", [1, 2], "first")
    write_run(tmp_path / "second", [2, 30], "second")
    interrupted = True
    for changes in range(100):
        MemoryFileSystem.store.clear()
        Flaky.changes_left = 10**9
        RemoteRun("flaky://bucket/run").push(tmp_path / "first", NAMES)
        Flaky.changes_left, interrupted = changes, False
        try:
            RemoteRun("flaky://bucket/run").push(tmp_path / "second", NAMES)
        except WorkError:
            interrupted = True
        assert complete_checkpoints() != []
        if not interrupted:
            break
    assert changes > 8
    assert not interrupted
    Flaky.changes_left = 10**9
    assert RemoteRun("flaky://bucket/run").steps() == [2, 30]
    RemoteRun("flaky://bucket/run").clear()
    assert MemoryFileSystem.store == {}
