"""Write the files that start a training run on several machines: a batch script for Slurm, and a task for SkyPilot.

Both start torchrun on every machine with a c10d rendezvous, so that a run continues from its last checkpoint after a process or
a machine has failed.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tinylm.errors import InputError

PORT = 29400
"""The port of the rendezvous, which is torchrun's default."""
MAX_RESTARTS = 3
"""How often torchrun restarts the processes of a run. A machine that joins again does not count as a restart."""
SAVING_SECONDS = 300
"""How long before the time limit Slurm asks the run to stop: enough to finish the step, save a checkpoint and exit."""
JOIN_SECONDS = 1800
"""How long torchrun waits for the other machines, for example until a failed one has been replaced."""
_SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""How long torchrun waits after SIGTERM before it kills its processes. The default is 30 seconds."""
_NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
"""Without this, torchrun (2.13) does not tell a machine that joins again where the main process is."""

SKYPILOT_NAMES = {
    "b200": "B200",
    "h200": "H200",
    "h100-sxm": "H100",
    "h100-pcie": "H100",
    "a100-80gb-sxm": "A100-80GB",
    "a100-80gb-pcie": "A100-80GB",
    "a100-40gb-sxm": "A100",
    "v100-sxm2-32gb": "V100-32GB",
    "l40s": "L40S",
    "l4": "L4",
    "t4": "T4",
    "a10g": "A10G",
    "rtx-4090": "RTX4090",
    "rtx-3090": "RTX3090",
}
"""SkyPilot's names for the accelerators in `tinylm.cost.accelerators` (`sky show-gpus --all`)."""


@dataclass(frozen=True)
class ClusterJob:
    """A training run on `nodes` machines with `gpus_per_node` processes each."""

    name: str
    recipe: str
    """The RECIPE argument of `tinylm train`."""
    out: str
    """The run folder."""
    nodes: int
    gpus_per_node: int
    overrides: Sequence[str] = ()
    """Values of `--set`."""
    time_limit: float = 86_400
    """Seconds until Slurm ends the job. The job is then queued again and continues."""

    @property
    def train_command(self) -> list[str]:
        """The command that starts or continues the run in each process, after `torchrun ... -m`."""
        settings = [part for override in self.overrides for part in ("--set", override)]
        return ["tinylm", "train", self.recipe, *settings, "--out", self.out, "--resume"]


def sbatch(job: ClusterJob) -> str:
    """Return a Slurm batch script. Raises `InputError` if the time limit is too short to save a checkpoint before it.

    Slurm signals only the script, which then sends SIGTERM to all processes with `scancel`. (If the script sent it to srun, srun
    would kill them.) `tinylm train` saves a checkpoint and exits with code 143. torchrun does not pass this code on, so the script
    queues the job again if it has received the signal.
    """
    if job.time_limit <= 2 * SAVING_SECONDS:
        raise InputError(
            f"must be longer than {2 * SAVING_SECONDS // 60} minutes, because the run is stopped {SAVING_SECONDS // 60} minutes "
            "before the limit to save a checkpoint",
            where="--time-limit",
        )
    minutes = math.ceil(job.time_limit / 60)
    torchrun = _torchrun(job, str(job.nodes), str(job.gpus_per_node), '"$HOST:$PORT"', '"$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"')
    return f"""#!/bin/bash
#SBATCH --job-name={_slug(job.name)}
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={job.gpus_per_node}
#SBATCH --time={minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@{SAVING_SECONDS}

# Submit this file with sbatch, in a folder that all machines share.
# The run continues from its last checkpoint if its folder exists. Before the time limit, it is saved, and the job is queued again.

HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$(({PORT} + SLURM_JOB_ID % 1000))
export {_SHUTDOWN}={SAVING_SECONDS - 60} {_NEW_STORE}

stopping=
stop() {{
    stopping=yes
    scancel --signal=TERM "$SLURM_JOB_ID"
}}
trap stop USR1

srun --kill-on-bad-exit=0 {torchrun} & # one machine may still save when another one has ended
wait $!
code=$?
if [ -n "$stopping" ]; then # the signal ended `wait`
    wait $!
    code=$?
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def skypilot(job: ClusterJob, accelerator: str) -> str:
    """Return a SkyPilot task for machines with `accelerator`, a name in `tinylm.cost.accelerators`.

    SkyPilot copies the current folder to all machines. Raises `InputError` if the recipe or the run folder is outside it.
    """
    for path, where in ((job.recipe, "RECIPE"), (job.out, "--out")):
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise InputError(f"{path} is not in the current folder, which SkyPilot copies to the machines", where=where)
    arguments = ('"$SKYPILOT_NUM_NODES"', '"$SKYPILOT_NUM_GPUS_PER_NODE"', f'"$HOST:{PORT}"', '"$SKYPILOT_TASK_ID"')
    task = {
        "name": _slug(job.name),
        "num_nodes": job.nodes,
        "resources": {"accelerators": f"{SKYPILOT_NAMES[accelerator]}:{job.gpus_per_node}"},
        "workdir": ".",
        "setup": 'pip install "tinylm[s3]"\n',
        "run": f'export {_NEW_STORE}\nHOST=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)\n{_torchrun(job, *arguments)}\n',
    }
    header = "# Start this task with: sky jobs launch FILE. The run continues from its last checkpoint on new machines.\n"
    return header + yaml.dump(task, Dumper=_Dumper, sort_keys=False, width=1000)


def _torchrun(job: ClusterJob, nodes: str, processes: str, endpoint: str, run_id: str) -> str:
    """Return the command that starts the processes on one machine."""
    arguments = [
        f"--nnodes {nodes} --nproc-per-node {processes} --max-restarts {MAX_RESTARTS}",
        f"--rdzv-backend c10d --rdzv-endpoint {endpoint} --rdzv-id {run_id}",
        f"--rdzv-conf join_timeout={JOIN_SECONDS}",
        f"-m {shlex.join(job.train_command)}",
    ]
    return " \\\n    ".join(["torchrun", *arguments])


def _slug(name: str) -> str:
    """Return a job name of lowercase letters, digits and hyphens that starts with a letter, as SkyPilot requires."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return slug if slug[:1].isalpha() else f"run-{slug}".rstrip("-")


class _Dumper(yaml.SafeDumper):
    """Writes texts with several lines as block scalars."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
