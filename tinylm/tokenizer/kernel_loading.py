"""Decide whether to run the numba loops in `tinylm.tokenizer.kernels` or the equivalent NumPy code.

Loading the loops takes about half a second. The first time on a machine, numba compiles them, which takes about ten seconds.
"""

from __future__ import annotations

import sys
from typing import Any

MIN_BYTES = 8 << 20
"""Bytes of text that a process must read before it is worthwhile to load the kernels."""
bytes_read = 0
"""Bytes of text that this process has read so far."""
_MODULE = "tinylm.tokenizer.kernels"


def kernels_if_worthwhile(n_bytes: int) -> Any | None:
    """Add `n_bytes` to the bytes read, and return the `kernels` module if it is loaded or worth loading now.

    If this returns None, the caller should use the equivalent NumPy code.
    """
    global bytes_read
    if _MODULE in sys.modules:
        return sys.modules[_MODULE]
    bytes_read += n_bytes
    if bytes_read < MIN_BYTES:
        return None
    from tinylm.tokenizer import kernels

    return kernels
