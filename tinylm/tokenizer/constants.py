"""Constants that the NumPy code shares with its numba counterpart in `kernels`."""

from __future__ import annotations

import numpy as np

HASH_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9))
"""2**64 divided by the golden ratio, and two primes from xxHash64. Multiplying by them spreads keys over a hash table."""
PACKED_WORDS = 3
"""A chunk of at most `8 * PACKED_WORDS` bytes is packed into this many 64-bit integers."""
PAIR_SHIFT = 24
"""A pair of token ids is stored as one integer key: `left << PAIR_SHIFT | right`."""
