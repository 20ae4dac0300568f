"""Distribute a preparation with datatrove: on this machine, on a Slurm cluster or with Ray.

Each task runs a stage of `Preparation` for its share of the blocks. The output folder must be on a file system that all machines
share. Every task reads all sources and skips the blocks of other tasks, so a preparation scales to a few dozen tasks.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from tinylm.curation.blocks import Documents
from tinylm.curation.preparation import MANIFEST, Preparation
from tinylm.curation.report import Report
from tinylm.errors import InputError, missing_extra
from tinylm.reporting import SILENT

try:
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from datatrove.utils.logging import logger, setup_default_logger
except ImportError:
    raise missing_extra("datatrove", "--engine datatrove") from None


@dataclass(frozen=True)
class Cluster:
    """Where and how the tasks run."""

    executor: str
    """`local`, `slurm` or `ray`."""
    tasks: int
    workers: int
    """Number of tasks that run at the same time."""
    partition: str = ""
    time: str = "24:00:00"
    quiet: bool = False
    """Whether to hide datatrove's log. It is always written to the folder `logs`."""


class AnalyzeStep(PipelineStep):  # type: ignore[misc]
    """Analyzes the blocks of a task."""

    type, name = "Filter", "tinylm analyze"

    def __init__(self, preparation: Preparation) -> None:
        super().__init__()
        self.preparation = preparation

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        with Documents(self.preparation.settings) as documents:
            self.preparation.analyze(documents, rank=rank, world_size=world_size)

    __call__ = run


class DecideStep(AnalyzeStep):
    """Decides what happens to each document."""

    type, name = "Dedup", "tinylm decide"

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        self.preparation.decide()

    __call__ = run


class TokenizerStep(AnalyzeStep):
    """Loads or trains the tokenizer. Fails if no training or held-out text is left."""

    type, name = "Tokenizer", "tinylm tokenizer"

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        report = self.preparation.decided_report()
        self.preparation.check(report)
        with Documents(self.preparation.settings) as documents:
            self.preparation.prepare_tokenizer(documents, report)

    __call__ = run


class EncodeStep(AnalyzeStep):
    """Encodes the blocks of a task."""

    type, name = "Tokenizer", "tinylm encode"

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        with Documents(self.preparation.settings) as documents:
            self.preparation.encode(documents, rank=rank, world_size=world_size)

    __call__ = run


class FinishStep(AnalyzeStep):
    """Joins the tokens of all blocks and writes the manifest."""

    type, name = "Writer", "tinylm finish"

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        self.preparation.finish(self.preparation.decided_report())

    __call__ = run


def run(preparation: Preparation, cluster: Cluster, show: Callable[[Report], None] = lambda report: None) -> dict[str, Any] | None:
    """Run all stages. Returns the manifest, or None if the stages were only submitted to Slurm.

    `show` is called with the report before any text is encoded, unless the stages were only submitted. Blocks that an earlier run
    has finished are skipped. Raises `InputError` if the sources cannot be opened or the executor is not installed.
    """
    if "-" in (*preparation.settings.sources, *preparation.settings.heldout):
        raise InputError("the tasks cannot share standard input", where="-", hint="write the text to a file first")
    if cluster.executor == "ray" and find_spec("ray") is None:
        raise InputError("needs an extra package: pip install ray", where="--executor ray")
    if cluster.executor == "slurm" and shutil.which("sbatch") is None:
        hint = "run the command on a machine from which jobs can be submitted"
        raise InputError("needs Slurm's command sbatch, which is not on PATH", where="--executor slurm", hint=hint)
    with Documents(preparation.settings) as documents:  # otherwise, every task would report the same error
        preparation.report_skipped(documents)
    preparation = replace(preparation, folder=preparation.folder.absolute(), reporter=SILENT)
    with preparation.locked(), _hidden_log(cluster) if cluster.quiet else nullcontext():
        preparation.remove_other_work()
        previous: Any = None
        for step, tasks in (
            (AnalyzeStep, cluster.tasks),
            (DecideStep, 1),
            (TokenizerStep, 1),
            (EncodeStep, cluster.tasks),
            (FinishStep, 1),
        ):
            executor = _executor(step(preparation), cluster, tasks, previous)
            if cluster.executor != "slurm":
                executor.run()
                if step is DecideStep:
                    report = preparation.decided_report()
                    show(report)
                    preparation.check(report)
            previous = executor
        if cluster.executor == "slurm":
            previous.run()  # submits the stages it depends on, too
            return None
    manifest: dict[str, Any] = json.loads((preparation.folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest


@contextmanager
def _hidden_log(cluster: Cluster) -> Iterator[None]:
    """Hide datatrove's log. The tasks set up their own log, so the stderr of this process and its children is discarded, too."""
    logger.remove()
    if cluster.executor == "slurm":  # the tasks run elsewhere; keep the error messages of sbatch
        yield
        return
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as devnull, redirect_stderr(devnull):
            os.dup2(devnull.fileno(), 2)
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        setup_default_logger()


def _executor(stage: AnalyzeStep, cluster: Cluster, tasks: int, previous: Any) -> Any:
    """Return the executor for one stage. Slurm starts it when the previous stage has succeeded."""
    logs = stage.preparation.folder / "logs" / stage.name.rpartition(" ")[2]
    # Completed tasks are not skipped, because finished blocks are, unless their text has changed.
    shared: dict[str, Any] = {
        "pipeline": [stage],
        "tasks": tasks,
        "workers": min(cluster.workers, tasks),
        "logging_dir": str(logs),
        "skip_completed": False,
    }
    if cluster.executor == "local":
        return LocalPipelineExecutor(**shared)
    if cluster.executor == "ray":
        return RayPipelineExecutor(**shared)
    return SlurmPipelineExecutor(
        **shared,
        time=cluster.time,
        partition=cluster.partition,
        job_name=f"prepare-{logs.name}",
        slurm_logs_folder=str(logs / "slurm"),
        env_command=f"export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH; cd {shlex.quote(os.getcwd())}",
        depends=previous,
    )
