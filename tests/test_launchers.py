"""The files that start training on several machines."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tinylm.cost.accelerators import ACCELERATORS
from tinylm.errors import InputError
from tinylm.launchers import SKYPILOT_NAMES, ClusterJob, sbatch, skypilot

JOB = ClusterJob("GPT-2 124M", "my recipe.yaml", "runs/gpt2", nodes=2, gpus_per_node=8, overrides=["seed=1"], time_limit=7_205)
TRAIN = "-m tinylm train 'my recipe.yaml' --set seed=1 --out runs/gpt2 --resume"
FAKE_SLURM = {
    "scontrol": 'if [ "$1" = show ]; then echo node-1; echo node-2; else echo "$@" >requeued; fi',
    "scancel": 'echo "$@" >cancelled; kill -TERM "$(cat step)"',
    "srun": 'trap "exit 143" TERM; echo "$@" >arguments; echo $$ >step; [ -e finish ] && exit 3; while :; do sleep 0.01; done',
}
"""Commands that behave like Slurm's. `srun` waits for SIGTERM, or exits with code 3 if there is a file named `finish`."""


def test_the_batch_script_asks_for_the_machines_and_a_signal_before_the_time_limit() -> None:
    lines = sbatch(JOB).splitlines()
    options = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert options >= {"job-name=gpt-2-124m", "nodes=2", "ntasks-per-node=1", "gpus-per-node=8", "time=0-02:01:00", "requeue"}
    assert "signal=B:USR1@300" in options
    assert any(TRAIN in line for line in lines)
    with pytest.raises(InputError, match="--time-limit: must be longer than 10 minutes"):
        sbatch(ClusterJob("a", "a.yaml", "runs/a", 1, 1, time_limit=600))


@pytest.mark.skipif(os.name == "nt", reason="requires bash")
@pytest.mark.parametrize("stopped", [True, False], ids=["stopped by a signal", "ended by itself"])
def test_the_batch_script_queues_the_job_again_only_after_the_signal(stopped: bool, tmp_path: Path) -> None:
    for name, text in FAKE_SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    if not stopped:
        (tmp_path / "finish").touch()
    (tmp_path / "job").write_text(sbatch(JOB))
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "1234", "SLURM_JOB_NODELIST": "node-[1-2]"}
    with subprocess.Popen(["bash", "job"], cwd=tmp_path, env=variables) as process:
        if stopped:
            deadline = time.monotonic() + 60
            while not (tmp_path / "step").exists() or not (tmp_path / "step").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(signal.SIGUSR1)
        code = process.wait(timeout=60)
    arguments = (tmp_path / "arguments").read_text()
    assert "torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint node-1:29634" in arguments
    assert "-m tinylm train my recipe.yaml --set seed=1 --out runs/gpt2 --resume" in arguments
    if stopped:
        assert code == 143
        assert (tmp_path / "cancelled").read_text() == "--signal=TERM 1234\n"
        assert (tmp_path / "requeued").read_text() == "requeue 1234\n"
    else:
        assert code == 3
        assert not (tmp_path / "requeued").exists()


def test_the_skypilot_task_starts_torchrun_on_every_machine() -> None:
    task = yaml.safe_load(skypilot(JOB, "h100-sxm"))
    assert (task["name"], task["num_nodes"], task["resources"]) == ("gpt-2-124m", 2, {"accelerators": "H100:8"})
    assert '--rdzv-backend c10d --rdzv-endpoint "$HOST:29400"' in task["run"]
    assert task["run"].endswith(f"{TRAIN}\n")
    assert set(SKYPILOT_NAMES) == {accelerator.name for accelerator in ACCELERATORS}
    with pytest.raises(InputError, match=r"RECIPE: /a.yaml is not in the current folder"):
        skypilot(ClusterJob("a", "/a.yaml", "runs/a", 1, 1), "t4")
