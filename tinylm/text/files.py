"""Read plain or compressed files (.gz, .xz, .bz2, .zst) as bytes, lines or UTF-8 text, block by block."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, cast

from tinylm.errors import InputError, is_out_of_memory, missing_extra

BLOCK_BYTES = 1 << 20
COMPRESSIONS = {".gz": "gzip", ".xz": "xz", ".bz2": "bz2", ".zst": "zstd"}
"""fsspec's compression name for each file suffix."""
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".log", ".html", ".csv", ".tsv", ".jsonl", ".parquet", ".py")
"""Suffixes of files that contain text to train on, not a recipe."""
_SIGNATURES = (
    (b"\x89PNG", "a PNG image", "choose a text file"),
    (b"\xff\xd8\xff", "a JPEG image", "choose a text file"),
    (b"GIF8", "a GIF image", "choose a text file"),
    (b"BM", "a BMP image", "choose a text file"),
    (b"II*\0", "a TIFF image", "choose a text file"),
    (b"MM\0*", "a TIFF image", "choose a text file"),
    (b"RIFF", "an audio, video or WebP file", "choose a text file"),
    (b"ID3", "an MP3 file", "choose a text file"),
    (b"OggS", "an Ogg file", "choose a text file"),
    (b"fLaC", "a FLAC file", "choose a text file"),
    (b"\x1aE\xdf\xa3", "a video", "choose a text file"),
    (b"%PDF", "a PDF document", "convert it to text first, for example with pdftotext"),
    (b"PK\x03\x04", "a ZIP archive, or a document such as .docx, .xlsx or .epub", "unpack it, or save it as plain text"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "save it as plain text"),
    (b"\x1f\x8b", "gzip-compressed", "add .gz to the file name"),
    (b"\xfd7zXZ", "xz-compressed", "add .xz to the file name"),
    (b"BZh", "bzip2-compressed", "add .bz2 to the file name"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "add .zst to the file name"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "unpack it"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"\x7fELF", "a program", "choose a text file"),
    (b"MZ", "a Windows program", "choose a text file"),
    (b"SQLite format 3", "an SQLite database", "export a table as CSV"),
    (b"PAR1", "a Parquet file", "rename it so that the name ends in .parquet"),
    (b"GGUF", "a GGUF model", "choose a text file"),
    (b"\xff\xfe", "UTF-16 text", "convert it with: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "convert it with: iconv -f UTF-16 -t UTF-8"),
)
"""(first bytes of a file that is not UTF-8 text, what the file is, what to do)."""


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
        """Return the file at `path`. The suffixes of the path determine the format and the compression."""
        return cls(name, path, format_suffix(path), COMPRESSIONS.get(os.path.splitext(path)[1].lower()))


def format_suffix(path: str) -> str:
    """Return the suffix that determines the format, for example `.jsonl` for `a.jsonl.gz`."""
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSIONS else suffix


def looks_like_text(path: str) -> bool:
    """Return whether a file begins with UTF-8 text or is a compressed .txt, .md, .jsonl, .csv or .tsv file."""
    if os.path.splitext(path)[1].lower() in COMPRESSIONS:
        return format_suffix(path) in (".txt", ".md", ".jsonl", ".csv", ".tsv")
    with open_bytes(TextFile.at(path, path)) as file:
        start = file.read(8192)
    if not start or b"\0" in start:
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return True


def refuse_binary(file: TextFile) -> None:
    """Raise `InputError` if an uncompressed file has a known format that is not text, for example an image format."""
    if file.compression is not None or file.suffix == ".parquet" or looks_like_text(file.path):
        return
    with open_bytes(file) as stream:
        start = stream.read(16)
    for signature, kind, hint in _SIGNATURES:
        if start.startswith(signature):
            raise InputError(f"is {kind}, not UTF-8 text", where=file.name, hint=hint)


def open_bytes(file: TextFile) -> IO[bytes]:
    """Open a file and decompress it while reading. Raises `InputError` if it cannot be opened."""
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
    """Yield the stream in blocks. Raises `InputError` if a compressed file is damaged or truncated."""
    while True:
        try:
            block = stream.read(BLOCK_BYTES)
        except Exception as error:  # each decompressor has its own exceptions
            if is_out_of_memory(error):
                raise
            raise InputError(f"the file is damaged or truncated: {error}", where=name) from None
        if not block:
            return
        yield block


def text_lines(text: str) -> list[str]:
    """Split a text at line feeds, with or without a preceding carriage return. Other separators, such as U+2028, remain."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def read_lines(name: str, stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a stream with their line feeds."""
    rest = b""
    for block in _read_blocks(name, stream):
        *lines, rest = (rest + block).split(b"\n") if rest else block.split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def read_text(name: str, stream: IO[bytes], errors: str) -> Iterator[str]:
    """Decode a stream block by block. If `errors` is `strict`, raises `InputError` with the offset of the first invalid byte."""
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
