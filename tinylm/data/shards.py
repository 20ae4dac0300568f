"""Tokens on disk: a memory-mapped .npy file for each part (train, heldout) of a text, and a .json file with its counts.

Layout: the end-of-text token, then each document followed by the end-of-text token; uint16 if the vocabulary fits, else uint32. No
text encodes to the end-of-text token, so the tokens alone determine where documents start and end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from tinylm.errors import InputError
from tinylm.paths import atomic_file, atomic_write_text


@dataclass(frozen=True)
class Counts:
    """Sizes of one part of a text. `tokens` excludes the end-of-text tokens."""

    documents: int
    bytes: int
    characters: int
    tokens: int
    unknown_tokens: int


@dataclass(frozen=True)
class Shard:
    """Memory-mapped tokens of one part of a text."""

    tokens: np.ndarray
    counts: Counts
    end_of_text: int

    def __len__(self) -> int:
        return len(self.tokens)

    def documents(self) -> list[tuple[int, int]]:
        """Return (start, end) of each document in `tokens`. The end-of-text token is at start - 1 and at end."""
        ends = np.flatnonzero(np.asarray(self.tokens) == self.end_of_text)
        return [(int(a) + 1, int(b)) for a, b in pairwise(ends)]


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


class ShardWriter:
    """Writes tokens to a .npy file without knowing their number in advance."""

    def __init__(self, file: Path, vocab_size: int, end_of_text: int, unknown: int | None) -> None:
        self._dtype = np.dtype(token_dtype(vocab_size))
        self._file = open(file, "wb")  # noqa: SIM115  closed by `finish` or `close`
        self._end_of_text = end_of_text
        self._unknown = unknown
        self.length = 0
        self.documents = self.unknown_tokens = 0
        self._write_header(0)
        self._write(np.array([end_of_text]))

    def _write_header(self, length: int) -> None:
        self._file.seek(0)
        npy.write_array_header_1_0(
            self._file, {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (length,)}
        )

    def _write(self, ids: np.ndarray) -> None:
        self._file.write(ids.astype(self._dtype).tobytes())
        self.length += len(ids)

    def add(self, ids: np.ndarray, starts_document: bool) -> None:
        """Append ids to the current document, or to a new document if `starts_document` is true."""
        if starts_document:
            if self.documents:
                self._write(np.array([self._end_of_text]))
            self.documents += 1
        self._write(ids)
        if self._unknown is not None:
            self.unknown_tokens += int((ids == self._unknown).sum())

    def finish(self) -> None:
        """Write the last end-of-text token and the final header, and close the file."""
        self._write(np.array([self._end_of_text]))
        self._write_header(self.length)
        self._file.close()

    def close(self) -> None:
        """Close the file without finishing it."""
        self._file.close()


def write_shard(
    folder: Path,
    name: str,
    encoded: Iterable[tuple[np.ndarray, bool]],
    *,
    vocab_size: int,
    end_of_text: int,
    unknown: int | None,
    sizes: Callable[[], tuple[int, int]],
) -> Counts:
    """Write `folder/name.npy` and `folder/name.json` atomically.

    `encoded` yields (ids, whether they start a document). `sizes` is called at the end and returns (bytes, characters).
    """
    with atomic_file(folder / f"{name}.npy") as temporary:
        writer = ShardWriter(temporary, vocab_size, end_of_text, unknown)
        try:
            for ids, starts_document in encoded:
                writer.add(ids, starts_document)
        except BaseException:
            writer.close()
            raise
        writer.finish()
    size, characters = sizes()
    tokens = writer.length - writer.documents - 1
    counts = Counts(writer.documents, size, characters, tokens, writer.unknown_tokens)
    atomic_write_text(folder / f"{name}.json", json.dumps({**asdict(counts), "end_of_text": end_of_text}) + "\n")
    return counts


def open_shard(folder: Path, name: str) -> Shard:
    """Memory-map `folder/name.npy`. Raises `InputError` if it is missing or damaged."""
    try:
        counts = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        end_of_text = int(counts.pop("end_of_text"))
        tokens = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return Shard(tokens, Counts(**counts), end_of_text)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the tokens are missing or damaged: {error}", where=str(folder / f"{name}.npy")) from None
