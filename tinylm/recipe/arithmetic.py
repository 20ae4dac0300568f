"""Integer arithmetic for recipe checks."""

from __future__ import annotations

import math


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number in ascending order, in O(sqrt(number)) time."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})
