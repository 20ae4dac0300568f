"""Read and write vectors in common formats: word2vec text and binary, GloVe text, safetensors, TensorFlow projector.

Text formats write each float32 with nine digits, which is enough to restore it exactly. They cannot represent names that are
empty or contain white space. If there is such a name, all names are written byte-mapped, and `read` can undo the mapping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinylm.embedding.byte_mapping import from_byte_mapped, to_byte_mapped
from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError, did_you_mean
from tinylm.paths import atomic_file
from tinylm.run import VECTORS_FILE

SUFFIXES = {".safetensors": "safetensors", ".bin": "word2vec-binary", ".vec": "word2vec", ".txt": "word2vec", ".tsv": "projector"}
_MAX_NAME_BYTES = 1 << 16


def read(path: Path, kind: str | None = None, *, undo_byte_mapping: bool = False) -> Vectors:
    """Read a file in any of the formats, or the folder of an embedding run.

    Without `kind`, the format is detected from the suffix and the first bytes. `undo_byte_mapping` decodes byte-mapped names.
    Raises `InputError` with the position of the problem.
    """
    if path.is_dir():
        if not (path / VECTORS_FILE).exists():
            raise InputError(f"no {VECTORS_FILE} in this folder", where=str(path), hint="it is written when training finishes")
        path = path / VECTORS_FILE
    if not path.is_file():
        raise InputError("no such file", where=str(path))
    kind = kind or _detect_format(path)
    if kind not in _READERS:
        raise InputError(f"must be one of {', '.join(FORMATS)}, not {kind!r}", where="--from", hint=did_you_mean(kind, FORMATS))
    try:
        vectors = _READERS[kind](path)
    except InputError as error:
        raise InputError(error.message, where=error.where or str(path), hint=error.hint) from None
    if not undo_byte_mapping:
        return vectors
    names = [_decoded_name(name, path) for name in vectors.names]
    return Vectors(names, vectors.matrix, vectors.counts, notes=vectors.notes)


def write(vectors: Vectors, path: Path, kind: str | None = None) -> bool:
    """Write `vectors` in the format `kind` (default: from the suffix). Returns whether the names had to be byte-mapped.

    Raises `InputError` for an unknown format.
    """
    kind = kind or SUFFIXES.get(path.suffix.lower())
    if kind is None:
        suffixes = ", ".join(SUFFIXES)
        raise InputError(
            f"the suffix is not one of {suffixes}", where=str(path), hint=f"choose a format with --to {'|'.join(FORMATS)}"
        )
    if kind not in _WRITERS:
        raise InputError(f"must be one of {', '.join(FORMATS)}, not {kind!r}", where="--to", hint=did_you_mean(kind, FORMATS))
    names = list(vectors.names)
    needs_mapping = kind != "safetensors" and any(not name or len(name.split()) != 1 or name.strip() != name for name in names)
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
    with open(path, "rb") as file:
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
        raise InputError("the first line must give the number of vectors and of dimensions", where=f"{path}:1")
    return int(parts[0]), int(parts[1])


def _read_word2vec(path: Path) -> Vectors:
    with open(path, "rb") as file:
        count, dimensions = _header(file, path)
        names, rows = _text_rows(file, path, 2, dimensions)
    if len(names) != count:
        raise InputError(f"the first line declares {count:,} vectors, but the file has {len(names):,}", where=str(path))
    return Vectors(names, rows)


def _read_glove(path: Path) -> Vectors:
    with open(path, "rb") as file:
        dimensions = len(file.readline().split()) - 1
        if dimensions < 1:
            raise InputError("the first line contains no vector", where=f"{path}:1")
        file.seek(0)
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
        names.append(parts[0].decode("utf-8", "surrogateescape"))
        rows.append(row)
    return names, np.array(rows, dtype=np.float32).reshape(-1, dimensions)


def _read_binary(path: Path) -> Vectors:
    with open(path, "rb") as file:
        count, dimensions = _header(file, path)
        if count * dimensions * 4 > path.stat().st_size:
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
    return bytes(name).lstrip(b"\n").decode("utf-8", "surrogateescape")


def _names_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}-names{path.suffix}")


def _read_projector(path: Path) -> Vectors:
    names_file = _names_file(path)
    if not names_file.is_file():
        raise InputError("no such file; the names of the vectors must be in it", where=str(names_file))
    names = names_file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    names = names[:-1] if names and not names[-1] else names
    rows = []
    with open(path, "rb") as file:
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
