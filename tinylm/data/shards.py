"""Store the tokens of each split of a text in a memory-mapped .npy file, and its counts in a .json file.

The .npy file starts with the end-of-text token. Each document is also followed by that token. The dtype is uint16 if every id fits,
and uint32 otherwise. No text is encoded to the end-of-text token, so the tokens alone determine where documents start and end. The
.json file also contains a SHA-256 of the counts and tokens.
"""

from __future__ import annotations

import hashlib
import json
import tokenize
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from tinylm.errors import InputError
from tinylm.paths import atomic_file, atomic_write_text


@dataclass(frozen=True)
class Counts:
    """The sizes of one split of a text. `tokens` excludes the end-of-text tokens."""

    documents: int
    bytes: int
    characters: int
    tokens: int
    unknown_tokens: int


@dataclass(frozen=True)
class Shard:
    """The memory-mapped tokens of one split of a text."""

    tokens: np.ndarray
    counts: Counts
    end_of_text: int
    sha256: str | None = None
    """The expected hash of the counts and tokens, or None if an earlier version wrote the files."""

    def __len__(self) -> int:
        return len(self.tokens)

    def documents(self) -> list[tuple[int, int]]:
        """Return the (start, end) of each document in `tokens`. End-of-text tokens are at `start - 1` and `end`."""
        ends = np.flatnonzero(np.asarray(self.tokens) == self.end_of_text)
        return [(int(a) + 1, int(b)) for a, b in pairwise(ends)]

    def problem(self, vocab_size: int | None = None) -> str | None:
        """Read all tokens, and return how they are damaged, or None if they are valid.

        With `vocab_size`, ids outside the vocabulary count as damage.
        """
        if self.sha256 is not None and self.sha256 != self.digest():
            return "they have changed since they were saved"
        if self._count_end_of_text() != self.counts.documents + 1:
            return f"they do not contain {self.counts.documents:,} documents"
        if self.tokens[0] != self.end_of_text or self.tokens[-1] != self.end_of_text:
            return "they do not begin and end with the end-of-text token"
        if vocab_size is not None and int(self.tokens.max()) >= vocab_size:
            return f"they contain ids outside the vocabulary of {vocab_size:,} tokens"
        return None

    def _count_end_of_text(self) -> int:
        starts = range(0, len(self.tokens), _HASHED_TOKENS)
        return sum(int(np.count_nonzero(self.tokens[start : start + _HASHED_TOKENS] == self.end_of_text)) for start in starts)

    def digest(self) -> str:
        """Return the SHA-256 of the tokens and counts in hexadecimal."""
        digest = hashlib.sha256()
        for start in range(0, len(self.tokens), _HASHED_TOKENS):
            digest.update(self.tokens[start : start + _HASHED_TOKENS].tobytes())
        return _with_counts(digest, self.counts, self.end_of_text)


_HASHED_TOKENS = 1 << 20
"""Number of tokens that are hashed or compared at a time."""


def _with_counts(tokens_hash: hashlib._Hash, counts: Counts, end_of_text: int) -> str:
    """Add the counts and the end-of-text token of a shard to the hash of its tokens."""
    tokens_hash.update(json.dumps({**asdict(counts), "end_of_text": end_of_text}, sort_keys=True).encode())
    return tokens_hash.hexdigest()


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


class ShardWriter:
    """Writes tokens to a .npy file. The number of tokens need not be known in advance."""

    def __init__(self, file: Path, vocab_size: int, end_of_text: int, unknown: int | None) -> None:
        self._dtype = np.dtype(token_dtype(vocab_size))
        self._file = open(file, "wb")  # noqa: SIM115  closed by `finish` or `close`
        self.end_of_text = end_of_text
        self._unknown = unknown
        self.hash = hashlib.sha256()
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
        raw = ids.astype(self._dtype).tobytes()
        self._file.write(raw)
        self.hash.update(raw)
        self.length += len(ids)

    def add(self, ids: np.ndarray, starts_document: bool) -> None:
        """Append ids to the current document, or to a new document if `starts_document` is true.

        Raises `InputError` if the ids contain the end-of-text token, which would divide the document.
        """
        if (ids == self.end_of_text).any():
            hint = "use a tokenizer that does not encode text to this token"
            raise InputError(f"a document encodes to the end-of-text token {self.end_of_text}", hint=hint)
        if starts_document:
            if self.documents:
                self._write(np.array([self.end_of_text]))
            self.documents += 1
        self._write(ids)
        if self._unknown is not None:
            self.unknown_tokens += int((ids == self._unknown).sum())

    def append(self, shard: Shard) -> None:
        """Append all documents of another shard with the same tokenizer."""
        if self.documents:
            self._write(np.array([self.end_of_text]))
        self._write(np.asarray(shard.tokens[1:-1]))
        self.documents += shard.counts.documents

    def finish(self) -> None:
        """Write the last end-of-text token and the final header, and close the file."""
        self._write(np.array([self.end_of_text]))
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
    _write_counts(folder / f"{name}.json", writer, counts, end_of_text)
    return counts


def _write_counts(file: Path, writer: ShardWriter, counts: Counts, end_of_text: int) -> None:
    document = {**asdict(counts), "end_of_text": end_of_text, "sha256": _with_counts(writer.hash, counts, end_of_text)}
    atomic_write_text(file, json.dumps(document) + "\n")


def concatenate(folder: Path, name: str, parts: Callable[[], Iterable[Shard]], vocab_size: int) -> Counts:
    """Write the documents of several shards to one shard, atomically. `parts` yields them in order, one at a time.

    Raises `ValueError` if there are no parts.
    """
    totals = {field.name: 0 for field in fields(Counts)}
    with atomic_file(folder / f"{name}.npy") as temporary:
        writer: ShardWriter | None = None
        try:
            for part in parts():
                writer = writer or ShardWriter(temporary, vocab_size, part.end_of_text, None)
                writer.append(part)
                totals = {key: value + getattr(part.counts, key) for key, value in totals.items()}
            if writer is None:
                raise ValueError("no shards to concatenate")
            writer.finish()
        finally:
            if writer is not None:
                writer.close()
    counts = Counts(**totals)
    _write_counts(folder / f"{name}.json", writer, counts, writer.end_of_text)
    return counts


def open_shard(folder: Path, name: str) -> Shard:
    """Memory-map `folder/name.npy`, and check its type and size. `Shard.problem` also checks its content.

    Raises `InputError` if a file is missing or damaged.
    """
    try:
        document = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        end_of_text, digest = document.pop("end_of_text"), document.pop("sha256", None)
        if not all(type(value) is int and value >= 0 for value in (end_of_text, *document.values())):
            raise ValueError("a count is not a whole number")
        shard = Shard(_map_tokens(folder / f"{name}.npy"), Counts(**document), end_of_text, digest)
        if len(shard) != shard.counts.tokens + shard.counts.documents + 1:
            raise ValueError(f"{len(shard):,} tokens do not match {name}.json")
        return shard
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"the tokens are missing or damaged: {error}", where=str(folder / f"{name}.npy")) from None


def _map_tokens(file: Path) -> np.ndarray:
    """Memory-map a .npy file. Raises `ValueError` if it does not contain a 1-D array of uint16 or uint32."""
    if not file.is_file():  # opening a named pipe would wait forever
        raise ValueError("no such file")
    try:
        tokens: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except (SyntaxError, tokenize.TokenError) as error:  # raised for a damaged header
        raise ValueError(f"its header is damaged: {error}") from None
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise ValueError(f"{tokens.ndim}-D array of {tokens.dtype} instead of ids")
    return tokens
