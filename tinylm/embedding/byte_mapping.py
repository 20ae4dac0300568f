"""Represent a token's bytes as a printable string without whitespace, with GPT-2's mapping between bytes and characters."""

from __future__ import annotations

from tinylm.tokenizer.byte_level import bytes_to_unicode, unicode_to_bytes


def to_byte_mapped(raw: bytes) -> str:
    """Convert bytes to byte-mapped form: `b" the"` becomes `"Ġthe"`. The inverse is `from_byte_mapped`."""
    table = bytes_to_unicode()
    return "".join(table[byte] for byte in raw)


def from_byte_mapped(name: str) -> bytes | None:
    """Return the bytes of a byte-mapped name, or None if it contains a character that does not represent a byte."""
    table = unicode_to_bytes()
    return bytes(table[character] for character in name) if all(character in table for character in name) else None
