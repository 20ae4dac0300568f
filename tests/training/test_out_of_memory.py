"""Out-of-memory errors from real allocators are recognized, and freed memory is reused."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from tinylm.training.out_of_memory import is_out_of_memory, keep_freed_memory


def test_cpu_allocator_errors_are_recognized() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert not isinstance(caught.value, torch.OutOfMemoryError)
    assert is_out_of_memory(caught.value)


def test_gpu_allocator_errors_are_recognized() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"))


def test_other_errors_are_not_recognized() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(caught.value)


def test_freed_memory_is_not_kept_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False


COUNT_PAGE_FAULTS = """
import resource, sys, torch
from tinylm.training.out_of_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        tensors = [torch.ones(4 << 20) for _ in range(8)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
first = faults()
assert keep_freed_memory()
faults()
sys.exit(0 if faults() < first / 3 else f"{faults()} page faults, {first} before")
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="requires glibc")
def test_freed_memory_is_reused_without_new_page_faults() -> None:
    """Count page faults in a separate process."""
    result = subprocess.run([sys.executable, "-c", COUNT_PAGE_FAULTS], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
