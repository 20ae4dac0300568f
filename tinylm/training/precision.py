"""In which numbers a training computes: float32, or autocast to bfloat16 or float16 with a gradient scaler."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from tinylm.reporting import Reporter

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PROBE_WIDTH = 256
_PEAK_WIDTHS = {"cpu": (1024, 2048), "cuda": (4096,), "mps": (2048,)}
"""Of the matrices that tell the peak. A CPU gives some products of the smaller kind to one core alone, those in bf16; the larger
kind would only make a training in fp32 begin later."""
_PRODUCTS = 6
_PRODUCT_SECONDS = 0.03
"""A product that takes longer needs no larger one."""
_LONG_SECONDS = 0.5
"""One that takes longer, as in bf16 on a processor without units for it, is not repeated."""


@dataclass(frozen=True)
class Precision:
    """Weights and optimiser stay in float32; `name` is what autocast uses inside."""

    name: str
    device: torch.device

    @contextmanager
    def tf32(self) -> Iterator[None]:
        """Let a GPU round the inputs of float32 products to TF32 while training; measuring stays exact."""
        if self.device.type != "cuda":
            yield
            return
        try:
            before = torch.backends.cuda.matmul.allow_tf32
        except RuntimeError:  # whoever uses this process has chosen by torch's newer switch
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
        return torch.autocast(self.device.type, dtype=_DTYPES[self.name])

    def scaler(self) -> torch.amp.GradScaler:
        """Scales losses so that float16 gradients do not vanish; does nothing for the others."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def resolve(name: str, device: torch.device, reporter: Reporter) -> Precision:
    """`auto`: bf16 where the device is really faster in it, fp16 on a GPU without it, else fp32."""
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if _has_bf16(device) else "fp16"
        else:
            name = "bf16" if device.type == "cpu" and _bf16_speed_up(device) > 1.5 else "fp32"
    elif name == "bf16" and device.type == "cpu" and (gain := _bf16_speed_up(device)) < 1:
        reporter.warn(
            f"bf16 is {1 / gain:.0f} times slower than fp32 on this CPU; fp32 would be faster (--set training.precision=fp32)"
        )
    return Precision(name, device)


def _has_bf16(device: torch.device) -> bool:
    """Of the GPU that is meant, which need not be the current one; older ones only emulate it."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _bf16_speed_up(device: torch.device) -> float:
    """How many times faster a small matrix product is in bfloat16 than in float32, measured."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(_PROBE_WIDTH, _PROBE_WIDTH, dtype=dtype, device=device)
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            matrix @ matrix
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.float32) / max(seconds(torch.bfloat16), 1e-9)


def matmul_flops(precision: Precision) -> float:
    """FLOP/s of a large matrix product on the device in this precision (TF32 for fp32 on a GPU, as in training), measured.

    On a CPU by the time that the product had a core, so that a machine that is busy counts as fast as it is.
    """
    best = 0.0
    for width in _PEAK_WIDTHS[precision.device.type][: 1 if precision.name == "fp32" else None]:
        seconds = _product_seconds(width, precision)
        best = max(best, 2 * width**3 / seconds)
        if seconds > _PRODUCT_SECONDS:
            break
    return best


def _product_seconds(width: int, precision: Precision) -> float:
    """The least of several products of matrices of this width."""
    device = precision.device
    clock = time.thread_time if device.type == "cpu" and _threads_are_timed_finely() else time.perf_counter
    generator = torch.Generator().manual_seed(0)  # GPUs multiply ones faster than numbers
    matrix = torch.randn(width, width, generator=generator).to(device, _DTYPES[precision.name])
    best = float("inf")
    with precision.tf32():
        for _ in range(_PRODUCTS):
            _wait(device)
            start = clock()
            matrix @ matrix
            _wait(device)
            best = min(best, clock() - start)
            if best > _LONG_SECONDS:
                break
    return best


def _threads_are_timed_finely() -> bool:
    """Windows counts a thread's time in steps of 16 milliseconds."""
    return time.get_clock_info("thread_time").resolution < 1e-4


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
