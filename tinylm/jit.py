"""Compile functions with numba. Importing numba takes half a second, so import this module only where it is needed.

`tinylm.native` loads functions that were compiled earlier without importing numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, njit, types
from numba.extending import intrinsic


def cached_njit(**options: Any) -> Callable[[Any], Any]:
    """Return a decorator like `numba.njit` that caches the machine code on disk if numba finds a writable folder."""

    def decorate(function: Any) -> Any:
        settings = {"nogil": True, "error_model": "numpy", **options}
        try:
            return njit(cache=True, **settings)(function)
        except RuntimeError:  # no writable folder: compile again in every process
            return njit(**settings)(function)

    return decorate


def pointer_cast(dtype: Any) -> Any:
    """Return a compiled function (address) that casts an address to a pointer to elements of a NumPy type, such as records."""
    pointer = types.CPointer(from_dtype(np.dtype(dtype)))

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    @intrinsic
    def cast(context: Any, address: Any) -> Any:
        return pointer(types.int64), emit

    return cast


@intrinsic
def call_address(context: Any, address: Any, argument: Any) -> Any:
    """Call the C function `void function(void *argument)` at an address, given the argument's address."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        function = builder.inttoptr(arguments[0], ir.FunctionType(ir.VoidType(), [pointer]).as_pointer())
        builder.call(function, [builder.inttoptr(arguments[1], pointer)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit
