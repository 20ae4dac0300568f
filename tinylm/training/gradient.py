"""Compute the gradient of a global batch over all processes, and reduce the micro-batch size if memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from tinylm.errors import WorkError
from tinylm.model.graphs import GraphBackend
from tinylm.optim.groups import Optimizers
from tinylm.training.feed import LocalBatch
from tinylm.training.graphed import GraphedMicroBatches
from tinylm.training.out_of_memory import is_out_of_memory, smaller_micro_batch
from tinylm.training.parallel import Parallel
from tinylm.training.step import GradientSettings, accumulate, micro_batch_seeds


class PeerOutOfMemory(Exception):
    """Another process ran out of memory in this step."""


class GradientComputer:
    """Computes the gradients of global batches. `compute` is a collective: all processes must call it."""

    def __init__(
        self,
        parallel: Parallel,
        optimizers: Optimizers,
        settings: GradientSettings,
        dropout_seed: int | None,
        note: Callable[[str], None],
        graphs: GraphBackend | None = None,
    ) -> None:
        """`dropout_seed` is the recipe's seed, or None without dropout. `note` receives a message if memory runs out.

        `graphs`: run micro-batches as graphs. This requires a single process, no dropout and no gradient scaler.
        """
        self.settings = settings
        self._parallel = parallel
        self._processes = parallel.processes
        self._optimizers = optimizers
        self._dropout_seed = dropout_seed
        self._note = note
        self._graphs = graphs
        self._graphed: GraphedMicroBatches | None = None

    def compute(self, batch: LocalBatch, steps_before: int) -> tuple[Tensor, int]:
        """Store the gradient of the global batch in `.grad`. `batch` is this process's share of the global batch.

        Returns the mean loss over the global batch in nats (see `accumulate`) and the fingerprint of the global batch. If
        memory runs out, the micro-batch size is reduced and the gradient is computed again. Raises `WorkError` if the size cannot
        be reduced.
        """
        loss = None
        while loss is None:
            loss = self._try_accumulate(batch, steps_before)
        halves = self._processes.gather([float(half) for half in divmod(batch.fingerprint, 1 << 32)])  # exact in float64
        fingerprint = sum((int(high) << 32) + int(low) for high, low in halves) % (1 << 64)
        return self._parallel.all_reduce(loss), fingerprint

    def _try_accumulate(self, batch: LocalBatch, steps_before: int) -> Tensor | None:
        """Return this process's share of the loss, or None if the micro-batch size was reduced because a process ran out of memory.

        With DDP, all processes check whether any of them has run out of memory before they exchange gradients. If so, they all
        reduce the size. A process that runs out of memory during the exchange, or at any time with FSDP, raises `WorkError`,
        because the other processes are already waiting in another collective.
        """
        self._optimizers.zero_grad()
        processes, exchanging = self._processes, False
        count = len(batch.share) // self.settings.micro_batch_size
        seeds = None
        if self._dropout_seed is not None:
            seeds = micro_batch_seeds(self._dropout_seed, steps_before, processes.rank * count, count)

        @contextmanager
        def micro_batch(last: bool) -> Iterator[nn.Module]:
            nonlocal exchanging
            if last and self._parallel.name == "ddp":
                exchanging = True
                if processes.any(False):  # matches the `any(True)` of a process that ran out of memory
                    raise PeerOutOfMemory
            with self._parallel.micro_batch(last) as module:
                yield module

        try:
            with self.settings.precision.tf32():
                if self._graphs is not None:
                    if self._graphed is None:
                        self._graphed = GraphedMicroBatches(self._parallel.network, self.settings, self._graphs)
                    return self._graphed.accumulate(batch)
                return accumulate(self._parallel.network, batch, self.settings, seeds, micro_batch)
        except PeerOutOfMemory:
            reason = "in another process"
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
            if processes.world_size > 1 and (exchanging or self._parallel.name == "fsdp"):
                hint = "resume with --resume and a smaller --set training.micro_batch_size"
                raise WorkError(f"out of memory while exchanging data with other processes: {reason}", hint=hint) from None
            processes.any(True)
        self._reduce_micro_batch_size(len(batch.share), reason)
        return None

    def _reduce_micro_batch_size(self, sequences: int, reason: str) -> None:
        """Free memory and at least halve the micro-batch size. `sequences` is this process's share of the global batch."""
        before = self.settings.micro_batch_size
        self._graphed = None  # frees the memory of its graphs
        self._optimizers.zero_grad()
        if self.settings.precision.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.settings.precision.device.type == "mps":
            torch.mps.empty_cache()
        if before == 1:
            hint = "use a smaller model or context, or training.activation_checkpointing: on"
            raise WorkError(f"one sequence does not fit into memory: {reason}", hint=hint)
        size = smaller_micro_batch(before, sequences)
        self.settings = replace(self.settings, micro_batch_size=size)
        global_batch_size = sequences * self._processes.world_size
        self._note(
            f"out of memory: continuing with {global_batch_size // size} micro-batches of {size} "
            f"instead of {global_batch_size // before} of {before}; the global batch size stays {global_batch_size}"
        )
