"""Choose the device and the number of CPU threads, and report what the hardware can do."""

from __future__ import annotations

import gc
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

from tinylm.errors import InputError

if TYPE_CHECKING:  # Importing torch takes a second, and a mistyped device should be reported immediately.
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
_VECTOR_MATH = (
    *("acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "lgamma"),
    *("log", "log10", "log1p", "log2", "rsqrt", "sin", "sinh", "sqrt", "tan", "tanh"),
)
"""Elementwise functions that torch can compute with MKL."""


def resolve(name: str) -> torch.device:
    """Return the device `name`. `auto` selects the first available device among CUDA, MPS and the CPU.

    Raises `InputError` if the device is unknown or unavailable.
    """
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (index and not index.isdigit()):
        raise InputError(f"no such device {name!r}", where="--device", hint=f"use one of {', '.join(DEVICES)}")

    _import_torch()
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if kind == "auto":
        kind = next(candidate for candidate, is_available in available.items() if is_available)
    if not available[kind]:
        raise InputError(
            f"{kind} is not available on this machine", where="--device", hint="omit --device to use the fastest device"
        )
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise InputError(f"this machine has {torch.cuda.device_count()} CUDA devices", where=f"--device {name}")
    return torch.device(f"{kind}:{index}" if index else kind)


def _import_torch() -> None:
    """Import torch without garbage collection. The import creates many objects and frees few, so it is a tenth faster."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        if was_enabled:
            gc.enable()


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads that torch uses, and choose how idle threads wait (see `wait_policy`).

    None keeps torch's default of one thread per core. `pipeline.train` calls this function. Programs that run a model without
    `pipeline.train` should call it once at the start.
    """
    import torch

    from tinylm.wait_policy import WAIT_POLICY

    if threads is not None:
        torch.set_num_threads(threads)
    WAIT_POLICY.choose()


def warm_up_vector_math() -> None:
    """Call every elementwise MKL function once to avoid a race that makes results irreproducible. This takes a millisecond.

    MKL selects the code for a function on the first call. If two threads make that call at the same time, one of them can run less
    precise code (https://github.com/pytorch/pytorch/issues/188792). Without this warm-up, one in eight runs computed different
    cosines for its rotary position embeddings and ended with different weights.
    """
    import torch

    for dtype in (torch.float32, torch.float64):
        number = torch.zeros(1, dtype=dtype)
        for name in _VECTOR_MATH:
            getattr(number, name)()


def has_bf16_units(device: torch.device) -> bool:
    """Return whether the hardware supports bfloat16 natively. Older GPUs and most CPUs only emulate it."""
    import torch

    if device.type == "cuda":
        with torch.cuda.device(device) if device.index is not None else nullcontext():  # torch checks only the current GPU
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def describe(device: torch.device) -> str:
    """Return the product name of a GPU, or the device type with the number of threads for a CPU."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def free_memory_bytes(device: torch.device) -> int:
    """Return the free memory of a CUDA GPU in bytes, including memory that torch has reserved but not allocated."""
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + int(unused)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the peak memory of this process in bytes, or for CUDA the peak memory allocated on the GPU.

    Return None if the operating system does not report it.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
