"""Train in separate processes that tests can kill.

The processes are forked from a server that has already imported the modules that training needs, so they start quickly.
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
from contextlib import nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tinylm.errors import TinylmError
from tinylm.pipeline import train
from tinylm.recipe import Recipe, loads
from tinylm.training import gradient, precision, step, trainer
from tinylm.training.metrics import Observer, StepEvent

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["training_processes", "torch._dynamo", "torch.distributed.checkpoint.hf_storage", "torch.distributed.fsdp"]
)
_TIMEOUT_SECONDS = 600.0


def _accumulate_with_nan_gradients(nan_steps: Sequence[int]) -> Callable[..., torch.Tensor]:
    """Return a version of `step.accumulate` that produces NaN gradients in the calls `nan_steps` (the first call is 1)."""
    calls = 0

    def accumulate(network: Any, *rest: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = step.accumulate(network, *rest)
        if calls in nan_steps:
            for parameter in network.parameters():
                parameter.grad.mul_(math.nan)
        return loss

    return accumulate


def _train_and_exit(
    recipe: str, folder: Path, rank: int, world_size: int, rendezvous: Path | None, observer: Observer | None, options: Any
) -> None:
    """Train in this process and exit with the same code as `tinylm train`."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    precision.measure_peak_flops = lambda precision: 1e12  # as in the test process
    if rendezvous is not None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    gradient.accumulate = _accumulate_with_nan_gradients(options.pop("nan_steps", ()))
    if options.pop("defer_results", False):
        trainer.defers_results = lambda device: True
    registered = options.pop("registered", nullcontext)
    if options.pop("separate_machines", False):  # the same relative path leads to different folders
        os.environ["LOCAL_RANK"] = "0"
        machine = folder.parent if rank == 0 else folder.with_name(f"machine-{rank}")
        machine.mkdir(exist_ok=True)
        os.chdir(machine)
        folder = Path(folder.name)
    try:
        with registered():
            result = train(loads(recipe, check_files=False), folder, device="cpu", observer=observer, **options)
    except TinylmError as error:
        print(f"[{rank}] {error}", file=sys.stderr, flush=True)
        error_file(folder, rank).write_text(str(error))  # Tests cannot capture the stderr of a forked process.
        os._exit(error.exit_code)
    os._exit(0 if result.signal_number is None else 128 + result.signal_number)


def error_file(folder: Path, rank: int = 0) -> Path:
    """Return the file to which a failed process writes its error message."""
    return folder.with_name(f"{folder.name}.error-{rank}")


def start(
    recipe: Recipe, folder: Path, *, world_size: int = 1, observer: Observer | None = None, **options: Any
) -> list[BaseProcess]:
    """Start `world_size` processes that train in `folder`.

    `options` are passed to `train`, except for `nan_steps` (steps whose gradients are NaN), `defer_results` (as on a GPU),
    `separate_machines` (only the first process can see `folder`) and `registered` (returns a context manager that registers an
    architecture).
    """
    rendezvous = Path(tempfile.mkdtemp()) / "rendezvous" if world_size > 1 else None
    processes: list[BaseProcess] = []
    for rank in range(world_size):
        arguments = (recipe.to_yaml(), folder, rank, world_size, rendezvous, observer if rank == 0 else None, options)
        processes.append(_CONTEXT.Process(target=_train_and_exit, args=arguments))
        processes[-1].start()
    return processes


def wait(processes: Sequence[BaseProcess]) -> list[int | None]:
    """Wait for all processes and return their exit codes."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            raise AssertionError("training timed out")
    return [process.exitcode for process in processes]


def run(recipe: Recipe, folder: Path, **options: Any) -> None:
    """Train until the run is complete. Fail if any process exits with a nonzero code."""
    codes = wait(start(recipe, folder, **options))
    assert set(codes) == {0}, codes


def kill_when(processes: Sequence[BaseProcess], condition: Callable[[], bool], rank: int = 0) -> bool:
    """Kill one process as soon as `condition` is true, and wait for all processes. Return False if it exited before that."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not condition():
        if not processes[rank].is_alive():
            wait(processes)
            return False
        assert time.monotonic() < deadline
        time.sleep(0.001)
    pid = processes[rank].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait(processes)
    return processes[rank].exitcode == -signal.SIGKILL


def logged_lines(folder: Path) -> int:
    """Return the number of complete lines in metrics.jsonl."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def is_saving(folder: Path) -> bool:
    """Return whether the folder contains a partial checkpoint."""
    return any((folder / "checkpoints").glob(".step-*.partial"))


class Killer(Observer):
    """Kill this process after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, event: StepEvent) -> None:
        if event.step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


class FullDisk(Observer):
    """Prevent this process from writing files larger than 9 kB between the checkpoint at step 4 and step 10."""

    def saved(self, step: int) -> None:
        import resource

        if step == 4:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))

    def step(self, event: StepEvent) -> None:
        import resource

        if event.step == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
