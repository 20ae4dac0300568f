"""Whether to compile the blocks: only where it earns its start-up back, and never at the price of a training that fails."""

from __future__ import annotations

import importlib.util
import time

import torch

from tinylm.cost.plan import cpp_compiler
from tinylm.errors import WorkError
from tinylm.model.objective import Objective
from tinylm.model.transformer import Transformer
from tinylm.reporting import Reporter
from tinylm.training.feed import GlobalBatch
from tinylm.training.out_of_memory import is_out_of_memory
from tinylm.training.precision import Precision
from tinylm.training.step import accumulate


def compiler(device: torch.device) -> str | None:
    """What the compiler would need on this device, where it is here."""
    if device.type == "cuda":
        return "triton" if importlib.util.find_spec("triton") is not None else None
    if device.type == "cpu":
        return cpp_compiler()
    return None


class Trial:
    """Runs micro-batches of a real batch, forward and backward, leaving no gradient behind."""

    def __init__(
        self, network: Transformer, objective: Objective, batch: GlobalBatch, micro_batch_size: int, precision: Precision
    ) -> None:
        self.device = precision.device
        self._network = network
        self._objective = objective
        self._micro = micro_batch_size
        self._precision = precision
        example = type(batch.example)(batch.example.inputs[:micro_batch_size], batch.example.targets[:micro_batch_size])
        self._batch = GlobalBatch(example, batch.targets)

    def seconds(self, repeat: int = 2) -> float:
        """Of one micro-batch: the best of `repeat`, after one to warm up."""
        best = float("inf")
        for attempt in range(repeat + 1):
            start = time.perf_counter()
            self.run()
            if attempt:
                best = min(best, time.perf_counter() - start)
        return best

    def run(self) -> None:
        scaler = torch.amp.GradScaler(self._precision.device.type, enabled=False)
        try:
            with self._precision.tf32():  # as the trainer does: what is compiled depends on it
                loss = accumulate(self._network, self._objective, self._batch, self._micro, self._precision, scaler)
            float(loss)  # waits for a GPU
        finally:
            self._network.zero_grad(set_to_none=True)


def compile_blocks(network: Transformer, trial: Trial, *, demanded: bool, reporter: Reporter) -> float:
    """Compile every block, in place, and run one micro-batch. The blocks share what the first compiles. The seconds it took.

    Where that fails: `WorkError` when it was demanded, else a warning, and 0. Memory that runs out is left to the trainer, which
    halves the micro-batch.
    """
    start = time.perf_counter()
    for block in network.blocks:
        block.compile(dynamic=False)
    try:
        trial.run()
    except Exception as error:  # the compiler's errors have no common class, and come from the tools it starts
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            reporter.note("a micro-batch does not fit into memory; the first step will make it smaller")
            return time.perf_counter() - start
        for block in network.blocks:
            block._compiled_call_impl = None
        network.zero_grad(set_to_none=True)
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if demanded:
            raise WorkError(f"the model cannot be compiled here: {first_line}", hint="training.compile: off") from error
        reporter.warn(
            f"the model cannot be compiled here ({first_line}); going on without (training.compile: off says so from the start)"
        )
        return 0.0
    return time.perf_counter() - start
