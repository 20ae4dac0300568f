"""What runs on a GPU is checked as far as possible without one: the session's parts run, and the tests' names exist."""

from __future__ import annotations

import ast
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_gpu

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_session.sh"
PARTS = ("facts", "cudnn", "training", "trainer", "sample", "serve", "memory", "decoding", "evaluation", "optimizers")


@pytest.mark.skipif(shutil.which("bash") is None or shutil.which("timeout") is None, reason="requires bash and timeout")
def test_every_part_of_the_gpu_session_runs_on_a_cpu(tmp_path: Path) -> None:
    command = ["bash", str(SCRIPT), "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert finished.returncode == 0, finished.stdout
    logs = {name: (tmp_path / f"{name}.log").read_text() for name in PARTS}
    assert "torch" in logs["facts"]
    assert logs["cudnn"].count("103 keys") == 2
    assert "checkpointing" in logs["training"]
    assert "10 of 10 steps" in logs["trainer"]
    assert '"kind": "eval"' in (tmp_path / "metrics.jsonl").read_text()
    assert "tokens/s" in logs["sample"]
    assert "4 responses to 4 clients" in logs["serve"]
    assert "0 requests failed, 0 responses differ" in logs["serve"]
    assert "planned:" in logs["memory"]
    assert "muon" in logs["optimizers"]
    assert "one step, eager" in logs["decoding"]
    assert "engine, CUDA graphs" in logs["decoding"]
    assert "during training" in logs["evaluation"]


def test_every_attribute_that_a_gpu_test_uses_or_replaces_exists() -> None:
    """Tests that are skipped would not notice that a function was renamed."""
    used: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(inspect.getsource(test_gpu))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.add((node.value.id, node.attr))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "monkeypatch.setattr":
            used.add((ast.unparse(node.args[0]), ast.literal_eval(node.args[1])))
    names = {name: value for name, value in vars(test_gpu).items() if inspect.ismodule(value) or inspect.isclass(value)}
    missing = [f"{name}.{attribute}" for name, attribute in used if name in names and not hasattr(names[name], attribute)]
    assert {("functions", "FUSED_LOSS_FROM"), ("Trainer", "train_step")} <= used
    assert missing == []
