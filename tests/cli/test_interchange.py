"""`export` and `import` as a user runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import Here, complaint

from tinylm.run import Run


def test_out_and_back_in(here: Here, tiny_run: Run, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    there, back = tmp_path / "there", tmp_path / "back"
    done = here("export", "-r", tiny_run.path, "--to", "hf", there, "--json")
    assert done.code == 0
    assert done.json.keys() >= {"run", "checkpoint", "step", "to", "path", "bytes", "architecture", "largest_difference"}
    assert done.json["largest_difference"] <= 1e-4
    assert "the folder carries modeling_tinylm.py" in done.err
    assert "is not empty (--overwrite" in complaint(here("export", "-r", tiny_run.path, "--to", "hf", there))
    shown = here("export", "-r", tiny_run.path, "--to", "hf", there, "--overwrite", "-q")
    assert "same model   logits differ by" in shown.out
    assert shown.err == ""

    back.mkdir()
    imported = here("import", there, "--out", back, "--json")
    assert imported.json.keys() >= {"run", "source", "parameters", "context_length", "vocab_size", "largest_difference"}
    assert "is not empty (--overwrite" in complaint(here("import", there, "--out", back))
    assert here("sample", "-r", back, "--max-new-tokens", 2).code == 0
    assert "this run has no held-out text (name a text" in complaint(here("eval", "-r", back))
    assert "the text that an imported model learned is not here" in complaint(here("train", back, "--resume"))
    assert here("runs", tmp_path, "--json").json[0]["name"] == "back"


def test_a_missing_extra_is_told_with_the_command_that_installs_it(
    here: Here, tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("transformers", "onnx", "lm_eval"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    for arguments, extra in (
        (("export", "--to", "hf", tmp_path / "a"), "hf"),
        (("export", "--to", "onnx", tmp_path / "a"), "onnx"),
        (("eval", "--harness", "piqa"), "harness"),
    ):
        assert f'pip install "tinylm[{extra}]"' in complaint(here(*arguments, "-r", tiny_run.path))
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_needs_trust(here: Here, tmp_path: Path) -> None:
    import torch

    torch.save({}, tmp_path / "ckpt.pt")
    assert "is a pickle" in complaint(here("import", tmp_path / "ckpt.pt", "--out", tmp_path / "run"))
