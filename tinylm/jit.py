"""Compile functions with numba, an optional dependency. Check that it is installed before importing this module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def cached_njit(**options: Any) -> Callable[[Any], Any]:
    """Return a decorator like `numba.njit` that caches the machine code on disk if numba finds a writable folder."""

    def decorate(function: Any) -> Any:
        settings = {"nogil": True, "error_model": "numpy", **options}
        try:
            return njit(cache=True, **settings)(function)
        except RuntimeError:  # no writable folder: compile again in every process
            return njit(**settings)(function)

    return decorate
