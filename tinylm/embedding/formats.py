"""Read and write vectors in common formats: word2vec text and binary, GloVe text, safetensors, and TensorFlow projector.

Text formats write each float32 with nine digits, which is enough to restore it exactly. Only safetensors can represent names that
are empty, contain whitespace or control characters, or are not UTF-8. If there is such a name, the other formats byte-map all
names. `read` can undo this mapping.
"""

from __future__ import annotations

import codecs
import gzip
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from tinylm.embedding.byte_mapping import from_byte_mapped, to_byte_mapped
from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError, TinylmWarning, did_you_mean
from tinylm.file_kinds import identify
from tinylm.paths import atomic_file
from tinylm.recipe.values import has_surrogates
from tinylm.run import VECTORS_FILE

SUFFIXES = {".safetensors": "safetensors", ".bin": "word2vec-binary", ".vec": "word2vec", ".txt": "word2vec", ".tsv": "projector"}
_MAX_NAME_BYTES = 1 << 16
_MAX_GZIP_RATIO = 1032
"""The maximum compression ratio of gzip."""


def read(path: Path, kind: str | None = None, *, undo_byte_mapping: bool = False) -> Vectors:
    """Read a file in one of these formats, or the folder of an embedding run.

    Without `kind`, the format is detected from the suffix and the first bytes. `undo_byte_mapping` decodes byte-mapped names.
    Raises `InputError` with the position of the problem.
    """
    if path.is_dir():
        if not (path / VECTORS_FILE).exists():
            raise InputError(f"no {VECTORS_FILE} in this folder", where=str(path), hint="it is written when training finishes")
        path = path / VECTORS_FILE
    if not path.is_file():
        raise InputError("no such file", where=str(path))
    if other_format := identify(path):
        raise InputError(f"this is {other_format.name}", where=str(path), hint=other_format.hint)
    if not path.stat().st_size:
        raise InputError("the file is empty", where=str(path))
    kind = kind or _detect_format(path)
    if kind not in _READERS:
        raise InputError(f"must be one of {', '.join(FORMATS)}, not {kind!r}", where="--from", hint=did_you_mean(kind, FORMATS))
    try:
        vectors = _READERS[kind](path)
    except InputError as error:
        raise InputError(error.message, where=error.where or str(path), hint=error.hint) from None
    if kind != "safetensors":
        vectors = _without_duplicates(vectors, path)
    if not undo_byte_mapping:
        if kind != "safetensors" and "" in vectors.index:  # only byte-mapped names can be empty
            raise InputError("the name is empty", where=f"{path}: vector {vectors.index[''] + 1:,}")
        return vectors
    names = [_decoded_name(name, path) for name in vectors.names]
    return Vectors(names, vectors.matrix, vectors.counts, notes=vectors.notes)


def _without_duplicates(vectors: Vectors, path: Path) -> Vectors:
    """Keep only the first vector for each name, and warn about duplicates."""
    kept = sorted(vectors.index.values())
    if len(kept) == len(vectors):
        return vectors
    removed = sorted(set(range(len(vectors))) - set(kept))
    examples = ", ".join(repr(vectors.names[row]) for row in removed[:3]) + (", ..." if len(removed) > 3 else "")
    text = f"{path}: {len(removed):,} rows repeat the name of an earlier row ({examples}) and are ignored"
    warnings.warn(text, TinylmWarning, stacklevel=3)
    return Vectors([vectors.names[row] for row in kept], vectors.matrix[kept], vectors.counts, vectors.byte_mapped, vectors.notes)


def _is_plain(name: str) -> bool:
    """Return whether all formats can represent a name."""
    return not has_surrogates(name) and len(name.split()) == 1 and name.strip() == name and not _has_control_character(name)


def _has_control_character(name: str) -> bool:
    return any(unicodedata.category(character) == "Cc" for character in name)


def _name(raw: bytes, where: str) -> str:
    """Decode a name. Raises `InputError` if it is not UTF-8 or contains an ASCII control character."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"the name {raw[:40]!r} is not UTF-8", where=where) from None
    if any(character < " " or character == "\x7f" for character in name):  # U+0085 occurs in public GloVe files
        raise InputError(f"the name {name[:40]!r} contains a control character", where=where)
    return name


def check_format(path: Path, kind: str | None = None, *, hint: str = "the suffix determines the format") -> str:
    """Return the format for writing `path`: `kind` if it is set, otherwise the format for the suffix.

    Raises `InputError` if the format is unknown.
    """
    kind = kind or SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"the suffix is not one of {', '.join(SUFFIXES)}", where=str(path), hint=hint)
    if kind not in _WRITERS:
        raise InputError(f"must be one of {', '.join(FORMATS)}, not {kind!r}", where="--to", hint=did_you_mean(kind, FORMATS))
    return kind


def write(vectors: Vectors, path: Path, kind: str | None = None) -> bool:
    """Write `vectors` in the format `kind`, by default the format for the suffix. Return whether the names were byte-mapped.

    Raises `InputError` for an unknown format.
    """
    kind = check_format(path, kind, hint=f"choose a format with --to {'|'.join(FORMATS)}")
    names = list(vectors.names)
    needs_mapping = kind != "safetensors" and not all(map(_is_plain, names))
    if needs_mapping:
        names = [to_byte_mapped(name.encode("utf-8", "surrogateescape")) for name in names]
    _WRITERS[kind](Vectors(names, vectors.matrix.astype(np.float32), vectors.counts, vectors.byte_mapped, vectors.notes), path)
    return needs_mapping


def _decoded_name(name: str, path: Path) -> str:
    raw = from_byte_mapped(name)
    if raw is None:
        raise InputError(f"{name[:40]!r} is not a byte-mapped name", where=str(path), hint="remove --byte-mapped")
    return raw.decode("utf-8", "surrogateescape")


def _detect_format(path: Path) -> str:
    if path.suffix.lower() == ".safetensors":
        return "safetensors"
    if path.suffix.lower() == ".tsv":
        return "projector"
    with _open_text(path) as file:
        header = file.readline(_MAX_NAME_BYTES).split()
        if len(header) != 2 or not all(part.isdigit() for part in header):
            return "glove"
        first_row = file.readline(_MAX_NAME_BYTES + 32 * int(header[1]))
    try:
        [float(part) for part in first_row.split()[-int(header[1]) :]]
    except ValueError:
        return "word2vec-binary"
    return "word2vec"


def _header(file: BinaryIO, path: Path) -> tuple[int, int]:
    parts = file.readline(100).split()
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or int(parts[1]) < 1:
        raise InputError("the first line must contain the number of vectors and the number of dimensions", where=f"{path}:1")
    return int(parts[0]), int(parts[1])


def _open(path: Path) -> BinaryIO:
    """Open a file for reading, and decompress it if it is a gzip file."""
    return cast(BinaryIO, gzip.open(path, "rb")) if _is_compressed(path) else open(path, "rb")


def _is_compressed(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _open_text(path: Path) -> BinaryIO:
    """Open a file for reading, and skip its byte order mark if it has one."""
    file = _open(path)
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(0)
    return file


def _read_word2vec(path: Path) -> Vectors:
    with _open_text(path) as file:
        count, dimensions = _header(file, path)
        names, rows = _text_rows(file, path, 2, dimensions)
    if len(names) != count:
        raise InputError(f"the first line declares {count:,} vectors, but the file has {len(names):,}", where=str(path))
    return Vectors(names, rows)


def _read_glove(path: Path) -> Vectors:
    with _open_text(path) as file:
        start = file.tell()
        dimensions = len(file.readline().split()) - 1
        if dimensions < 1:
            raise InputError("the first line contains no vector", where=f"{path}:1")
        file.seek(start)
        return Vectors(*_text_rows(file, path, 1, dimensions))


def _text_rows(file: BinaryIO, path: Path, first: int, dimensions: int) -> tuple[list[str], np.ndarray]:
    names, rows = [], []
    for number, line in enumerate(file, first):
        parts = line.rstrip(b"\r\n ").rsplit(b" ", dimensions)
        try:
            row = np.array(parts[1:], dtype=np.bytes_).astype(np.float32)
        except ValueError:
            raise InputError("contains a value that is not a number", where=f"{path}:{number}") from None
        if len(row) != dimensions:
            raise InputError(f"has {len(row)} numbers instead of {dimensions}", where=f"{path}:{number}")
        names.append(_name(parts[0], f"{path}:{number}"))
        rows.append(row)
    return names, np.array(rows, dtype=np.float32).reshape(-1, dimensions)


def _read_binary(path: Path) -> Vectors:
    with _open(path) as file:
        count, dimensions = _header(file, path)
        size = path.stat().st_size * (_MAX_GZIP_RATIO if _is_compressed(path) else 1)
        if count * dimensions * 4 > size:
            raise InputError(f"the file is too short for the {count:,} vectors that its first line declares", where=str(path))
        matrix = np.empty((count, dimensions), dtype=np.float32)
        names = []
        for row in range(count):
            names.append(_binary_name(file, path, row))
            numbers = file.read(4 * dimensions)
            if len(numbers) < 4 * dimensions:
                raise InputError(f"the file ends inside vector {row + 1:,} of {count:,}", where=str(path))
            matrix[row] = np.frombuffer(numbers, dtype="<f4")
    return Vectors(names, matrix)


def _binary_name(file: BinaryIO, path: Path, row: int) -> str:
    name = bytearray()
    while (byte := file.read(1)) != b" ":
        if not byte or len(name) > _MAX_NAME_BYTES:
            raise InputError(f"vector {row + 1:,} has no name", where=str(path))
        name += byte
    decoded = _name(bytes(name).lstrip(b"\n"), f"{path}: vector {row + 1:,}")
    if _has_control_character(decoded):
        raise InputError(f"the name {decoded[:40]!r} contains a control character", where=f"{path}: vector {row + 1:,}")
    return decoded


def _names_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}-names{path.suffix}")


def _read_projector(path: Path) -> Vectors:
    names_file = _names_file(path)
    if not names_file.is_file():
        raise InputError("no such file; it must contain the names of the vectors", where=str(names_file))
    lines = names_file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    lines = lines[:-1] if not lines[-1] else lines
    names = [_name(line.rstrip(b"\r"), f"{names_file}:{number}") for number, line in enumerate(lines, 1)]
    rows = []
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(np.array(line.rstrip(b"\r\n").split(b"\t"), dtype=np.bytes_).astype(np.float32))
            except ValueError:
                raise InputError("contains a value that is not a number", where=f"{path}:{number}") from None
            if len(rows[-1]) != len(rows[0]):
                raise InputError(f"has {len(rows[-1])} numbers instead of {len(rows[0])}", where=f"{path}:{number}")
    return Vectors(names, np.array(rows, dtype=np.float32).reshape(len(rows), -1))


def _format_row(row: np.ndarray, separator: str) -> str:
    return separator.join([f"{number:.9g}" for number in row.tolist()])


def _text_lines(vectors: Vectors) -> Iterator[bytes]:
    for name, row in zip(vectors.names, vectors.matrix, strict=True):
        yield f"{name} {_format_row(row, ' ')}\n".encode("utf-8", "surrogateescape")


def _write_word2vec(vectors: Vectors, path: Path) -> None:
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(f"{len(vectors)} {vectors.dimensions}\n".encode())
        file.writelines(_text_lines(vectors))


def _write_glove(vectors: Vectors, path: Path) -> None:
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.writelines(_text_lines(vectors))


def _write_binary(vectors: Vectors, path: Path) -> None:
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(f"{len(vectors)} {vectors.dimensions}\n".encode())
        for name, row in zip(vectors.names, vectors.matrix, strict=True):
            file.write(name.encode("utf-8", "surrogateescape") + b" " + row.astype("<f4").tobytes() + b"\n")


def _write_projector(vectors: Vectors, path: Path) -> None:
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.writelines(f"{_format_row(row, chr(9))}\n".encode() for row in vectors.matrix)
    with atomic_file(_names_file(path)) as temporary, open(temporary, "wb") as file:
        file.writelines(name.encode("utf-8", "surrogateescape") + b"\n" for name in vectors.names)


def _write_safetensors(vectors: Vectors, path: Path) -> None:
    vectors.save(path)


_READERS: dict[str, Callable[[Path], Vectors]] = {
    "word2vec": _read_word2vec,
    "word2vec-binary": _read_binary,
    "glove": _read_glove,
    "safetensors": Vectors.load,
    "projector": _read_projector,
}
_WRITERS: dict[str, Callable[[Vectors, Path], None]] = {
    "word2vec": _write_word2vec,
    "word2vec-binary": _write_binary,
    "glove": _write_glove,
    "safetensors": _write_safetensors,
    "projector": _write_projector,
}
FORMATS = tuple(_WRITERS)
