"""Decides whether to run the numba loops of `tinylm.tokenizer.kernels` or the equivalent NumPy code.

Loading the loops takes about half a second, and about ten seconds the first time on a machine, when numba compiles them.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

MIN_BYTES = 8 << 20
"""Bytes of text that a process must have read before loading the kernels pays off."""
bytes_read = 0
"""Bytes of text that this process has read so far."""
_MODULE = "tinylm.tokenizer.kernels"


def kernels_if_worthwhile(n_bytes: int) -> Any | None:
    """Count `n_bytes` more bytes of text as read and return the `kernels` module if it is, or should now be, loaded.

    None means that the caller should use the NumPy code, which gives the same result. Without numba it is always None.
    """
    global bytes_read
    if _MODULE in sys.modules:
        return sys.modules[_MODULE]
    bytes_read += n_bytes
    if bytes_read < MIN_BYTES or find_spec("numba") is None:
        return None
    from tinylm.tokenizer import kernels

    return kernels
