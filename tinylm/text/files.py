"""Read plain or compressed files (.gz, .xz, .bz2, .zst) as bytes, lines or UTF-8 text, block by block."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, cast

from tinylm.errors import InputError, missing_extra

BLOCK_BYTES = 1 << 20
COMPRESSIONS = {".gz": "gzip", ".xz": "xz", ".bz2": "bz2", ".zst": "zstd"}
"""fsspec's compression name for each file suffix."""


@dataclass(frozen=True)
class TextFile:
    """A file or remote object. It is read from `path`; error messages use `name`."""

    name: str
    path: str
    suffix: str
    """The suffix of the format, without the suffix of the compression."""
    compression: str | None = None

    @classmethod
    def at(cls, path: str, name: str) -> TextFile:
        """The file at `path`. Its suffixes determine the format and compression."""
        return cls(name, path, format_suffix(path), COMPRESSIONS.get(os.path.splitext(path)[1].lower()))


def format_suffix(path: str) -> str:
    """Return the suffix that determines the format, for example `.jsonl` for `a.jsonl.gz`."""
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSIONS else suffix


def looks_like_text(path: str) -> bool:
    """Return whether a file begins with UTF-8 text, or is a compressed .txt, .md or .jsonl file."""
    if os.path.splitext(path)[1].lower() in COMPRESSIONS:
        return format_suffix(path) in (".txt", ".md", ".jsonl")
    with open_bytes(TextFile.at(path, path)) as file:
        start = file.read(8192)
    if not start or b"\0" in start:
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return True


def open_bytes(file: TextFile) -> IO[bytes]:
    """Open a file for reading its decompressed bytes. Raises `InputError` if it cannot be opened."""
    try:
        if file.compression is None:
            return open(file.path, "rb")
        if file.compression == "zstd":
            return _open_zstd(file.path)
        import fsspec

        stream: IO[bytes] = fsspec.open(file.path, "rb", compression=file.compression).open()
        return stream
    except OSError as error:
        raise InputError(error.strerror or "cannot be read", where=file.name) from None


def _open_zstd(path: str) -> IO[bytes]:
    """Open a .zst file. fsspec is not used because some of the readers it may choose do not detect truncated files."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise missing_extra("zst", "reading .zst files") from None
    return cast(IO[bytes], zstd.ZstdFile(path, "rb"))


def _read_blocks(name: str, stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the stream in blocks. Raises `InputError` for a damaged or truncated archive."""
    while True:
        try:
            block = stream.read(BLOCK_BYTES)
        except Exception as error:  # each decompressor has its own exceptions
            raise InputError(f"the file is damaged or truncated: {error}", where=name) from None
        if not block:
            return
        yield block


def read_lines(name: str, stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a stream with their line feeds."""
    rest = b""
    for block in _read_blocks(name, stream):
        *lines, rest = (rest + block).split(b"\n") if rest else block.split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def read_text(name: str, stream: IO[bytes], errors: str) -> Iterator[str]:
    """Yield a stream as text. If `errors` is `strict`, raises `InputError` with the offset of the first invalid byte."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    offset = 0
    for block in _read_blocks(name, stream):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            raise not_utf8(name, offset - pending + error.start) from None
        offset += len(block)
        if text:
            yield text
    pending = len(decoder.getstate()[0])
    try:
        rest = decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise not_utf8(name, offset - pending + error.start) from None
    if rest:
        yield rest


def not_utf8(where: str, offset: int) -> InputError:
    """Create the error for text that is not UTF-8."""
    hint = "use --errors replace, or set data.errors to replace, to decode such bytes as U+FFFD"
    return InputError(f"not UTF-8 at byte {offset}", where=where, hint=hint)
