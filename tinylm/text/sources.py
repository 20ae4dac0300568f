"""Text from anywhere, as a stream: SOURCE notation in, pieces of documents out, in memory that does not grow with the text.

A plain text file is one document, as is each line of a .jsonl, each row of a .parquet or a dataset and each entry of a builtin. A
long document comes in several pieces, cut where a word ends so that no tokenizer pattern reaches across the cut. Bytes are
decoded as they are: line endings, NULs and marks survive; bytes that are not UTF-8 are an error that names the place.
"""

from __future__ import annotations

import codecs
import glob
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from tinylm.errors import InputError, need_extra
from tinylm.paths import cache_folder
from tinylm.text import builtin

BLOCK_BYTES = 1 << 20
PIECE_CHARACTERS = 1 << 18
LONGEST_PIECE = 4 * PIECE_CHARACTERS
_HUB = "hf:"
"""In place of a suffix, for what the library `datasets` holds."""
_COMPRESSIONS = {".gz": "gzip", ".xz": "xz", ".bz2": "bz2", ".zst": "zstd"}


@dataclass(frozen=True, slots=True)
class Piece:
    """Some consecutive text of one document."""

    text: str
    starts_document: bool


@dataclass(frozen=True)
class _Entry:
    """One file, remote object or builtin; `name` is what error messages call it."""

    name: str
    path: str
    suffix: str
    compression: str | None = None


class Corpus:
    """The documents of one or several SOURCEs, readable as often as needed with the same answer each time.

    Standard input and remote sources are copied to a temporary file once, on opening. Use it as a context manager, or
    call `close`, to remove those. Raises `InputError` for a source that is not there, cannot be opened, or holds no text.
    """

    def __init__(self, sources: Sequence[str], *, field: str = "text", errors: str = "strict") -> None:
        self.sources = tuple(sources)
        self.field = field
        self.errors = errors
        self.skipped: list[str] = []
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._datasets: dict[str, Any] = {}
        try:
            self._entries = [entry for source in sources for entry in self._expand(source)]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def pieces(self) -> Iterator[Piece]:
        """Every document in order, each cut into pieces of at most `LONGEST_PIECE` characters; empty ones left out."""
        for _, pieces in self.files():
            yield from pieces

    def files(self) -> Iterator[tuple[str, Iterator[Piece]]]:
        """(name, its pieces) for every file, remote object or builtin, in order."""
        for entry in self._entries:
            yield entry.name, self._pieces(entry)

    def _pieces(self, entry: _Entry) -> Iterator[Piece]:
        for document in self._documents(entry):
            starts = True
            for text in _cut(document):
                yield Piece(text, starts)
                starts = False

    def _expand(self, source: str) -> Iterator[_Entry]:
        if source == "-":
            yield self._from_stdin()
        elif source.startswith("builtin:"):
            name = source.removeprefix("builtin:")
            yield _Entry(source, str(builtin.path_of(name)), ".jsonl")
        elif source.startswith("hf:"):
            yield self._from_hub(source)
        elif source.startswith("imported:"):  # what the recipe of an imported model says
            raise InputError("the text that an imported model learned is not here", where=source, hint="name a text of your own")
        elif "://" in source:
            yield self._from_url(source)
        else:
            yield from self._from_disk(source)

    def _from_disk(self, source: str) -> Iterator[_Entry]:
        path = os.path.expanduser(source)
        if os.path.isdir(path):
            found = list(_walk(path))
            texts = [file for file in found if _suffix(file) == ".parquet" or _looks_like_text(file)]
            self.skipped += sorted(set(found) - set(texts))
            if not texts:
                skipped = f": {len(found)} files that are not text" if found else ""
                raise InputError(f"no text in this folder{skipped}", where=source)
        elif os.path.isfile(path):
            texts = [path]
        elif os.path.exists(path):  # a pipe, which gives its text only once
            with open(path, "rb") as stream:
                yield self._spool(source, stream)
            return
        else:
            texts = [file for file in sorted(glob.glob(path, recursive=True)) if os.path.isfile(file)]
            if not texts:
                raise InputError("no such file or folder", where=source)
        for file in texts:
            yield _entry(file, file)

    def _spool(self, name: str, stream: IO[bytes]) -> _Entry:
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="spool-", dir=cache_folder("spool"))
        suffix = "".join(Path(name).suffixes[-2:])
        handle, path = tempfile.mkstemp(suffix=suffix, dir=self._temporary.name)
        with open(handle, "wb") as file:
            shutil.copyfileobj(stream, file, BLOCK_BYTES)
        return _entry(name, path)

    def _from_stdin(self) -> _Entry:
        return self._spool("-", sys.stdin.buffer)

    def _from_url(self, source: str) -> _Entry:
        import fsspec

        try:
            with fsspec.open(source, "rb") as stream:
                return self._spool(_without_query(source), stream)
        except ImportError as error:
            raise need_extra("remote", f"reading {source.partition('://')[0]}:// addresses ({error})") from None
        except Exception as error:  # each protocol's library raises classes of its own
            raise InputError(f"cannot be read: {error or type(error).__name__}", where=source) from None

    def _from_hub(self, source: str) -> _Entry:
        """`hf:DATASET[/CONFIGURATION][:split]`; DATASET may be a folder. The rows stay where `datasets` keeps them."""
        try:
            import datasets
        except ImportError:
            raise need_extra("datasets", "reading hf: sources") from None
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        name, _, split = source.removeprefix("hf:").partition(":")
        parts = name.split("/")
        configuration = parts.pop() if len(parts) == 3 and not os.path.exists(name) else None
        try:
            found = datasets.load_dataset("/".join(parts), configuration, split=split or "train")
        except Exception as error:  # of many libraries
            raise InputError(f"cannot be read: {str(error).strip() or type(error).__name__}", where=source) from None
        self._datasets[source] = found
        return _Entry(source, source, _HUB)

    def _rows(self, entry: _Entry) -> Iterator[str]:
        found = self._datasets[entry.name]
        if self.field in found.column_names:
            found = found.select_columns([self.field])
        for number, row in enumerate(found, 1):
            yield self._field_of(row, f"{entry.name} row {number}")

    def _documents(self, entry: _Entry) -> Iterator[Iterable[str]]:
        """Each document as an iterable of strings."""
        if entry.suffix == _HUB:
            yield from ([text] for text in self._rows(entry))
            return
        if entry.suffix == ".parquet":
            yield from ([text] for text in self._parquet(entry))
            return
        with _opened(entry) as stream:
            if entry.suffix == ".jsonl":
                yield from ([text] for text in self._json_lines(entry, stream))
            else:
                yield _decoded(entry.name, stream, self.errors)

    def _json_lines(self, entry: _Entry, stream: IO[bytes]) -> Iterator[str]:
        offset = 0
        for number, line in enumerate(_lines(entry.name, stream), 1):
            if line.strip():
                try:
                    record = json.loads(line.decode("utf-8", self.errors).lstrip("\ufeff"))
                except UnicodeDecodeError as error:
                    raise _not_utf8(entry.name, offset + error.start) from None
                except (ValueError, RecursionError) as error:
                    raise InputError(f"not JSON: {error}", where=f"{entry.name}:{number}") from None
                yield self._field_of(record, f"{entry.name}:{number}")
            offset += len(line)

    def _field_of(self, record: object, where: str) -> str:
        text = record.get(self.field) if isinstance(record, dict) else None
        if isinstance(record, dict) and self.field in record and not isinstance(text, str):
            raise InputError(f"field {self.field!r} holds {json.dumps(text, default=str)[:40]}, which is not text", where=where)
        if not isinstance(text, str):
            known = ", ".join(map(str, record)) if isinstance(record, dict) else "it is not an object"
            raise InputError(
                f"no text in field {self.field!r} ({known})", where=where, hint="name the field with --field or data.field"
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            if self.errors == "strict":
                raise InputError(
                    "half of a surrogate pair, which is not text", where=where, hint="--errors replace reads it as U+FFFD"
                )
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    def _parquet(self, entry: _Entry) -> Iterator[str]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise need_extra("parquet", "reading .parquet files") from None
        try:
            file = pyarrow.parquet.ParquetFile(entry.path)
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"not a Parquet file: {error}", where=entry.name) from None
        with file:
            if self.field not in file.schema_arrow.names:
                raise InputError(
                    f"no column {self.field!r} ({', '.join(file.schema_arrow.names)})",
                    where=entry.name,
                    hint="name the column with --field or data.field",
                )
            for row, value in enumerate(_column(entry.name, file, self.field), 1):
                where = f"{entry.name} row {row}"
                try:
                    text = value.decode("utf-8", self.errors) if isinstance(value, bytes) else value
                except UnicodeDecodeError as error:
                    raise _not_utf8(where, error.start) from None
                yield self._field_of({self.field: text}, where)


def _column(name: str, file: Any, field: str) -> Iterator[object]:
    """The values of a Parquet column, text as bytes: nothing promises that it is UTF-8."""
    import pyarrow

    try:
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            column = batch.column(0)
            if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                column = column.cast(pyarrow.large_binary())
            yield from column.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"cannot be read to its end: {error}", where=name) from None


def _without_query(address: str) -> str:
    """A web address up to its `?`: what stands behind is no part of the file's name."""
    return address.partition("?")[0] if address.startswith(("http://", "https://")) else address


def _entry(name: str, path: str) -> _Entry:
    suffix = os.path.splitext(path)[1].lower()
    return _Entry(name, path, _suffix(path), _COMPRESSIONS.get(suffix))


def _suffix(path: str) -> str:
    """The suffix that tells the format, below any compression."""
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in _COMPRESSIONS else suffix


def _walk(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (os.path.join(parent, name) for name in sorted(files) if not name.startswith("."))
        yield from filter(os.path.isfile, paths)  # not pipes, nor links that lead nowhere


def _looks_like_text(path: str) -> bool:
    if os.path.splitext(path)[1].lower() in _COMPRESSIONS:
        return _suffix(path) in (".txt", ".md", ".jsonl")
    with _opened(_entry(path, path)) as file:
        start = file.read(8192)
    if not start or b"\0" in start:
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return True


def _opened(entry: _Entry) -> IO[bytes]:
    try:
        if entry.compression is None:
            return open(entry.path, "rb")
        if entry.compression == "zstd":
            return _zstd(entry.path)
        import fsspec

        stream: IO[bytes] = fsspec.open(entry.path, "rb", compression=entry.compression).open()
        return stream
    except OSError as error:
        raise InputError(error.strerror or "cannot be read", where=entry.name) from None


def _zstd(path: str) -> IO[bytes]:
    """Not through fsspec, whose reader may be one that takes a file cut short for a whole one."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise need_extra("zst", "reading .zst files") from None
    return cast(IO[bytes], zstd.ZstdFile(path, "rb"))


def _blocks(name: str, stream: IO[bytes]) -> Iterator[bytes]:
    """The stream block by block, with a damaged archive told as such."""
    while True:
        try:
            block = stream.read(BLOCK_BYTES)
        except Exception as error:  # each decompressor raises a class of its own
            raise InputError(f"cannot be read to its end: {error}", where=name) from None
        if not block:
            return
        yield block


def _lines(name: str, stream: IO[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in _blocks(name, stream):
        *lines, rest = (rest + block).split(b"\n") if rest else block.split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def _decoded(name: str, stream: IO[bytes], errors: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    offset = 0
    for block in _blocks(name, stream):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, offset - pending + error.start) from None
        offset += len(block)
        if text:
            yield text
    pending = len(decoder.getstate()[0])
    try:
        rest = decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(name, offset - pending + error.start) from None
    if rest:
        yield rest


def _not_utf8(name: str, offset: int) -> InputError:
    return InputError(
        f"not UTF-8 at byte {offset}", where=name, hint="data.errors: replace, or --errors replace, reads it as U+FFFD"
    )


def _cut(document: Iterable[str]) -> Iterator[str]:
    """Regroup a document into pieces that end where a word ends, or after `LONGEST_PIECE` characters without one.

    The cuts depend on the text alone, not on how it arrived, so that the same text always gives the same tokens.
    """
    held = io.StringIO()
    for part in document:
        held.write(part)
        if held.tell() >= PIECE_CHARACTERS:
            text = held.getvalue()
            start = 0
            while (end := _word_end(text, start)) is not None:
                yield text[start:end]
                start = end
            held = io.StringIO()
            held.write(text[start:])
    if rest := held.getvalue():
        start = 0
        while (end := _word_end(rest, start)) is not None:
            yield rest[start:end]
            start = end
        if start < len(rest):
            yield rest[start:]


def _word_end(text: str, start: int) -> int | None:
    """The first position from `start + PIECE_CHARACTERS` on where a space follows a character that is not white space.

    There, and only there, every split pattern in use begins a new token whatever comes before and after. None when the
    text has to grow before that can be decided.
    """
    position = start + PIECE_CHARACTERS
    limit = start + LONGEST_PIECE
    while True:
        position = text.find(" ", position, limit)
        if position < 0:
            return limit if len(text) > limit else None
        if not text[position - 1].isspace():
            return position
        position += 1


def describe(sources: Sequence[str]) -> str:
    """The sources as one short phrase for messages."""
    return ", ".join(sources) if len(sources) <= 3 else f"{sources[0]} and {len(sources) - 1} more"
