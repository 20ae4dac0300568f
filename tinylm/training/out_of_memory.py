"""Recognize out-of-memory errors, choose a smaller micro-batch, and configure the allocator to reuse freed memory."""

from __future__ import annotations

import ctypes
import sys

import torch

from tinylm import errors
from tinylm.cost.memory import MMAP_THRESHOLD
from tinylm.cost.micro_batch import estimate_memory, host_memory_bytes
from tinylm.cost.parameters import has_estimates
from tinylm.errors import InputError
from tinylm.model import registry
from tinylm.recipe import Recipe

_BYTES_PER_PARAMETER = 4
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # from malloc.h; see mallopt(3)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocator ran out of memory. Only CUDA raises a dedicated class. On other devices, the message is checked."""
    return isinstance(error, torch.OutOfMemoryError) or errors.is_out_of_memory(error)


def check_training_state(recipe: Recipe, vocab_size: int, device: torch.device, world_size: int) -> None:
    """Raise `InputError` if weights, gradients and optimizer state cannot fit into memory. The network is not allocated.

    The optimizer state is included only if its size can be estimated for the architecture.
    """
    if has_estimates(recipe.model):
        costs = estimate_memory(recipe, vocab_size, 1)
        needed = costs.weights + costs.gradients + costs.optimizer
    else:
        network = registry.build_without_weights(recipe.model, vocab_size, objective=recipe.objective)
        needed = 2 * _BYTES_PER_PARAMETER * network.parameter_count()
    available = _total_memory(device, world_size)
    if needed > available:
        sizes = f"at least {needed / 1e9:,.1f} GB of memory, but only {available / 1e9:,.1f} GB are available"
        hint = "use a smaller model, or a device with more memory"
        raise InputError(f"weights, gradients and optimizer state need {sizes}", where="model", hint=hint)


def _total_memory(device: torch.device, world_size: int) -> int:
    """Return the bytes of memory for the training state: on this machine, or on one GPU per process."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) * world_size
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return host_memory_bytes()


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
    """Return the largest divisor of `sequences` that is at most half the micro-batch size.

    `sequences` is the size of a process's share of the batch.
    """
    return next(size for size in range(micro_batch_size // 2, 0, -1) if sequences % size == 0)
