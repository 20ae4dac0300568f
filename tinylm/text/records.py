"""Convert records (JSON objects or table rows) to the text of documents, and read tables in CSV and TSV format."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Literal

from tinylm.errors import InputError, did_you_mean
from tinylm.recipe.template import parse_template, template_problem
from tinylm.recipe.values import has_surrogates
from tinylm.text.files import TextFile, not_utf8, read_lines

DEFAULT_FIELD = "text"
TABLE_SUFFIXES = (".csv", ".tsv")
RECORD_SUFFIXES = (".jsonl", ".parquet", *TABLE_SUFFIXES)
"""Formats whose documents are records with fields. A document of any other format is a whole file."""
_FIELD_HINT = "choose one with --field, or several with --template; in a recipe, with data.field or data.template"
_TEMPLATE_HINT = "correct --template; in a recipe, data.template"


@dataclass(frozen=True)
class RecordFormat:
    """Converts a record to text: the value of `field`, or `template` with each field name in braces replaced with its value."""

    field: str = DEFAULT_FIELD
    template: str | None = None
    errors: str = "strict"
    """`strict` raises an error for unpaired surrogates. `replace` replaces them with U+FFFD."""

    def __post_init__(self) -> None:
        if self.template is not None:
            if self.field != DEFAULT_FIELD:
                raise InputError("field and template are mutually exclusive", hint=f"add {{{self.field}}} to the template instead")
            if problem := template_problem(self.template):
                raise InputError(problem, where="--template")

    @property
    def is_default(self) -> bool:
        return self.template is None and self.field == DEFAULT_FIELD

    @property
    def _hint(self) -> str:
        return _FIELD_HINT if self.template is None else _TEMPLATE_HINT

    @cached_property
    def _parts(self) -> list[tuple[str, str | None]]:
        """Each field of the template with the literal text before it. The field of the last pair is None."""
        return list(parse_template(str(self.template)))

    @cached_property
    def fields(self) -> list[str]:
        """The fields that a record must have, without duplicates."""
        return [self.field] if self.template is None else list(dict.fromkeys(name for _, name in self._parts if name is not None))

    def check_columns(self, columns: list[str], where: str, *, header: bool = False) -> None:
        """Raise `InputError` if a table lacks a required column, or has it more than once.

        `header` means that the columns are the values in the first line of a file.
        """
        for name in self.fields:
            if name not in columns:
                listed = ", ".join(map(str, columns))
                similar = did_you_mean(name, columns)
                hint = f"{similar} {self._hint}" if similar else self._hint
                hint += "; the first line must contain the column names" if header and not similar else ""
                raise InputError(f"no column {name!r}; columns: {listed}", where=where, hint=hint)
            if columns.count(name) > 1:
                raise InputError(f"has {columns.count(name)} columns named {name!r}", where=where, hint="rename one of them")

    def text(self, record: object, where: str) -> str:
        """Return the text of a record. Raises `InputError` if a field is missing or its value is not text."""
        if not isinstance(record, Mapping):
            raise InputError("not a JSON object", where=where)
        for name in self.fields:
            if name not in record:
                raise InputError(f"no field {name!r}; fields: {', '.join(map(str, record))}", where=where, hint=self._hint)
        if self.template is None:
            return self._value(record, self.field, where)
        return "".join(before + ("" if name is None else self._value(record, name, where)) for before, name in self._parts)

    def _value(self, record: Mapping[str, object], name: str, where: str) -> str:
        """Return the text of one field. In a template, numbers and booleans are written as in JSON."""
        value = record[name]
        if self.template is not None and isinstance(value, (bool, int, float)):
            return json.dumps(value)
        if not isinstance(value, str):
            shown = json.dumps(value, default=str)[:40]
            raise InputError(f"field {name!r} must be text, not {shown}", where=where, hint=self._hint)
        if has_surrogates(value):
            if self.errors == "strict":
                raise InputError(
                    f"field {name!r} contains an unpaired surrogate",
                    where=where,
                    hint="use --errors replace, or set data.errors to replace, to read it as U+FFFD",
                )
            value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value


def table_rows(file: TextFile, stream: IO[bytes], record_format: RecordFormat) -> Iterator[tuple[dict[str, str], str]]:
    """Yield each row of a CSV or TSV file as (values by column, location). The first line contains the column names.

    Values in double quotes may contain delimiters and line breaks (RFC 4180). The delimiter of a .csv file is a semicolon if its
    first line contains semicolons but no commas. If a .tsv file does not follow these rules, its quotes have no meaning: each line
    is a row, and each tab a delimiter. Raises `InputError` with the line number if a row has the wrong number of values.
    """
    quoted = True
    if file.suffix == ".tsv" and not _is_table(file, stream, record_format, quoted=True):
        quoted = not _is_table(file, stream, record_format, quoted=False)  # parallel corpora contain raw quotes
    yield from _parsed_rows(file, stream, record_format, quoted=quoted)


def _is_table(file: TextFile, stream: IO[bytes], record_format: RecordFormat, *, quoted: bool) -> bool:
    """Whether a table can be read to its end. Rewinds the stream."""
    try:
        for _ in _parsed_rows(file, stream, record_format, quoted=quoted):
            pass
    except InputError:
        return False
    finally:
        stream.seek(0)
    return True


def _parsed_rows(
    file: TextFile, stream: IO[bytes], record_format: RecordFormat, *, quoted: bool
) -> Iterator[tuple[dict[str, str], str]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default rejects documents longer than 128 KiB
    lines = _decoded_lines(file.name, stream, record_format.errors)
    first = next(lines, "")
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(_chain(first, lines), delimiter=_delimiter(file.suffix, first), quoting=quoting, strict=True)
    columns: list[str] | None = None
    start = 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(f"not a valid table: {error}", where=f"{file.name}:{start}", hint=_QUOTES_HINT) from None
        if row is None:
            return
        if columns is None:
            columns = [name.strip() for name in row]
            record_format.check_columns(columns, file.name, header=True)
        elif len(row) == len(columns):
            yield dict(zip(columns, row, strict=True)), f"{file.name}:{start}"
        elif row:  # not a blank line
            raise InputError(f"{len(row)} values for {len(columns)} columns", where=f"{file.name}:{start}", hint=_QUOTES_HINT)
        start = reader.line_num + 1


_QUOTES_HINT = 'values with delimiters, line breaks or quotes must be in double quotes, with "" for each quote inside'


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
    yield from rest


def _delimiter(suffix: str, header: str) -> str:
    if suffix == ".tsv":
        return "\t"
    return ";" if ";" in header and "," not in header else ","


def _decoded_lines(name: str, stream: IO[bytes], errors: str) -> Iterator[str]:
    """Yield the lines of a stream with their line endings, but without a byte order mark."""
    offset = 0
    for line in read_lines(name, stream):
        try:
            text = line.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise not_utf8(name, offset + error.start) from None
        yield text if offset else text.removeprefix("\ufeff")
        offset += len(line)
