"""A command that is killed while writing leaves the old result intact, and the next command removes the leftovers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tinylm.interchange.exporting import export
from tinylm.interchange.importing import import_model
from tinylm.run import Run
from tinylm.tokenizer import vocab_editing
from tinylm.training import vocabulary

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="requires fork")


def _kill(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _run_killed(action: Callable[[], object], target: str) -> None:
    """Run `action` in a child process that is killed when it calls `target`, the function that writes the weights."""
    process = os.fork()
    if process == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, _kill)
            action()
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_killed_vocabulary_edit_leaves_no_partial_run(tiny_run: Run, tmp_path: Path) -> None:
    edited = vocab_editing.add(tiny_run.tokenizer, ["Python"])

    def add() -> None:
        vocabulary.write_edited_run(tiny_run, edited, tmp_path / "edited")

    _run_killed(add, "tinylm.training.vocabulary.save_file")
    assert not (tmp_path / "edited").exists()
    assert len(list(tmp_path.iterdir())) == 1, "the child must be killed while writing"
    add()
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]
    assert Run.open(tmp_path / "edited").model(device="cpu").vocab_size == tiny_run.tokenizer.vocab_size + 1


def test_a_killed_export_keeps_the_old_folder(tiny_run: Run, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    export(tiny_run, "hf", tmp_path / "out")
    before = _contents(tmp_path / "out")

    def replace() -> None:
        export(tiny_run, "hf", tmp_path / "out", checkpoint="last", overwrite=True)

    _run_killed(replace, "tinylm.interchange.huggingface.save_file")
    assert _contents(tmp_path / "out") == before
    assert len(list(tmp_path.iterdir())) == 2, "the child must be killed while writing"
    replace()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_import_keeps_the_old_run(tiny_run: Run, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    export(tiny_run, "hf", tmp_path / "theirs")
    folder = tmp_path / "runs" / "imported"
    import_model(tmp_path / "theirs", folder)
    before = _contents(folder)

    def replace() -> None:
        import_model(tmp_path / "theirs", folder, overwrite=True)

    _run_killed(replace, "tinylm.training.checkpoint.save_file")
    assert _contents(folder) == before
    assert len(list(folder.parent.iterdir())) == 2, "the child must be killed while writing"
    replace()
    assert [path.name for path in folder.parent.iterdir()] == ["imported"]
    network = Run.open(folder).model(device="cpu")
    assert torch.equal(network.embedding.weight, tiny_run.model(device="cpu").embedding.weight)  # type: ignore[arg-type]
