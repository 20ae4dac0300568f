"""Estimate the time of a training step on this machine's CPU. For GPUs, see `tinylm.cost.accelerators`.

The module converts counts (FLOPs, bytes and kernels) to seconds and does not import torch. `measure` measures the speed of matrix
products and memory with numpy. The constants state what fraction of that speed a training step reaches. Constants marked as fitted
are close to the least-squares fit to twelve step times. These were measured for five models with 0.8 to 13.9 million parameters,
context lengths from 64 to 256, and 768 to 2048 tokens per step, in fp32, in bf16, and with compilation. All ran on two cores of
one Xeon with AMX (350 GFLOP/s in fp32, 1650 in bf16). The constants reproduce those times within 20%. For other processors, they
are rough guesses.
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
"""Fraction of the measured peak FLOP/s that the matrix products in a step reach. Fitted."""
AMX_SPEEDUP = 4.7
"""Speedup of bf16 matrix products over fp32 with AMX. Measured: 1200 to 2100 GFLOP/s instead of 340 to 360."""
AMX_PEAK_SPEEDUP = 6.9
"""Like `AMX_SPEEDUP`, but for the fastest matrix products (2048 x 2048 and larger). Measured: 2200 GFLOP/s instead of 320 with
numpy."""
AVX512_BF16_SPEEDUP = 1.6
"""Like `AMX_SPEEDUP`, but for a CPU that has AVX512_BF16 instructions and no AMX. Fitted to the steps of three models on an AMD
EPYC (Zen 4). Matrix products alone are 2.4 times as fast; the value also accounts for conversions and attention in bf16."""
AVX512_BF16_PEAK_SPEEDUP = 2.2
"""Like `AMX_PEAK_SPEEDUP`. Measured: 419 GFLOP/s instead of 188."""
EMULATED_SPEEDUP = 1 / 150
"""Like `AMX_SPEEDUP`, but for a CPU that emulates bf16. Measured: 1 GFLOP/s instead of 165."""
ELEMENTWISE_EFFICIENCY = 0.25
"""Bandwidth per core that the elementwise kernels in a step reach, as a fraction of the bandwidth of a numpy addition on one core.
Fitted. The value also corrects for differences between the counted and the actual memory traffic."""
STATE_EFFICIENCY = 0.75
"""Like `ELEMENTWISE_EFFICIENCY`, but for kernels that read and write long, contiguous arrays (weights, gradients and optimizer
state). Assumed."""
SCORE_SECONDS = 4e-9
"""Core-seconds per attention score (batch x heads x time x time) in the forward and backward pass. Half of the scores are masked.
The others are exponentiated twice. Fitted in fp32. In bf16, the pass over 2.1 million scores took about 5e-9."""
LAUNCH_SECONDS = 8e-6
"""Seconds to launch a kernel from Python. Assumed. Typical values are 5 to 10 microseconds."""
KERNELS = {"eager": 90, "compiled": 40}
"""Kernels per block in the forward and backward pass, excluding views. The eager value was counted in a profile of the `modern`
preset. The compiled value is assumed."""
CAST_KERNELS = {"eager": 40, "compiled": 15}
"""Additional kernels per block under autocast, which casts weights and their gradients. Determined like `KERNELS`."""
OUTSIDE_KERNELS = 40
"""Kernels outside the blocks. Determined like `KERNELS`."""
TABLE_KERNELS = 35
"""Additional kernels for each n-gram table. Hashing the n-grams takes a dozen integer operations. Determined like `KERNELS`."""
UPDATE_KERNELS = 60
"""Kernels per block that clip gradients and update weights. The weights outside the blocks count as one more block. The counts were
52 with AdamW and 66 with Muon."""
MAX_MEMORY_CORES = 8
"""Number of cores that are enough to saturate the memory bandwidth. Assumed."""

_MATMUL_WIDTH = 768
_VALID_SECONDS = 10
"""How long a measurement is reused. `tinylm new` estimates many recipes in this time."""
"""A measured CPU share is reused for this many seconds, so that `tinylm new` does not measure it for every candidate."""


@dataclass(frozen=True)
class Processor:
    """The measured FLOP/s of fp32 matrix products on all cores, and the bytes/s of an addition on one core."""

    matmul_flops: float
    bandwidth: float
    """Bandwidth for arrays as large as a micro-batch's widest activation."""
    state_bandwidth: float
    """Bandwidth for arrays as large as the weights."""
    cores: int
    has_amx: bool
    has_avx512_bf16: bool = False
    cpu_share: float = 1.0
    """Fraction of the time that a thread runs on a core when all cores are in use (see `cpu_load`)."""

    @property
    def has_fast_bf16(self) -> bool:
        """Whether matrix products in bf16 are faster than in fp32."""
        return self.has_amx or self.has_avx512_bf16

    def matmul_flops_in(self, precision: ComputeDtype) -> float:
        """Return the FLOP/s of the matrix products in a step. float16 is assumed to be as fast as float32."""
        return self.matmul_flops * self._speedup(precision, AMX_SPEEDUP, AVX512_BF16_SPEEDUP)

    def peak_flops(self, precision: ComputeDtype) -> float:
        """Return the FLOP/s of the fastest matrix products."""
        return self.matmul_flops * self._speedup(precision, AMX_PEAK_SPEEDUP, AVX512_BF16_PEAK_SPEEDUP)

    def _speedup(self, precision: ComputeDtype, with_amx: float, with_avx512: float) -> float:
        if precision != "bf16":
            return 1.0
        if self.has_amx:
            return with_amx
        return with_avx512 if self.has_avx512_bf16 else EMULATED_SPEEDUP


@dataclass(frozen=True)
class Work:
    """The amount of work in one optimizer step, summed over all micro-batches.

    For the forward and backward pass, these are the FLOPs in matrix products, the bytes moved outside them, the attention scores
    (over all layers, heads and sequences), and the launched kernels. For the optimizer, they are the bytes moved (`state_bytes`,
    which includes zeroing the gradients), the launched kernels, and the FLOPs and precision of the Newton-Schulz iteration.
    """

    precision: ComputeDtype
    matmul_flops: float
    elementwise_bytes: float
    scores: float
    kernels: float
    state_bytes: float
    update_kernels: float
    newton_schulz_flops: float = 0.0
    newton_schulz_precision: ComputeDtype = "fp32"


@dataclass(frozen=True)
class CpuSeconds:
    """The parts of one optimizer step in seconds."""

    matmul: float
    elementwise: float
    attention: float
    launches: float
    optimizer: float

    @property
    def passes(self) -> float:
        """The seconds for the forward and backward pass."""
        return self.matmul + self.elementwise + self.attention + self.launches

    @property
    def total(self) -> float:
        return self.passes + self.optimizer


def step_seconds(processor: Processor, work: Work) -> CpuSeconds:
    """Estimate the time of a step. Its parts are added because the kernels run sequentially and each uses all cores."""
    cores = min(processor.cores, MAX_MEMORY_CORES)
    newton_schulz = work.newton_schulz_flops / (MATMUL_EFFICIENCY * processor.matmul_flops_in(work.newton_schulz_precision))
    memory = work.state_bytes / (STATE_EFFICIENCY * cores * processor.state_bandwidth)
    return CpuSeconds(
        matmul=work.matmul_flops / (MATMUL_EFFICIENCY * processor.matmul_flops_in(work.precision)),
        elementwise=work.elementwise_bytes / (ELEMENTWISE_EFFICIENCY * cores * processor.bandwidth),
        attention=work.scores * SCORE_SECONDS / processor.cores,
        launches=work.kernels * LAUNCH_SECONDS,
        optimizer=newton_schulz + memory + work.update_kernels * LAUNCH_SECONDS,
    )


def kernels(layers: int, ngram_orders: int, precision: ComputeDtype, *, compiled: bool) -> int:
    """Return the number of kernels in the forward and backward pass of one micro-batch, with `ngram_orders` n-gram tables."""
    kind = "compiled" if compiled else "eager"
    block = KERNELS[kind] + (CAST_KERNELS[kind] if precision != "fp32" else 0)
    return layers * block + ngram_orders * TABLE_KERNELS + OUTSIDE_KERNELS


def newton_schulz_flops(rows: int, columns: int, steps: int) -> int:
    """Return the FLOPs of the iteration on an m x n matrix with m <= n.

    Each step computes a Gram matrix, its square, and a product with the matrix.
    """
    m, n = sorted((rows, columns))
    return steps * (4 * m * m * n + 2 * m**3)


def measure(activation_bytes: int, weight_bytes: int) -> Processor:
    """Measure this machine's CPU, which takes about 0.2 seconds, or reuse a recent measurement.

    Other running programs lower the measured speed. `activation_bytes` and `weight_bytes` are the sizes of the arrays for
    measuring the two bandwidths.
    """
    period = int(time.monotonic() / _VALID_SECONDS)
    return Processor(
        matmul_flops=_matmul_flops(period),
        bandwidth=_bandwidth(activation_bytes, period),
        state_bandwidth=_bandwidth(weight_bytes, period),
        cores=available_cores(),
        has_amx=_has_cpu_feature("amx_bf16"),
        has_avx512_bf16=_has_cpu_feature("avx512_bf16"),
        cpu_share=_recent_cpu_share(period),
    )


# Each of these functions measures once per period. The number of the period changes every `_VALID_SECONDS`.


@lru_cache(maxsize=1)
def _recent_cpu_share(period: int) -> float:
    return cpu_share()


@lru_cache(maxsize=1)
def _matmul_flops(period: int) -> float:
    """Measure the FLOP/s of a matrix multiplication in float32."""
    import numpy as np

    ones = np.ones((_MATMUL_WIDTH, _MATMUL_WIDTH), dtype=np.float32)
    return 2 * _MATMUL_WIDTH**3 / _best(lambda: ones @ ones, min_runs=8)


@lru_cache(maxsize=32)
def _bandwidth(size: int, period: int) -> float:
    """Measure the bytes/s of adding two arrays of `size` bytes into a third on one core. `size` is clamped to 64 KiB to 64 MiB."""
    import numpy as np

    numbers = min(max(size, 1 << 16), 64 << 20) // 4
    left, right, into = (np.ones(numbers, dtype=np.float32) for _ in range(3))
    return 3 * left.nbytes / _best(lambda: np.add(left, right, out=into))


def _best(work: Callable[[], object], min_runs: int = 3, max_seconds: float = 0.06) -> float:
    """Call `work` repeatedly and return the seconds of the fastest call.

    Stop after `max_seconds`, but make at least `min_runs` and at most 50 calls.
    """
    best, first_start, runs = math.inf, time.perf_counter(), 0
    while runs < min_runs or (runs < 50 and time.perf_counter() - first_start < max_seconds):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
        runs += 1
    return best


def _has_cpu_feature(name: str) -> bool:
    """Return whether Linux lists a feature of the CPU. Other systems do not report features, so the result is False."""
    try:
        return name in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return False
