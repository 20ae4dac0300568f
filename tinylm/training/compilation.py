"""Compile the units of a network, such as its blocks, with `torch.compile`. Time micro-batches to decide whether to compile."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from tinylm.cost.step_time import cpp_compiler
from tinylm.errors import WorkError
from tinylm.model.base import Model
from tinylm.reporting import Reporter
from tinylm.training.feed import LocalBatch
from tinylm.training.out_of_memory import is_out_of_memory
from tinylm.training.step import GradientSettings, accumulate


def available_compiler(device: torch.device) -> str | None:
    """Return the compiler that `torch.compile` uses on this device, or None if it is missing or the device is not supported."""
    if device.type == "cuda":
        return "triton" if importlib.util.find_spec("triton") is not None else None
    if device.type == "cpu":
        return cpp_compiler()
    return None


class Trial:
    """Runs a forward and backward pass on the first micro-batch of a batch, and discards the gradient."""

    def __init__(self, network: Model, batch: LocalBatch, settings: GradientSettings) -> None:
        self.settings = replace(settings, scaler=None)
        self._network = network
        size = settings.micro_batch_size
        self._batch = replace(batch, share=batch.share.rows(slice(size)))

    def seconds(self, repeat: int = 2, *, is_fast_enough: Callable[[float], bool] = lambda seconds: False) -> float:
        """Measure the time for one micro-batch in seconds: the best of `repeat` runs, after one warm-up run.

        The warm-up run is slower than the others. If `is_fast_enough` accepts its time, that time is returned without further runs.
        """
        warm_up_seconds = self.run()
        return warm_up_seconds if is_fast_enough(warm_up_seconds) else min(self.run() for _ in range(repeat))

    def run(self) -> float:
        """Run once and return the elapsed seconds."""
        start = time.perf_counter()
        try:
            with self.settings.precision.tf32():  # as in training, because the compiled code depends on this flag
                loss = accumulate(self._network, self._batch, self.settings)
            float(loss.flatten()[0])  # synchronizes with the device
        finally:
            self._network.zero_grad(set_to_none=True)
        return time.perf_counter() - start


def compile_units(network: Model, trial: Trial, *, required: bool, reporter: Reporter) -> float:
    """Compile every unit of the network in place by running one micro-batch. Returns the elapsed seconds, or 0 on failure.

    Units of the same kind share the code that is compiled for the first one. A network without units is compiled as a whole. If
    compilation fails and is `required`, raises `WorkError`. If it fails and is not required, warns and leaves the units uncompiled.
    If the micro-batch runs out of memory, the units stay compiled, and the trainer later reduces the micro-batch size.
    """
    start = time.perf_counter()
    units = network.compile_units() or (network,)
    for unit in units:
        unit.compile(dynamic=False)
    try:
        trial.run()
    except Exception as error:  # compiler errors have no common base class, and some come from tools that the compiler runs
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            reporter.note("a micro-batch does not fit into memory; the first step will reduce its size")
            return time.perf_counter() - start
        for unit in units:
            unit._compiled_call_impl = None
        network.zero_grad(set_to_none=True)
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if required:
            raise WorkError(f"the model cannot be compiled: {first_line}", hint="set training.compile: off") from error
        reporter.warn(
            f"the model cannot be compiled ({first_line}); training continues without compiling "
            "(set training.compile: off to skip this attempt)"
        )
        return 0.0
    return time.perf_counter() - start
