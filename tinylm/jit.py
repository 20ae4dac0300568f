"""Functions compiled by numba. To be imported only where numba is wanted: it is an extra."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Any], Any]:
    """A decorator: compiled at the first call and kept on the disk, or for this process where no folder can be written to."""

    def decorate(function: Any) -> Any:
        settings = {"nogil": True, "error_model": "numpy", **options}
        try:
            return njit(cache=True, **settings)(function)
        except RuntimeError:
            return njit(**settings)(function)

    return decorate
