"""Generated sentence pairs for a first experiment: `toy:reverse` pairs letters with the same letters in reverse order."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator

_PAIRS = 20_000
_SHORTEST, _LONGEST = 3, 10
_LETTERS = string.ascii_lowercase[:16]
NAMES = ("reverse",)


def reversed_sequences() -> Iterator[tuple[str, str]]:
    """Yield 20,000 (letters, reversed letters) pairs. The pairs are the same in every call."""
    generator = random.Random(0)
    for _ in range(_PAIRS):
        letters = generator.choices(_LETTERS, k=generator.randint(_SHORTEST, _LONGEST))
        yield " ".join(letters), " ".join(reversed(letters))
