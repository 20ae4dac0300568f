"""Training precision: float32, autocast to bfloat16, or autocast to float16 with a gradient scaler."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from tinylm.cost import accelerators
from tinylm.cost.accelerators import Accelerator
from tinylm.device import describe, has_bf16_units
from tinylm.reporting import Reporter

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SPEEDUP_WIDTH = 256
"""Width of the square matrices in `bf16_speedup`."""

_WORTH_A_TRIAL = 0.5
"""Smallest `bf16_speedup` at which a whole training step can be faster in bf16. The measurement varies by a factor of two, and CPUs
that emulate bf16 are 10 or more times slower."""
_PEAK_WIDTHS = {"cpu": (1024, 2048), "cuda": (8192,), "mps": (2048,)}
"""Widths of the square matrices in `measure_peak_flops`. On some CPUs, a bf16 matmul of the smaller width runs on a single core, so
the larger width is also timed. In fp32, this is not necessary and would only delay the start of training."""
_REPEATS = 6
_BACK_TO_BACK = 10
"""Number of matmuls to queue back to back on a GPU, so that the measured time does not include launch overhead."""
_TRY_LARGER_BELOW_SECONDS = 0.03
"""The larger width is timed only if a matmul of the smaller width is faster than this."""
_REPEAT_BELOW_SECONDS = 0.5
"""A matmul that takes longer than this is not repeated. For example, bf16 matmuls are very slow on CPUs that emulate bf16."""


@dataclass(frozen=True)
class Precision:
    """`name` is `fp32` (no autocast), or the autocast dtype `bf16` or `fp16`. Weights and optimizer state are always float32."""

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.name]

    @contextmanager
    def tf32(self) -> Iterator[None]:
        """Use TF32 for float32 matmuls on a GPU within this context. The final evaluation uses full float32 instead."""
        if self.device.type != "cuda":
            yield
            return
        try:
            before = torch.backends.cuda.matmul.allow_tf32
        except RuntimeError:  # the caller uses torch's newer `fp32_precision` setting, which must not be mixed with this one
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

    @contextmanager
    def for_training(self) -> Iterator[None]:
        """Compute as in training within this context: with autocast, and with TF32 on a GPU."""
        with self.tf32(), self.autocast():
            yield

    def scaler(self) -> torch.amp.GradScaler:
        """Return a gradient scaler that keeps float16 gradients from underflowing. It is disabled for other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def resolve(name: str, device: torch.device, reporter: Reporter) -> Precision:
    """Return the precision called `name`. `auto` means bf16 if the device supports it, fp16 on other GPUs, and otherwise fp32.

    If `auto` results in bf16 on a CPU, the caller should check with the model itself that it is faster. Warns if bf16 was requested
    on a CPU where it is much slower than fp32.
    """
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if has_bf16_units(device) else "fp16"
        else:
            name = "bf16" if device.type == "cpu" and bf16_speedup(device) > _WORTH_A_TRIAL else "fp32"
    elif name == "bf16" and device.type == "cpu" and (speedup := bf16_speedup(device)) < _WORTH_A_TRIAL:
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


def peak_flops(precision: Precision) -> float:
    """Return the peak FLOP/s for model FLOPs utilization (MFU), from the device's data sheet or else from a measurement."""
    sheet = _data_sheet(precision)
    return measure_peak_flops(precision) if sheet is None else sheet[0].flops[sheet[1]]


def peak_source(precision: Precision) -> str:
    """Return a description of where the value of `peak_flops` comes from."""
    sheet = _data_sheet(precision)
    return "measured matmul throughput" if sheet is None else f"data sheet of {sheet[0].name}, {sheet[1]}"


def _data_sheet(precision: Precision) -> tuple[Accelerator, str] | None:
    """Return a GPU's data sheet and the key for this precision in it. As in training, fp32 uses TF32 if the GPU supports it."""
    if precision.device.type != "cuda":
        return None
    sheet = accelerators.from_device_name(describe(precision.device))
    if sheet is None:
        return None
    name = "tf32" if precision.name == "fp32" and "tf32" in sheet.flops else precision.name
    return (sheet, name) if name in sheet.flops else None


def measure_peak_flops(precision: Precision) -> float:
    """Measure the FLOP/s of a large matmul in this precision. As in training, fp32 on a GPU uses TF32."""
    widths = _PEAK_WIDTHS[precision.device.type]
    best = 0.0
    for width in widths[: 1 if precision.name == "fp32" else None]:
        seconds = matmul_seconds(width, precision)
        best = max(best, 2 * width**3 / seconds)
        if seconds > _TRY_LARGER_BELOW_SECONDS:
            break
    return best


def matmul_seconds(width: int, precision: Precision) -> float:
    """Measure the time of a (width, width) x (width, width) matmul in seconds: the best of several repeats.

    On CUDA, the result is the mean of several back-to-back matmuls, after two warm-up matmuls. On a CPU, it is the CPU time of the
    calling thread if that clock is precise enough, so that other load on the machine does not affect the result.
    """
    device = precision.device
    clock = time.thread_time if device.type == "cpu" and _has_precise_thread_clock() else time.perf_counter
    generator = torch.Generator().manual_seed(0)  # use random values, because GPUs multiply constant matrices faster
    matrix = torch.randn(width, width, generator=generator).to(device, precision.dtype)
    best = float("inf")
    with precision.tf32():
        if device.type == "cuda":
            return _cuda_matmul_seconds(matrix)
        for _ in range(_REPEATS):
            _synchronize(device)
            start = clock()
            matrix @ matrix
            _synchronize(device)
            best = min(best, clock() - start)
            if best > _REPEAT_BELOW_SECONDS:
                break
    return best


def _cuda_matmul_seconds(matrix: torch.Tensor) -> float:
    with torch.cuda.device(matrix.device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for _ in range(2):
            matrix @ matrix
        start.record()
        for _ in range(_BACK_TO_BACK):
            matrix @ matrix
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / _BACK_TO_BACK


def _has_precise_thread_clock() -> bool:
    """Whether `time.thread_time` is precise enough to time a matmul. On Windows, it advances in steps of 16 ms."""
    return time.get_clock_info("thread_time").resolution < 1e-4


def _synchronize(device: torch.device) -> None:
    if device.type == "mps":
        torch.mps.synchronize()
