"""How long a training step takes on this machine's CPU: the twin of `tinylm.cost.accelerators` for a device without a data sheet.

In come counts (floating-point operations, bytes, kernels), out come seconds. How fast the machine multiplies matrices and adds
arrays is measured, with numpy and without torch; the constants say what a step makes of that. Those called fitted lie near the
least squares of twelve step times of five models of 0.8 to 13.9 million parameters, contexts of 64 to 256 and 768 to 2048 tokens
a step, in fp32, in bf16 and compiled, all on two cores of one Xeon with AMX, taken to multiply 350 GFLOP/s in fp32 and 1650 in
bf16. They give those times back within 20 %; on another processor they are a guess.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Numbers = Literal["fp32", "bf16", "fp16"]

MATMUL_SHARE = 0.9
"""Share of the measured peak that the matrix products of a step reach. Fitted."""
AMX_SPEED_UP = 4.7
"""How many times faster products are in bf16 where the processor has tiles for it: 1200 to 2100 GFLOP/s against 340 to 360."""
AMX_PEAK_SPEED_UP = 6.9
"""The same for the fastest of products, of matrices of 2048 x 2048 and more: 2200 GFLOP/s against numpy's 320."""
EMULATED_SPEED_UP = 1 / 150
"""The same without: measured, 1 against 165 GFLOP/s."""
ELEMENTWISE_SHARE = 0.25
"""Of a numpy addition's bandwidth, on one core, what each core contributes to the element-wise kernels of a step. Fitted; it
also stands for what `hardware.elementwise_bytes` counts and the written-out functions of the model do not move, and the reverse."""
STATE_SHARE = 0.75
"""Likewise for weights, gradients and moments, which are long arrays in order. Assumed."""
SCORE_SECONDS = 4e-9
"""Of one core, for each score of attention (batch x heads x time x time), forward and backward: half of them are masked, all
others exponentiated twice. Fitted."""
HALF_BLOCK_SECONDS = 130e-6
"""Of one core, for each block of queries whose gradient attention forms in bf16: its small products there have a fixed price,
where float32's have not. Fitted; a profile of 48 heads by sequences of 64 positions gave 70 for each block of 32."""
LAUNCH_SECONDS = 8e-6
"""Of the interpreter, for each kernel, forward and backward. Assumed, of 5 to 10 that are usual."""
KERNELS = {"eager": 90, "compiled": 40}
"""Of a block, forward and backward, without views. Counted in a profile of the `modern` preset; compiled: assumed."""
CAST_KERNELS = {"eager": 40, "compiled": 15}
"""More of them under autocast, which casts weights and their gradients. Likewise."""
END_KERNELS = 40
"""Outside the blocks. Likewise."""
TABLE_KERNELS = 35
"""More of them for each order of n-grams, which are hashed in a dozen operations on whole numbers. Likewise."""
UPDATE_KERNELS = 60
"""Of clipping and updating the weights of a block, and as many for those outside: 52 counted of AdamW, 66 of Muon."""
MOST_CORES = 8
"""Beyond these, more cores move no more memory. Assumed."""

_MATMUL_WIDTH = 768


@dataclass(frozen=True)
class Processor:
    """What was measured: FLOP/s of fp32 products on all cores, bytes/s of an addition on one core for what is in use."""

    matmul_flops: float
    bandwidth: float
    """Of arrays as large as the widest activation of a micro-batch."""
    state_bandwidth: float
    """Of arrays as large as the weights."""
    cores: int
    has_amx: bool
    undisturbed: float = 1.0
    """Share of the measuring during which it had a core: less than about 0.9 where the machine is busy with something else."""

    def product_flops(self, numbers: Numbers) -> float:
        """FLOP/s of a step's products in these numbers. float16 is taken to be as fast as float32, which was not measured."""
        return self.matmul_flops * self._speed_up(numbers, AMX_SPEED_UP)

    def peak(self, numbers: Numbers) -> float:
        """FLOP/s of the fastest products in these numbers."""
        return self.matmul_flops * self._speed_up(numbers, AMX_PEAK_SPEED_UP)

    def _speed_up(self, numbers: Numbers, with_amx: float) -> float:
        if numbers != "bf16":
            return 1.0
        return with_amx if self.has_amx else EMULATED_SPEED_UP


@dataclass(frozen=True)
class Work:
    """Counts of one optimiser step: all micro-batches together.

    `elementwise_bytes` outside products, `scores` of attention in all layers, heads and sequences, `query_blocks` of them,
    `kernels` started. For the optimiser: `state_bytes` that it moves, `update_kernels` and `newton_schulz_flops`, in
    `newton_schulz_in`. Gradients that begin as zeros are among `state_bytes`.
    """

    numbers: Numbers
    matmul_flops: float
    elementwise_bytes: float
    scores: float
    query_blocks: float
    kernels: float
    state_bytes: float
    update_kernels: float
    newton_schulz_flops: float = 0.0
    newton_schulz_in: Numbers = "fp32"


@dataclass(frozen=True)
class CpuSeconds:
    """Seconds of one optimiser step by what they are spent on; forward and backward are all but `optimizer`."""

    matmul: float
    elementwise: float
    attention: float
    launches: float
    optimizer: float

    @property
    def passes(self) -> float:
        return self.matmul + self.elementwise + self.attention + self.launches

    @property
    def total(self) -> float:
        return self.passes + self.optimizer


def step_seconds(processor: Processor, work: Work) -> CpuSeconds:
    """The time of a step. Its parts follow one another: a kernel begins when the one before has ended, on all cores."""
    cores = min(processor.cores, MOST_CORES)
    half = work.numbers != "fp32"
    attention = work.scores * SCORE_SECONDS + (work.query_blocks * HALF_BLOCK_SECONDS if half else 0.0)
    newton_schulz = work.newton_schulz_flops / (MATMUL_SHARE * processor.product_flops(work.newton_schulz_in))
    moving = work.state_bytes / (STATE_SHARE * cores * processor.state_bandwidth)
    return CpuSeconds(
        matmul=work.matmul_flops / (MATMUL_SHARE * processor.product_flops(work.numbers)),
        elementwise=work.elementwise_bytes / (ELEMENTWISE_SHARE * cores * processor.bandwidth),
        attention=attention / processor.cores,
        launches=work.kernels * LAUNCH_SECONDS,
        optimizer=newton_schulz + moving + work.update_kernels * LAUNCH_SECONDS,
    )


def kernels(layers: int, orders: int, numbers: Numbers, *, compiled: bool) -> int:
    """Kernels that forward and backward of one micro-batch start. `orders`: of n-grams."""
    kind = "compiled" if compiled else "eager"
    block = KERNELS[kind] + (CAST_KERNELS[kind] if numbers != "fp32" else 0)
    return layers * block + orders * TABLE_KERNELS + END_KERNELS


def query_blocks(sequences: int, heads: int, context_length: int) -> int:
    """Blocks of queries in which torch's attention for CPUs (`FlashAttentionKernel.cpp`) goes back through one layer."""
    size = 256 if context_length >= 768 else 64 if context_length >= 192 else 32
    return sequences * heads * math.ceil(context_length / size)


def newton_schulz_flops(rows: int, columns: int, steps: int) -> int:
    """Of the iteration on one matrix of m x n, m <= n: a Gram matrix, its square and a product with the matrix, each step."""
    m, n = sorted((rows, columns))
    return steps * (4 * m * m * n + 2 * m**3)


def measure(activation_bytes: int, weight_bytes: int) -> Processor:
    """This machine, in about 0.2 s; busy with something else, it is as slow as it then is."""
    import numpy as np

    began, worked = time.perf_counter(), time.thread_time()
    ones = np.ones((_MATMUL_WIDTH, _MATMUL_WIDTH), dtype=np.float32)
    multiply = _best(lambda: ones @ ones, least=8)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bandwidth, state_bandwidth = _bandwidth(activation_bytes), _bandwidth(weight_bytes)
    return Processor(
        matmul_flops=2 * _MATMUL_WIDTH**3 / multiply,
        bandwidth=bandwidth,
        state_bandwidth=state_bandwidth,
        cores=cores,
        has_amx=_has_amx(),
        undisturbed=min(1.0, (time.thread_time() - worked) / (time.perf_counter() - began)),
    )


def _bandwidth(size: int) -> float:
    """Bytes/s of adding two arrays of `size` bytes into a third, on one core."""
    import numpy as np

    numbers = min(max(size, 1 << 16), 64 << 20) // 4
    left, right, into = (np.ones(numbers, dtype=np.float32) for _ in range(3))
    return 3 * left.nbytes / _best(lambda: np.add(left, right, out=into))


def _best(work: Callable[[], object], least: int = 3, most: float = 0.06) -> float:
    """The least seconds that `work` took, of at least `least` times and until `most` seconds have passed."""
    best, began, done = math.inf, time.perf_counter(), 0
    while done < least or (done < 50 and time.perf_counter() - began < most):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
        done += 1
    return best


def _has_amx() -> bool:
    """Whether Linux lists tiles for bfloat16 among the processor's features; elsewhere it is not known, so no."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
