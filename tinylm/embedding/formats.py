"""Vectors in the formats of other programs: word2vec text and binary, GloVe text, safetensors, TensorFlow projector.

Text holds every float32 in nine digits, which is enough to read back the same bits. Where a name is empty or holds white
space, which these formats cannot write, all names are written byte-mapped, and reading takes `byte_mapped` to undo it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinylm.embedding.spelling import byte_mapped, from_byte_mapped
from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError, did_you_mean
from tinylm.paths import whole_file
from tinylm.run import VECTORS_FILE

SUFFIXES = {".safetensors": "safetensors", ".bin": "word2vec-binary", ".vec": "word2vec", ".txt": "word2vec", ".tsv": "projector"}
_LONGEST_NAME = 1 << 16


def read(path: Path, kind: str | None = None, *, undo_byte_mapping: bool = False) -> Vectors:
    """Vectors from a file of any of the formats, or from a folder that `tinylm embed train` made.

    `kind` None: told from the suffix and the first bytes. Raises `InputError` with the line or place of what is wrong.
    """
    if path.is_dir():
        if not (path / VECTORS_FILE).exists():
            raise InputError(f"no {VECTORS_FILE} in this folder", where=str(path), hint="has its training ended?")
        path = path / VECTORS_FILE
    if not path.is_file():
        raise InputError("no such file", where=str(path))
    kind = kind or _guess(path)
    if kind not in _READERS:
        raise InputError(f"must be one of {', '.join(KINDS)}, not {kind!r}", where="--from", hint=did_you_mean(kind, KINDS))
    try:
        found = _READERS[kind](path)
    except InputError as error:
        raise InputError(error.message, where=error.where or str(path), hint=error.hint) from None
    if not undo_byte_mapping:
        return found
    names = [_unmapped(name, path) for name in found.names]
    return Vectors(names, found.matrix, found.counts, notes=found.notes)


def write(vectors: Vectors, path: Path, kind: str | None = None) -> bool:
    """Write in the format `kind`; None: by the suffix. True when the names had to be byte-mapped.

    Raises `InputError` for a format that is not known.
    """
    kind = kind or SUFFIXES.get(path.suffix.lower())
    if kind not in _WRITERS:
        raise InputError(
            "names no format" if kind is None else f"must be one of {', '.join(KINDS)}, not {kind!r}",
            where=str(path) if kind is None else "--to",
            hint=f"--to {'|'.join(KINDS)}" if kind is None else did_you_mean(kind, KINDS),
        )
    names = list(vectors.names)
    mapping = kind != "safetensors" and any(not name or len(name.split()) != 1 or name.strip() != name for name in names)
    if mapping:
        names = [byte_mapped(name.encode("utf-8", "surrogateescape")) for name in names]
    _WRITERS[kind](Vectors(names, vectors.matrix.astype(np.float32), vectors.counts, vectors.byte_mapped, vectors.notes), path)
    return mapping


def _unmapped(name: str, path: Path) -> str:
    raw = from_byte_mapped(name)
    if raw is None:
        raise InputError(f"{name[:40]!r} is not a byte-mapped name", where=str(path), hint="leave out --byte-mapped")
    return raw.decode("utf-8", "surrogateescape")


def _guess(path: Path) -> str:
    if path.suffix.lower() == ".safetensors":
        return "safetensors"
    if path.suffix.lower() == ".tsv":
        return "projector"
    with open(path, "rb") as file:
        header = file.readline(_LONGEST_NAME).split()
        if len(header) != 2 or not all(part.isdigit() for part in header):
            return "glove"
        second = file.readline(_LONGEST_NAME + 32 * int(header[1]))
    try:
        [float(part) for part in second.split()[-int(header[1]) :]]
    except ValueError:
        return "word2vec-binary"
    return "word2vec"


def _header(file: BinaryIO, path: Path) -> tuple[int, int]:
    parts = file.readline(100).split()
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or int(parts[1]) < 1:
        raise InputError("does not begin with the number of vectors and of dimensions", where=f"{path}:1")
    return int(parts[0]), int(parts[1])


def _read_word2vec(path: Path) -> Vectors:
    with open(path, "rb") as file:
        count, dimensions = _header(file, path)
        names, rows = _text_rows(file, path, 2, dimensions)
    if len(names) != count:
        raise InputError(f"promises {count:,} vectors and holds {len(names):,}", where=str(path))
    return Vectors(names, rows)


def _read_glove(path: Path) -> Vectors:
    with open(path, "rb") as file:
        dimensions = len(file.readline().split()) - 1
        if dimensions < 1:
            raise InputError("no vector in the first line", where=f"{path}:1")
        file.seek(0)
        return Vectors(*_text_rows(file, path, 1, dimensions))


def _text_rows(file: BinaryIO, path: Path, first: int, dimensions: int) -> tuple[list[str], np.ndarray]:
    names, rows = [], []
    for number, line in enumerate(file, first):
        parts = line.rstrip(b"\r\n ").rsplit(b" ", dimensions)
        try:
            row = np.array(parts[1:], dtype=np.bytes_).astype(np.float32)
        except ValueError:
            raise InputError("holds something that is not a number", where=f"{path}:{number}") from None
        if len(row) != dimensions:
            raise InputError(f"has {len(row)} numbers, not {dimensions}", where=f"{path}:{number}")
        names.append(parts[0].decode("utf-8", "surrogateescape"))
        rows.append(row)
    return names, np.array(rows, dtype=np.float32).reshape(-1, dimensions)


def _read_binary(path: Path) -> Vectors:
    with open(path, "rb") as file:
        count, dimensions = _header(file, path)
        if count * dimensions * 4 > path.stat().st_size:
            raise InputError(f"is too short for the {count:,} vectors that it promises", where=str(path))
        matrix = np.empty((count, dimensions), dtype=np.float32)
        names = []
        for row in range(count):
            names.append(_binary_name(file, path, row))
            numbers = file.read(4 * dimensions)
            if len(numbers) < 4 * dimensions:
                raise InputError(f"ends inside vector {row + 1:,} of {count:,}", where=str(path))
            matrix[row] = np.frombuffer(numbers, dtype="<f4")
    return Vectors(names, matrix)


def _binary_name(file: BinaryIO, path: Path, row: int) -> str:
    name = bytearray()
    while (byte := file.read(1)) != b" ":
        if not byte or len(name) > _LONGEST_NAME:
            raise InputError(f"no name before vector {row + 1:,}", where=str(path))
        name += byte
    return bytes(name).lstrip(b"\n").decode("utf-8", "surrogateescape")


def _names_beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}-names{path.suffix}")


def _read_projector(path: Path) -> Vectors:
    beside = _names_beside(path)
    if not beside.is_file():
        raise InputError("no such file: the names belong there", where=str(beside))
    names = beside.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    names = names[:-1] if names and not names[-1] else names
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(np.array(line.rstrip(b"\r\n").split(b"\t"), dtype=np.bytes_).astype(np.float32))
            except ValueError:
                raise InputError("holds something that is not a number", where=f"{path}:{number}") from None
            if len(rows[-1]) != len(rows[0]):
                raise InputError(f"has {len(rows[-1])} numbers, not {len(rows[0])}", where=f"{path}:{number}")
    return Vectors(names, np.array(rows, dtype=np.float32).reshape(len(rows), -1))


def _numbers(row: np.ndarray, between: str) -> str:
    return between.join([f"{number:.9g}" for number in row.tolist()])


def _lines(vectors: Vectors) -> Iterator[bytes]:
    for name, row in zip(vectors.names, vectors.matrix, strict=True):
        yield f"{name} {_numbers(row, ' ')}\n".encode("utf-8", "surrogateescape")


def _write_word2vec(vectors: Vectors, path: Path) -> None:
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(f"{len(vectors)} {vectors.dimensions}\n".encode())
        file.writelines(_lines(vectors))


def _write_glove(vectors: Vectors, path: Path) -> None:
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.writelines(_lines(vectors))


def _write_binary(vectors: Vectors, path: Path) -> None:
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(f"{len(vectors)} {vectors.dimensions}\n".encode())
        for name, row in zip(vectors.names, vectors.matrix, strict=True):
            file.write(name.encode("utf-8", "surrogateescape") + b" " + row.astype("<f4").tobytes() + b"\n")


def _write_projector(vectors: Vectors, path: Path) -> None:
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.writelines(f"{_numbers(row, chr(9))}\n".encode() for row in vectors.matrix)
    with whole_file(_names_beside(path)) as temporary, open(temporary, "wb") as file:
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
KINDS = tuple(_WRITERS)
