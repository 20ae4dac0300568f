"""Test `tinylm export` and `tinylm import`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command import RunCli, error_of

from tinylm.run import Run


def test_an_exported_run_can_be_imported(run_cli: RunCli, tiny_run: Run, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    exported, imported = tmp_path / "exported", tmp_path / "imported"
    result = run_cli("export", "-r", tiny_run.path, "--to", "hf", exported, "--json")
    assert result.code == 0
    assert result.json.keys() >= {"run", "checkpoint", "step", "to", "path", "bytes", "architecture", "largest_difference"}
    assert result.json["largest_difference"] <= 1e-4
    assert "the folder includes modeling_tinylm.py" in result.err
    assert "is not empty (--overwrite" in error_of(run_cli("export", "-r", tiny_run.path, "--to", "hf", exported))
    shown = run_cli("export", "-r", tiny_run.path, "--to", "hf", exported, "--overwrite", "-q")
    assert " in the logits, on " in shown.out
    assert shown.err == ""

    imported.mkdir()
    result = run_cli("import", exported, "--out", imported, "--json")
    assert result.json.keys() >= {"run", "source", "parameters", "context_length", "vocab_size", "largest_difference"}
    assert "is not empty (--overwrite" in error_of(run_cli("import", exported, "--out", imported))
    assert run_cli("sample", "-r", imported, "--max-new-tokens", 2).code == 0
    assert "this run has no held-out text (specify a text" in error_of(run_cli("eval", "-r", imported))
    assert "the training text of an imported model is not available" in error_of(run_cli("train", imported, "--resume"))
    assert run_cli("runs", tmp_path, "--json").json[0]["name"] == "imported"


def test_the_error_for_a_missing_extra_shows_the_command_that_installs_it(
    run_cli: RunCli, tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("transformers", "onnx", "lm_eval"):
        monkeypatch.setitem(sys.modules, module, None)
    for arguments, extra in (
        (("export", "--to", "hf", tmp_path / "a"), "hf"),
        (("export", "--to", "onnx", tmp_path / "a"), "onnx"),
        (("eval", "--harness", "piqa"), "harness"),
    ):
        assert f'pip install "tinylm[{extra}]"' in error_of(run_cli(*arguments, "-r", tiny_run.path))
    assert list(tmp_path.iterdir()) == []


def test_importing_a_pickle_requires_trust_pickle(run_cli: RunCli, tmp_path: Path) -> None:
    import torch

    torch.save({}, tmp_path / "ckpt.pt")
    assert "the file is a pickle" in error_of(run_cli("import", tmp_path / "ckpt.pt", "--out", tmp_path / "run"))
