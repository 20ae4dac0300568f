"""GPT-2's reversible map between bytes and printable characters, used by byte-level vocabularies.

Source: `bytes_to_unicode` in the code released with Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

from functools import cache


@cache
def bytes_to_unicode() -> dict[int, str]:
    """Map each byte to its character: the same code point for a printable byte, else a code point from U+0100 on.

    For example, the space (32) is written as `Ġ` and the line feed (10) as `Ċ`.
    """
    return {byte: character for character, byte in unicode_to_bytes().items()}


@cache
def unicode_to_bytes() -> dict[str, int]:
    """The inverse of `bytes_to_unicode`."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}
