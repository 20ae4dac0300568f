"""Compile the units of a network, such as its blocks, with `torch.compile`. Time micro-batches to decide whether to compile."""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from tinylm.cost.step_time import CLEARLY_FASTER, cpp_compiler
from tinylm.errors import WorkError, first_line
from tinylm.model.base import Model
from tinylm.model.block_mask import flex
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


def eager() -> AbstractContextManager[Any]:
    """Return a context in which compiled networks run without compiled code, which would be compiled again for each new shape.

    Importing `torch._dynamo` takes a second. If it is not loaded, nothing is compiled.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


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
        """Run once and return the elapsed seconds.

        If this fails with FlexAttention but not without it, warns and disables FlexAttention.
        """
        try:
            return self._run()
        except Exception as error:  # compiler errors have no common base class
            if is_out_of_memory(error) or not (flex.used and flex.enabled):
                raise
            flex.enabled = False
            try:
                seconds = self._run()
            except BaseException:
                flex.enabled = True
                raise
            problem = f"attention within documents cannot use FlexAttention ({first_line(error)})"
            warnings.warn(f"{problem}; using a dense mask, which is slower", stacklevel=2)
            return seconds

    def _run(self) -> float:
        start = time.perf_counter()
        try:
            with self.settings.precision.tf32():  # as in training, because the compiled code depends on this flag
                loss = accumulate(self._network, self._batch, self.settings)
            float(loss.flatten()[0])  # synchronizes with the device
        finally:
            self._network.zero_grad(set_to_none=True)
        return time.perf_counter() - start


def compile_units(
    network: Model, trial: Trial, *, required: bool, reporter: Reporter, together: bool = False, dynamic: bool = False
) -> float:
    """Compile every unit of the network in place by running one micro-batch. Returns the elapsed seconds, or 0 on failure.

    Units of the same kind share the code that is compiled for the first one. With `together`, whole stacks of units are compiled.
    With `dynamic`, the code works for batches of any size and length, instead of being compiled again for each. A network without
    units is compiled as a whole. If compilation fails and is `required`, raises `WorkError`. If it fails and is not
    required, warns and leaves the units uncompiled. If the micro-batch runs out of memory, the units stay compiled, and the trainer
    later reduces the micro-batch size.
    """
    start = time.perf_counter()
    units = (network.compile_stacks() if together else network.compile_units()) or (network,)
    for unit in units:
        unit.compile(dynamic=dynamic)
    try:
        trial.run()
    except Exception as error:  # compiler errors have no common base class, and some come from tools that the compiler runs
        if is_out_of_memory(error):
            reporter.note("a micro-batch does not fit into memory; the first step will reduce its size")
            return time.perf_counter() - start
        for unit in units:
            unit._compiled_call_impl = None
        network.zero_grad(set_to_none=True)
        if required:
            raise WorkError(f"the model cannot be compiled: {first_line(error)}", hint="set training.compile: off") from error
        what, instead, skip = "model", "without compiling", "off"
        if together:
            what, instead, skip = "blocks", "without compiling them together", "on"
        reporter.warn(
            f"the {what} cannot be compiled ({first_line(error)}); training continues {instead} "
            f"(set training.compile: {skip} to skip this attempt)"
        )
        return 0.0
    return time.perf_counter() - start


def compile_together_if_faster(network: Model, trial: Trial, reporter: Reporter) -> tuple[bool, float]:
    """Replace compiled units with compiled stacks of units if these are clearly faster. Returns whether they are, and the seconds.

    `reporter` receives a warning if the stacks cannot be compiled.
    """
    start = time.perf_counter()
    separate_seconds = trial.seconds()
    calls = [(unit, unit._compiled_call_impl) for unit in network.compile_units()]
    for unit, _ in calls:
        unit._compiled_call_impl = None
    faster = False
    try:
        if compile_units(network, trial, required=False, reporter=reporter, together=True):
            faster = trial.seconds() < CLEARLY_FASTER * separate_seconds
    except RuntimeError as error:  # the gradients of all blocks may need more memory together
        if not is_out_of_memory(error):
            raise
    if not faster:
        for stack in network.compile_stacks():
            stack._compiled_call_impl = None
        for unit, call in calls:
            unit._compiled_call_impl = call
    return faster, time.perf_counter() - start
