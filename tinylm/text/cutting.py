"""Cut a document into bounded pieces at positions where no split pattern of a tokenizer can match across the cut."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

MIN_PIECE_CHARACTERS = 1 << 18
"""All pieces of a document except the last have at least this many characters."""
MAX_PIECE_CHARACTERS = 4 * MIN_PIECE_CHARACTERS


def cut_into_pieces(document: Iterable[str]) -> Iterator[str]:
    """Regroup the parts of a document into pieces that end at a word boundary, or after `MAX_PIECE_CHARACTERS` characters.

    The cuts depend only on the text, not on how it is divided into parts, so the same text always has the same tokens.
    """
    buffer = io.StringIO()
    for part in document:
        buffer.write(part)
        if buffer.tell() >= MIN_PIECE_CHARACTERS:
            text = buffer.getvalue()
            start = 0
            while (end := _cut_position(text, start)) is not None:
                yield text[start:end]
                start = end
            buffer = io.StringIO()
            buffer.write(text[start:])
    if rest := buffer.getvalue():
        yield rest


def _cut_position(text: str, start: int) -> int | None:
    """Return the end of the piece that begins at `start`, or None if `text` does not contain the end.

    The end is the first position after `MIN_PIECE_CHARACTERS` where a space follows a character that is not whitespace. At such a
    position, every supported split pattern starts a new token, regardless of the text before and after.
    """
    position = start + MIN_PIECE_CHARACTERS
    limit = start + MAX_PIECE_CHARACTERS
    while True:
        position = text.find(" ", position, limit)
        if position < 0:
            return limit if len(text) > limit else None
        if not text[position - 1].isspace():
            return position
        position += 1
