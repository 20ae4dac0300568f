"""Estimate the time of a training step on this machine's CPU. Does not import torch. For GPUs, see `tinylm.cost.accelerators`.

Converts counts (FLOPs, bytes, kernels) to seconds. `measure` measures the speed of matrix products and of memory with numpy; the
constants state how much of that speed a training step reaches. Constants marked as fitted are close to the least-squares fit to
twelve step times: five models of 0.8 to 13.9 million parameters, context lengths of 64 to 256 and 768 to 2048 tokens per step, in
fp32, in bf16 and compiled, all on two cores of one Xeon with AMX (350 GFLOP/s in fp32, 1650 in bf16). They reproduce those times
within 20%. On other processors they are rough guesses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tinylm.cpu_load import available_cores, cpu_share
from tinylm.recipe.values import ComputeDtype

MATMUL_EFFICIENCY = 0.9
"""Fraction of the measured peak that the matrix products of a step reach. Fitted."""
AMX_SPEEDUP = 4.7
"""Speedup of matrix products in bf16 over fp32 with AMX: 1200 to 2100 GFLOP/s instead of 340 to 360."""
AMX_PEAK_SPEEDUP = 6.9
"""Like `AMX_SPEEDUP`, for the fastest matrix products, 2048 x 2048 and larger: 2200 GFLOP/s instead of numpy's 320."""
EMULATED_SPEEDUP = 1 / 150
"""Like `AMX_SPEEDUP`, for a CPU without AMX, where bf16 is emulated: 1 GFLOP/s instead of 165, measured."""
ELEMENTWISE_EFFICIENCY = 0.25
"""Bandwidth per core of the elementwise kernels of a step, as a fraction of the bandwidth of a numpy addition on one core. Fitted;
it also corrects for differences between the counted and the actual traffic of the model."""
STATE_EFFICIENCY = 0.75
"""Like `ELEMENTWISE_EFFICIENCY`, for kernels that read and write long, contiguous arrays: weights, gradients and optimizer state.
Assumed."""
SCORE_SECONDS = 4e-9
"""Core-seconds per attention score (batch x heads x time x time) in the forward and backward pass. Half of the scores are masked;
the others are exponentiated twice. Fitted."""
QUERY_BLOCK_SECONDS = 130e-6
"""Core-seconds per block of queries in the 16-bit backward pass of attention, whose small products have a fixed cost that float32
products do not have. Fitted; a profile of 48 (sequence, head) pairs with 64 positions gave 70e-6 per block of 32."""
LAUNCH_SECONDS = 8e-6
"""Time to launch a kernel from Python. Assumed; 5 to 10 microseconds are typical."""
KERNELS = {"eager": 90, "compiled": 40}
"""Kernels per block in the forward and backward pass, not counting views. Eager: counted in a profile of the `modern` preset.
Compiled: assumed."""
CAST_KERNELS = {"eager": 40, "compiled": 15}
"""Additional kernels per block under autocast, which casts weights and their gradients. Determined like `KERNELS`."""
OUTSIDE_KERNELS = 40
"""Kernels outside the blocks. Determined like `KERNELS`."""
TABLE_KERNELS = 35
"""Additional kernels for each n of the n-gram embeddings, whose hash takes a dozen integer operations.
Determined like `KERNELS`."""
UPDATE_KERNELS = 60
"""Kernels that clip gradients and update weights, per block, and once more for all weights outside the blocks. Counted: 52 with
AdamW, 66 with Muon."""
MAX_MEMORY_CORES = 8
"""Number of cores that saturate the memory bandwidth. Assumed."""

_MATMUL_WIDTH = 768
_SHARE_VALID_SECONDS = 10
"""A measured CPU share is used again for this time, so that `tinylm new` does not measure it for every candidate."""


@dataclass(frozen=True)
class Processor:
    """A measured CPU: FLOP/s of fp32 matrix products on all cores, and bytes/s of an addition on one core."""

    matmul_flops: float
    bandwidth: float
    """For arrays as large as the widest activation of a micro-batch."""
    state_bandwidth: float
    """For arrays as large as the weights."""
    cores: int
    has_amx: bool
    cpu_share: float = 1.0
    """Fraction of the time for which a thread has a core, when all cores are in use (see `cpu_load`)."""

    def matmul_flops_in(self, precision: ComputeDtype) -> float:
        """FLOP/s of the matrix products of a step. float16 is assumed to be as fast as float32."""
        return self.matmul_flops * self._speedup(precision, AMX_SPEEDUP)

    def peak_flops(self, precision: ComputeDtype) -> float:
        """FLOP/s of the fastest matrix products."""
        return self.matmul_flops * self._speedup(precision, AMX_PEAK_SPEEDUP)

    def _speedup(self, precision: ComputeDtype, with_amx: float) -> float:
        if precision != "bf16":
            return 1.0
        return with_amx if self.has_amx else EMULATED_SPEEDUP


@dataclass(frozen=True)
class Work:
    """Counts of one optimizer step, over all micro-batches.

    Forward and backward pass: FLOPs of matrix products, bytes moved outside them, attention scores and blocks of queries (over all
    layers, heads and sequences), and launched kernels. Optimizer: bytes moved (`state_bytes`, which includes zeroing gradients),
    launched kernels, and FLOPs and precision of the Newton-Schulz iteration.
    """

    precision: ComputeDtype
    matmul_flops: float
    elementwise_bytes: float
    scores: float
    query_blocks: float
    kernels: float
    state_bytes: float
    update_kernels: float
    newton_schulz_flops: float = 0.0
    newton_schulz_precision: ComputeDtype = "fp32"


@dataclass(frozen=True)
class CpuSeconds:
    """Seconds of one optimizer step by part."""

    matmul: float
    elementwise: float
    attention: float
    launches: float
    optimizer: float

    @property
    def passes(self) -> float:
        """Seconds of the forward and backward passes."""
        return self.matmul + self.elementwise + self.attention + self.launches

    @property
    def total(self) -> float:
        return self.passes + self.optimizer


def step_seconds(processor: Processor, work: Work) -> CpuSeconds:
    """Estimate the time of a step. Its parts are added, because each kernel runs on all cores and starts after the previous one."""
    cores = min(processor.cores, MAX_MEMORY_CORES)
    half = work.precision != "fp32"
    attention = work.scores * SCORE_SECONDS + (work.query_blocks * QUERY_BLOCK_SECONDS if half else 0.0)
    newton_schulz = work.newton_schulz_flops / (MATMUL_EFFICIENCY * processor.matmul_flops_in(work.newton_schulz_precision))
    memory = work.state_bytes / (STATE_EFFICIENCY * cores * processor.state_bandwidth)
    return CpuSeconds(
        matmul=work.matmul_flops / (MATMUL_EFFICIENCY * processor.matmul_flops_in(work.precision)),
        elementwise=work.elementwise_bytes / (ELEMENTWISE_EFFICIENCY * cores * processor.bandwidth),
        attention=attention / processor.cores,
        launches=work.kernels * LAUNCH_SECONDS,
        optimizer=newton_schulz + memory + work.update_kernels * LAUNCH_SECONDS,
    )


def kernels(layers: int, ngram_orders: int, precision: ComputeDtype, *, compiled: bool) -> int:
    """Kernels in the forward and backward pass of one micro-batch. `ngram_orders`: number of n-gram tables."""
    kind = "compiled" if compiled else "eager"
    block = KERNELS[kind] + (CAST_KERNELS[kind] if precision != "fp32" else 0)
    return layers * block + ngram_orders * TABLE_KERNELS + OUTSIDE_KERNELS


def query_blocks(sequences: int, heads: int, context_length: int) -> int:
    """Number of query blocks in the backward pass of torch's CPU attention in one layer (`FlashAttentionKernel.cpp`)."""
    size = 256 if context_length >= 768 else 64 if context_length >= 192 else 32
    return sequences * heads * math.ceil(context_length / size)


def newton_schulz_flops(rows: int, columns: int, steps: int) -> int:
    """FLOPs of the iteration on an m x n matrix, m <= n. Each step has a Gram matrix, its square, and a product with the matrix."""
    m, n = sorted((rows, columns))
    return steps * (4 * m * m * n + 2 * m**3)


def measure(activation_bytes: int, weight_bytes: int) -> Processor:
    """Measure this machine's CPU, which takes about 0.2 s. Other running programs lower the result.

    `activation_bytes`, `weight_bytes`: sizes of the arrays with which the two bandwidths are measured.
    """
    import numpy as np

    ones = np.ones((_MATMUL_WIDTH, _MATMUL_WIDTH), dtype=np.float32)
    multiply = _best(lambda: ones @ ones, min_runs=8)
    bandwidth, state_bandwidth = _bandwidth(activation_bytes), _bandwidth(weight_bytes)
    return Processor(
        matmul_flops=2 * _MATMUL_WIDTH**3 / multiply,
        bandwidth=bandwidth,
        state_bandwidth=state_bandwidth,
        cores=available_cores(),
        has_amx=_has_amx(),
        cpu_share=_recent_cpu_share(int(time.monotonic() / _SHARE_VALID_SECONDS)),
    )


@lru_cache(maxsize=1)
def _recent_cpu_share(period: int) -> float:
    """Return the CPU share as it was first measured in this period, a number that changes every `_SHARE_VALID_SECONDS`."""
    return cpu_share()


def _bandwidth(size: int) -> float:
    """Measure the bytes/s of adding two arrays of `size` bytes into a third on one core. `size` is clamped to 64 kB to 64 MB."""
    import numpy as np

    numbers = min(max(size, 1 << 16), 64 << 20) // 4
    left, right, into = (np.ones(numbers, dtype=np.float32) for _ in range(3))
    return 3 * left.nbytes / _best(lambda: np.add(left, right, out=into))


def _best(work: Callable[[], object], min_runs: int = 3, max_seconds: float = 0.06) -> float:
    """Return the seconds of the fastest run of `work`. Runs it for `max_seconds`, but `min_runs` to 50 times."""
    best, first_start, runs = math.inf, time.perf_counter(), 0
    while runs < min_runs or (runs < 50 and time.perf_counter() - first_start < max_seconds):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
        runs += 1
    return best


def _has_amx() -> bool:
    """Whether Linux lists AMX for bfloat16 among the CPU's features. False on other systems, which do not report it."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
