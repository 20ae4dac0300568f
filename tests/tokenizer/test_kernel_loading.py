"""A process loads the numba kernels once it has read enough text."""

from __future__ import annotations

import sys

import pytest

from tinylm.tokenizer import kernel_loading


def test_kernels_are_loaded_only_after_enough_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tinylm.tokenizer.kernels", raising=False)
    monkeypatch.setattr(kernel_loading, "bytes_read", 0)
    assert kernel_loading.kernels_if_worthwhile(kernel_loading.MIN_BYTES - 1) is None
    assert kernel_loading.kernels_if_worthwhile(1) is not None
