"""Which device does the work, and how many threads it may use."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tinylm.errors import InputError

if TYPE_CHECKING:  # a name that is no device is refused without waiting for torch
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
_VECTOR_MATH = (
    *("acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "lgamma"),
    *("log", "log10", "log1p", "log2", "rsqrt", "sin", "sinh", "sqrt", "tan", "tanh"),
)


def resolve(name: str) -> torch.device:
    """`auto`: CUDA, else Apple's MPS, else the CPU. Raises `InputError` for a device that is not here."""
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (index and not index.isdigit()):
        raise InputError(f"no such device {name!r}", where="--device", hint=f"one of {', '.join(DEVICES)}")

    import torch

    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[kind]:
        raise InputError(f"{kind} is not available here", where="--device", hint="leave it out to use what there is")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise InputError(f"there are {torch.cuda.device_count()} CUDA devices", where=f"--device {name}")
    return torch.device(f"{kind}:{index}" if index else kind)


def set_threads(threads: int | None) -> None:
    """Let torch compute on this many CPU threads; None leaves its own choice, one per core."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def settle_vector_math() -> None:
    """Call each function of one number once, alone, so that no result depends on how a process began.

    MKL chooses its code for such a function when it is first called, and while two threads do that together one of them can
    compute its half with code of less precision (https://github.com/pytorch/pytorch/issues/188792): one training in eight had
    other cosines in its rotary positions, and other weights at the end. Takes a millisecond.
    """
    import torch

    for dtype in (torch.float32, torch.float64):
        number = torch.zeros(1, dtype=dtype)
        for name in _VECTOR_MATH:
            getattr(number, name)()


def describe(device: torch.device) -> str:
    """What the device is called by its maker, where it says."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory used so far: of the GPU on CUDA, of this process elsewhere; None where the system does not tell."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
