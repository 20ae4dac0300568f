"""How a token that is bytes is written as one word without spaces: GPT-2's map between bytes and printable characters."""

from __future__ import annotations

from functools import cache

from tinylm.tokenizer.splits import byte_level_table


@cache
def _characters() -> dict[int, str]:
    return {byte: character for character, byte in byte_level_table().items()}


def byte_mapped(raw: bytes) -> str:
    """b" the" -> "Ġthe": printable, without white space, and reversible."""
    characters = _characters()
    return "".join(characters[byte] for byte in raw)


def from_byte_mapped(name: str) -> bytes | None:
    """The bytes that a byte-mapped name stands for; None when it is not one."""
    table = byte_level_table()
    return bytes(table[character] for character in name) if all(character in table for character in name) else None
