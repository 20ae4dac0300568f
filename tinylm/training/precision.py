"""Numeric precision of training: float32, or autocast to bfloat16, or to float16 with a gradient scaler."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from tinylm.device import has_bf16_units
from tinylm.reporting import Reporter

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SPEEDUP_WIDTH = 256
"""Width of the square matrices in `bf16_speedup`."""
_PEAK_WIDTHS = {"cpu": (1024, 2048), "cuda": (4096,), "mps": (2048,)}
"""Widths of the square matrices in `measure_peak_flops`. On some CPUs, a bf16 matmul of the smaller width runs on a single core, so
the larger width is timed as well. In fp32, that would only delay the start of training."""
_REPEATS = 6
_TRY_LARGER_BELOW_SECONDS = 0.03
"""The larger width is timed only if a matmul of the smaller width is faster than this."""
_REPEAT_BELOW_SECONDS = 0.5
"""A matmul that is slower than this is not repeated. This happens with bf16 on a CPU that emulates it."""


@dataclass(frozen=True)
class Precision:
    """`name` is `fp32` for no autocast, or its dtype: `bf16` or `fp16`. Weights and optimizer state are always float32."""

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.name]

    @contextmanager
    def tf32(self) -> Iterator[None]:
        """A context in which a GPU uses TF32 for float32 matmuls. Training uses it; evaluation stays in full float32."""
        if self.device.type != "cuda":
            yield
            return
        try:
            before = torch.backends.cuda.matmul.allow_tf32
        except RuntimeError:  # the caller has used torch's newer `fp32_precision` setting, which must not be mixed with this one
            yield
            return
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    def autocast(self) -> AbstractContextManager[object]:
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler that keeps float16 gradients from underflowing. It is disabled for other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def resolve(name: str, device: torch.device, reporter: Reporter) -> Precision:
    """The precision `name`. For `auto`: bf16 if the device is faster in it, fp16 on a GPU without bf16 units, else fp32.

    Warns if bf16 was requested on a CPU where it is slower than fp32.
    """
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if has_bf16_units(device) else "fp16"
        else:
            name = "bf16" if device.type == "cpu" and bf16_speedup(device) > 1.5 else "fp32"
    elif name == "bf16" and device.type == "cpu" and (speedup := bf16_speedup(device)) < 1:
        reporter.warn(f"bf16 is {1 / speedup:.0f} times slower than fp32 on this CPU (use fp32 with --set training.precision=fp32)")
    return Precision(name, device)


def bf16_speedup(device: torch.device) -> float:
    """Measure how many times faster a small matmul is in bfloat16 than in float32."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(_SPEEDUP_WIDTH, _SPEEDUP_WIDTH, dtype=dtype, device=device)
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            matrix @ matrix
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.float32) / max(seconds(torch.bfloat16), 1e-9)


def measure_peak_flops(precision: Precision) -> float:
    """Measure the FLOP/s of a large matmul on the device in this precision. As in training, fp32 on a GPU uses TF32."""
    widths = _PEAK_WIDTHS[precision.device.type]
    best = 0.0
    for width in widths[: 1 if precision.name == "fp32" else None]:
        seconds = matmul_seconds(width, precision)
        best = max(best, 2 * width**3 / seconds)
        if seconds > _TRY_LARGER_BELOW_SECONDS:
            break
    return best


def matmul_seconds(width: int, precision: Precision) -> float:
    """Measure the time of a (width, width) x (width, width) matmul: the best of several repeats.

    On a CPU, counts the CPU time of the calling thread if that clock is precise enough, so that other load on the machine does not
    matter.
    """
    device = precision.device
    clock = time.thread_time if device.type == "cpu" and _has_precise_thread_clock() else time.perf_counter
    generator = torch.Generator().manual_seed(0)  # random, because GPUs multiply constant matrices faster
    matrix = torch.randn(width, width, generator=generator).to(device, precision.dtype)
    best = float("inf")
    with precision.tf32():
        for _ in range(_REPEATS):
            _synchronize(device)
            start = clock()
            matrix @ matrix
            _synchronize(device)
            best = min(best, clock() - start)
            if best > _REPEAT_BELOW_SECONDS:
                break
    return best


def _has_precise_thread_clock() -> bool:
    """Whether `time.thread_time` can time a matmul. On Windows it advances in steps of 16 ms."""
    return time.get_clock_info("thread_time").resolution < 1e-4


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
