"""Trainings in processes of their own, which can be killed.

They are forked from a server that has torch loaded, so that they start fast.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tinylm.errors import TinylmError
from tinylm.pipeline import train
from tinylm.recipe import Recipe, loads
from tinylm.training import step, trainer
from tinylm.training.metrics import Observer, StepEvent

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lives", "torch.distributed.checkpoint", "torch.distributed.fsdp"])
_PATIENCE = 120.0


def _spoiled(which: Sequence[int]) -> Callable[..., torch.Tensor]:
    """Steps in which one gradient becomes no number."""
    taken = []

    def accumulate(network: Any, *rest: Any) -> torch.Tensor:
        loss = step.accumulate(network, *rest)
        taken.append(loss)
        if len(taken) in which:
            for parameter in network.parameters():
                parameter.grad.mul_(math.nan)
        return loss

    return accumulate


def _live(recipe: str, folder: Path, rank: int, count: int, meeting: Path | None, observer: Observer | None, options: Any) -> None:
    """One process's training; it exits as the command line would."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    if meeting is not None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    trainer.accumulate = _spoiled(options.pop("spoiled", ()))
    if options.pop("late", False):
        trainer.defers_results = lambda device: True
    try:
        result = train(loads(recipe, check_files=False), folder, device="cpu", observer=observer, **options)
    except TinylmError as error:
        print(f"[{rank}] {error}", file=sys.stderr, flush=True)
        folder.with_name(f"{folder.name}.error-{rank}").write_text(str(error))  # its stderr is that of whoever started the first
        os._exit(error.exit_code)
    os._exit(0 if result.signal_number is None else 128 + result.signal_number)


def started(recipe: Recipe, folder: Path, *, count: int = 1, observer: Observer | None = None, **options: Any) -> list[BaseProcess]:
    """The processes of a training into `folder`; `options` are those of `train`, `spoiled` steps, and `late` as on a GPU."""
    meeting = Path(tempfile.mkdtemp()) / "meeting" if count > 1 else None
    processes: list[BaseProcess] = []
    for rank in range(count):
        arguments = (recipe.to_yaml(), folder, rank, count, meeting, observer if rank == 0 else None, options)
        processes.append(_CONTEXT.Process(target=_live, args=arguments))
        processes[-1].start()
    return processes


def ended(processes: Sequence[BaseProcess]) -> list[int | None]:
    """Wait for all; their exit codes."""
    deadline = time.monotonic() + _PATIENCE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            raise AssertionError("a training hangs")
    return [process.exitcode for process in processes]


def run(recipe: Recipe, folder: Path, **options: Any) -> None:
    """To the end, which must be a good one."""
    codes = ended(started(recipe, folder, **options))
    assert set(codes) == {0}, codes


def killed_when(processes: Sequence[BaseProcess], moment: Callable[[], bool], victim: int = 0) -> bool:
    """SIGKILL one of them at a moment, and wait for all. False when they were done before."""
    deadline = time.monotonic() + _PATIENCE
    while not moment():
        if not processes[victim].is_alive():
            ended(processes)
            return False
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    pid = processes[victim].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    ended(processes)
    return processes[victim].exitcode == -signal.SIGKILL


def lines(folder: Path) -> int:
    """How much was logged."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def saving(folder: Path) -> bool:
    """Whether a checkpoint is half-written at this moment."""
    return any((folder / "checkpoints").glob(".step-*.partial"))


class FullDisk(Observer):
    """From then on, and up to step 10, this process may write no file larger than a few kilobytes."""

    def saved(self, step: int) -> None:
        import resource

        if step == 4:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))

    def step(self, event: StepEvent) -> None:
        import resource

        if event.step == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
