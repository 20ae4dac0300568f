"""Recognize out-of-memory errors, choose a smaller micro-batch, and configure the allocator to reuse freed memory."""

from __future__ import annotations

import ctypes
import sys

import torch

from tinylm.cost.memory import MMAP_THRESHOLD

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # from malloc.h; see mallopt(3)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator ran out of memory. Only CUDA raises a dedicated class; other devices are recognized by the message."""
    messages = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in messages)


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory instead of returning it to the system. Returns False on systems without glibc.

    Every step allocates the same tensors, and the kernel zeroes each page before reusing it. Keeping the memory saves 5% to 25%
    of the step time on a CPU. Tensors of `MMAP_THRESHOLD` bytes or more are still returned.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl
        return False
    never = 2**31 - 1
    settings = ((_M_MMAP_THRESHOLD, MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, never), (_M_TOP_PAD, 64 << 20))
    return all(mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings)


def smaller_micro_batch(micro_batch_size: int, sequences: int) -> int:
    """Return the largest divisor of `sequences`, a process's share of the batch, that is at most half the micro-batch size."""
    return next(size for size in range(micro_batch_size // 2, 0, -1) if sequences % size == 0)
