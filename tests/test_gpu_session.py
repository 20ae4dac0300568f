"""Smoke test of benchmarks/gpu_session.sh on the CPU with a tiny model. Timings are not checked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_session.sh"
PARTS = ("facts", "cudnn", "training", "trainer", "sample", "memory", "decoding", "evaluation", "optimizers")


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
    assert "planned:" in logs["memory"]
    assert "muon" in logs["optimizers"]
    assert "one step, eager" in logs["decoding"]
    assert "engine, CUDA graphs" in logs["decoding"]
    assert "during training" in logs["evaluation"]
