"""When the tokenizer's inner loops run as machine code: where numba is installed and there is enough text to pay for loading it."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

ENOUGH = 8 << 20
"""Bytes that a process reads before it loads the loops, which takes half a second, or some ten the first time on a machine."""
_MODULE = "tinylm.tokenizer.kernels"
_read = 0


def kernels(size: int) -> Any | None:
    """`tinylm.tokenizer.kernels` for `size` more bytes of text, or None: do it in arrays, with the same result."""
    global _read
    if _MODULE in sys.modules:
        return sys.modules[_MODULE]
    _read += size
    if _read < ENOUGH or find_spec("numba") is None:
        return None
    from tinylm.tokenizer import kernels as loops

    return loops
