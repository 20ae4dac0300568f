"""Read text from any SOURCE as a stream of document pieces. Memory use does not grow with the size of the text.

A SOURCE is a file (text, .jsonl, .csv, .tsv or .parquet; all except .parquet may be compressed), a folder, a glob, a URL, `-` for
standard input, `builtin:NAME`, or `hf:DATASET[/CONFIGURATION][:SPLIT]`. A document is a text file, a line of a .jsonl file, a row
of a table or dataset, or an entry in a built-in corpus. Text is decoded without changes: line endings, NULs and byte order marks
are kept. Bytes that are not UTF-8 raise an error with their position, or are replaced if requested.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tinylm.errors import InputError, missing_extra, missing_filesystem
from tinylm.file_kinds import is_prepared_text
from tinylm.paths import cache_folder, name_write_errors, temporary_folder
from tinylm.text import builtin
from tinylm.text.cutting import cut_into_pieces
from tinylm.text.files import (
    BLOCK_BYTES,
    TextFile,
    format_suffix,
    looks_like_text,
    not_utf8,
    open_bytes,
    read_lines,
    read_text,
    refuse_binary,
)
from tinylm.text.records import DEFAULT_FIELD, RECORD_SUFFIXES, TABLE_SUFFIXES, RecordFormat, table_rows

_HUB = "hf:"
"""The prefix of sources from the `datasets` library. It is also the `TextFile.suffix` of these sources."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous part of one document."""

    text: str
    starts_document: bool


class Corpus:
    """The documents of one or more SOURCEs. They can be read repeatedly, with the same result each time.

    Standard input, pipes and remote files are copied to a temporary folder when they are opened. The folder is removed by `close`
    or at the end of a `with` block. `field` is the .jsonl field or the column that contains the text, and `template` combines
    several fields or columns. Bytes that are not UTF-8 are an error if `errors` is `strict`, and become U+FFFD if `errors` is
    `replace`.

    Raises `InputError` if a source does not exist, cannot be opened, or contains no text. It is also raised if `field` or
    `template` is set but no source has fields, unless `allow_unused_format` is true.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        field: str = DEFAULT_FIELD,
        template: str | None = None,
        errors: str = "strict",
        allow_unused_format: bool = False,
        record_format: RecordFormat | None = None,
    ) -> None:
        """`record_format` replaces `field` and `template`."""
        self.sources = tuple(sources)
        self.record_format = record_format or RecordFormat(field, template, errors)
        self.errors = errors
        self.skipped: list[str] = []
        """Files in folders that were skipped because they are not text."""
        self._temporary = ExitStack()
        self._folder: Path | None = None
        self._datasets: dict[str, Any] = {}
        try:
            self._files = [file for source in sources for file in self._open_source(source)]
            if not allow_unused_format:
                require_used_format([self])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._temporary.close()
        self._folder = None

    @property
    def has_records(self) -> bool:
        """Whether any document is a record with fields. Otherwise, every document is a whole file."""
        return any(file.suffix in (*RECORD_SUFFIXES, _HUB) for file in self._files)

    def pieces(self, *, keep_empty: bool = False) -> Iterator[Piece]:
        """Yield all documents in order, in pieces of at most `MAX_PIECE_CHARACTERS` characters.

        Empty documents are skipped. With `keep_empty`, each is yielded as one empty piece.
        """
        for file in self._files:
            yield from self._pieces(file, keep_empty)

    def files(self) -> Iterator[tuple[str, Iterator[Piece]]]:
        """Yield the name and the pieces of each file, remote object, dataset or built-in corpus, in order."""
        for file in self._files:
            yield file.name, self._pieces(file)

    def documents(self) -> Iterator[tuple[str, bool, str]]:
        """Yield (file name, whether the document is a record, text) for each document, including empty documents."""
        for file in self._files:
            for document in self._documents(file):
                yield file.name, file.suffix in (*RECORD_SUFFIXES, _HUB), "".join(document)

    def _pieces(self, file: TextFile, keep_empty: bool = False) -> Iterator[Piece]:
        for document in self._documents(file):
            starts_document = True
            for text in cut_into_pieces(document):
                yield Piece(text, starts_document)
                starts_document = False
            if starts_document and keep_empty:
                yield Piece("", True)

    # Opening sources

    def _open_source(self, source: str) -> Iterator[TextFile]:
        if source == "-":
            yield self._copy("-", sys.stdin.buffer)
        elif source.startswith("builtin:"):
            yield TextFile(source, str(builtin.path_of(source.removeprefix("builtin:"))), ".jsonl")
        elif source.startswith(_HUB):
            yield self._open_dataset(source)
        elif source.startswith("imported:"):  # the source in the recipe of an imported model
            raise InputError("the training text of an imported model is not available", where=source, hint="use a text of your own")
        elif "://" in source:
            yield self._open_url(source)
        else:
            yield from self._open_path(source)

    def _open_path(self, source: str) -> Iterator[TextFile]:
        path = os.path.expanduser(source)
        files = files_of(source)
        if os.path.isdir(path):
            if is_prepared_text(path):
                hint = "it can only be the single source of data.train in a recipe with format text"
                raise InputError("is a folder with tokens that `tinylm prepare` wrote, not text", where=source, hint=hint)
            texts = [file for file in files if format_suffix(file) == ".parquet" or looks_like_text(file)]
            self.skipped += sorted(set(files) - set(texts))
            if not texts:
                detail = "; it contains only files that are not text" if files else ""
                raise InputError(f"no text in this folder{detail}", where=source)
        elif os.path.exists(path) and not os.path.isfile(path):  # a named pipe, which can be read only once
            with open(path, "rb") as stream:
                yield self._copy(source, stream)
            return
        elif not files:
            raise InputError("no such file or folder", where=source)
        else:
            texts = files
        for path in texts:
            file = TextFile.at(path, name=path)
            refuse_binary(file)
            yield file

    def _copy(self, name: str, stream: IO[bytes]) -> TextFile:
        """Copy a stream that can be read only once to a temporary file."""
        if self._folder is None:
            self._folder = self._temporary.enter_context(temporary_folder(cache_folder("spool"), "copy"))
        suffix = "".join(Path(name).suffixes[-2:])
        handle, path = tempfile.mkstemp(suffix=suffix, dir=self._folder)
        with name_write_errors(self._folder), open(handle, "wb") as file:
            shutil.copyfileobj(stream, file, BLOCK_BYTES)
        copy = TextFile.at(path, name=name)
        refuse_binary(copy)
        return copy

    def _open_url(self, source: str) -> TextFile:
        import fsspec

        try:
            with fsspec.open(source, "rb") as stream:
                return self._copy(_without_query(source), stream)
        except ImportError as error:
            raise missing_filesystem(source, error) from None
        except Exception as error:  # the library of each protocol has its own exceptions
            raise InputError(f"cannot be read: {error or type(error).__name__}", where=source) from None

    def _open_dataset(self, source: str) -> TextFile:
        """Load `hf:DATASET[/CONFIGURATION][:SPLIT]`, where DATASET may be a folder. `datasets` caches the rows on disk."""
        try:
            import datasets
        except ImportError:
            raise missing_extra("datasets", "reading hf: sources") from None
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        name, _, split = source.removeprefix(_HUB).partition(":")
        parts = name.split("/")
        configuration = parts.pop() if len(parts) == 3 and not os.path.exists(name) else None
        try:
            dataset = datasets.load_dataset("/".join(parts), configuration, split=split or "train")
        except Exception as error:  # `datasets` passes on the exceptions of many libraries
            raise InputError(f"cannot be read: {str(error).strip() or type(error).__name__}", where=source) from None
        self._datasets[source] = dataset
        return TextFile(source, source, _HUB)

    # Reading documents

    def _documents(self, file: TextFile) -> Iterator[Iterable[str]]:
        """Yield each document as an iterable of strings."""
        if file.suffix == _HUB:
            yield from ([text] for text in self._dataset_rows(file))
            return
        if file.suffix == ".parquet":
            yield from ([text] for text in self._parquet_rows(file))
            return
        with open_bytes(file) as stream:
            if file.suffix == ".jsonl":
                yield from ([text] for text in self._json_lines(file, stream))
            elif file.suffix in TABLE_SUFFIXES:
                rows = table_rows(file, stream, self.record_format)
                yield from ([self.record_format.text(row, where)] for row, where in rows)
            else:
                yield read_text(file.name, stream, self.errors)

    def _dataset_rows(self, file: TextFile) -> Iterator[str]:
        dataset = self._datasets[file.name]
        self.record_format.check_columns(dataset.column_names, file.name)
        for number, row in enumerate(dataset.select_columns(self.record_format.fields), 1):
            yield self.record_format.text(row, f"{file.name} row {number}")

    def _json_lines(self, file: TextFile, stream: IO[bytes]) -> Iterator[str]:
        offset = 0
        for number, line in enumerate(read_lines(file.name, stream), 1):
            if line.strip():
                try:
                    record = json.loads(line.decode("utf-8", self.errors).lstrip("\ufeff"))
                except UnicodeDecodeError as error:
                    raise not_utf8(file.name, offset + error.start) from None
                except (ValueError, RecursionError) as error:
                    raise InputError(f"not JSON: {error}", where=f"{file.name}:{number}") from None
                yield self.record_format.text(record, f"{file.name}:{number}")
            offset += len(line)

    def _parquet_rows(self, file: TextFile) -> Iterator[str]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise missing_extra("parquet", "reading .parquet files") from None
        try:
            table = pyarrow.parquet.ParquetFile(file.path)
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"not a Parquet file: {error}", where=file.name) from None
        with table:
            names = self.record_format.fields
            self.record_format.check_columns(table.schema_arrow.names, file.name)
            for row, values in enumerate(_columns(file.name, table, names), 1):
                where = f"{file.name} row {row}"
                try:
                    texts = [value.decode("utf-8", self.errors) if isinstance(value, bytes) else value for value in values]
                except UnicodeDecodeError as error:
                    raise not_utf8(where, error.start) from None
                yield self.record_format.text(dict(zip(names, texts, strict=True)), where)


def _columns(name: str, table: Any, fields: Sequence[str]) -> Iterator[tuple[object, ...]]:
    """Yield the values of each row of a Parquet file. Text is yielded as bytes, because Parquet files may contain invalid UTF-8."""
    import pyarrow

    def values(column: Any) -> list[object]:
        is_text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
        listed: list[object] = (column.cast(pyarrow.large_binary()) if is_text else column).to_pylist()
        return listed

    try:
        for batch in table.iter_batches(batch_size=256, columns=list(fields)):
            yield from zip(*(values(batch.column(batch.schema.get_field_index(field))) for field in fields), strict=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"the file is damaged or truncated: {error}", where=name) from None


def _without_query(url: str) -> str:
    """Remove the query from an HTTP URL, because it is not part of the file name."""
    return url.partition("?")[0] if url.startswith(("http://", "https://")) else url


def _glob(pattern: str) -> list[str]:
    """Return the paths that match a pattern. `**` visits each folder once, even if several symlinks point to it."""
    parts = pattern.replace(os.sep, "/").split("/")
    if "**" not in parts:
        return glob.glob(pattern)
    index = parts.index("**")
    head, tail = "/".join(parts[:index]), "/".join(parts[index + 1 :]) or "*"
    roots = glob.glob(head) if head else ["/" if index else ""]
    folders = _folders(roots, set())
    return [found for folder in folders for found in _glob(os.path.join(glob.escape(folder), tail))]


def _folders(paths: Iterable[str], seen: set[str]) -> Iterator[str]:
    """Yield the folders among `paths` and their subfolders, except hidden ones. `seen` is the set of real paths visited so far."""
    for path in paths:
        real = os.path.realpath(path or ".")
        if real in seen or not os.path.isdir(real):
            continue
        seen.add(real)
        yield path
        with suppress(PermissionError):
            names = sorted(name for name in os.listdir(path or ".") if not name.startswith("."))
            yield from _folders((os.path.join(path, name) for name in names), seen)


def files_of(source: str) -> list[str]:
    """Return the paths of the files in a SOURCE that is a file, folder or glob. The list is empty if there are none."""
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return list(_walk(path))
    if os.path.exists(path):
        return [path]
    found = [file for file in sorted(_glob(path)) if os.path.isfile(file)]
    # The pattern may match a file more than once through symlinks.
    return list({os.path.realpath(file): file for file in reversed(found)}.values())[::-1]


def is_missing(source: str) -> bool:
    """Whether a SOURCE is the path of a file or folder, or a glob, but no such file or folder exists."""
    is_path = source != "-" and "://" not in source and not source.startswith(("builtin:", "imported:", _HUB))
    return is_path and not os.path.exists(os.path.expanduser(source)) and not files_of(source)


def _walk(folder: str) -> Iterator[str]:
    """Yield the files in a folder and its subfolders in sorted order. Empty files, hidden files and hidden folders are skipped."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (os.path.join(parent, name) for name in sorted(files) if not name.startswith("."))
        yield from (path for path in paths if os.path.isfile(path) and os.path.getsize(path))  # pipes and broken links are no files


def require_used_format(corpora: Sequence[Corpus]) -> None:
    """Raise `InputError` if a field or template is set, but the documents of all corpora are whole files."""
    record_format = corpora[0].record_format
    if record_format.is_default or any(corpus.has_records for corpus in corpora):
        return
    key = "field" if record_format.template is None else "template"
    raise InputError(
        f"--{key} (data.{key}) has no effect on plain text",
        where=describe([source for corpus in corpora for source in corpus.sources]),
        hint=f"remove it: only {', '.join(RECORD_SUFFIXES)} files and hf: datasets have fields",
    )


def describe(sources: Sequence[str]) -> str:
    """Return a short description of the sources for messages."""
    return ", ".join(sources) if len(sources) <= 3 else f"{sources[0]} and {len(sources) - 1} more"
