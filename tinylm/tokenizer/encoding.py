"""Fast encoding of text to ids. The ids are always the same as those of the `tokenizers` library.

If the split points of a tokenizer are known, each distinct chunk is encoded once: a `ChunkIndex` looks up known chunks, and only
new chunks are passed to the engine. The engine is tiktoken if it is installed, can represent the tokenizer, and agrees with
`tokenizers` on a sample of the text. Otherwise, it is `tokenizers`. Byte and character vocabularies use a lookup table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import tokenizers

from tinylm.errors import InputError
from tinylm.text.sources import Piece
from tinylm.tokenizer import kernel_loading, tiktoken_files
from tinylm.tokenizer.backend_errors import translate_backend_errors
from tinylm.tokenizer.byte_level import bytes_to_unicode
from tinylm.tokenizer.chunks import ChunkIndex
from tinylm.tokenizer.split_points import SplitPoints

Engine = Callable[[Sequence[str]], list[list[int]]]
Note = Callable[[str], None]

SEGMENT_BYTES = 1 << 18
"""Target size, in bytes, of the segments into which documents are cut."""
MAX_BYTES_WITHOUT_SPLIT_POINT = 1 << 22
"""Longer stretches of text without a split point are rejected, because encoding them whole would need too much memory."""
_SAMPLE_CHUNKS = 2000
"""Number of chunks on which tiktoken must agree with `tokenizers`."""
_MAX_TIKTOKEN_CHARACTERS = 500
"""tiktoken's run time is quadratic in the chunk length, so longer chunks are encoded with `tokenizers`."""
_ENGINE_CHUNKS = 1 << 14
"""Maximum number of chunks passed to the engine at once."""


def segments(
    pieces: Iterable[Piece], split_points: SplitPoints | None, *, cut_anywhere: bool = False
) -> Iterator[tuple[bytes, bool]]:
    """Cut documents into segments that are encoded separately, and yield (UTF-8 text, whether it begins a document).

    The cuts are at split points, so they do not change any token. They do not depend on how `pieces` divide a document. Without
    `split_points`, each segment is a whole document. With `cut_anywhere`, a long stretch without a split point is cut between any
    two characters, which may change tokens. Otherwise, a stretch longer than `MAX_BYTES_WITHOUT_SPLIT_POINT` raises `InputError`.
    """
    cut_anywhere = cut_anywhere or (split_points is not None and split_points.anywhere)
    buffer, starts_document = bytearray(), False
    for piece in pieces:
        if piece.starts_document and (buffer or starts_document):
            yield bytes(buffer), starts_document
            buffer, starts_document = bytearray(), False
        starts_document = starts_document or piece.starts_document
        buffer += piece.text.encode("utf-8")
        if split_points is None or len(buffer) < SEGMENT_BYTES:
            continue
        text, begin = bytes(buffer), 0
        for end in _cuts(text, split_points, cut_anywhere):
            yield text[begin:end], starts_document
            begin, starts_document = end, False
        buffer = bytearray(text[begin:])
        if len(buffer) > MAX_BYTES_WITHOUT_SPLIT_POINT:
            raise InputError(
                f"{len(buffer):,} bytes of the text cannot be divided without changing tokens",
                hint="add spaces or line breaks to the text, or use a tokenizer of kind byte or char",
            )
    if buffer or starts_document:
        yield bytes(buffer), starts_document


def _cuts(text: bytes, split_points: SplitPoints, cut_anywhere: bool) -> list[int]:
    """Return the positions at which to cut the beginning of a longer text.

    The cuts are the last split points before each multiple of `SEGMENT_BYTES`. With `cut_anywhere`, stretches of more than
    `SEGMENT_BYTES` without a split point are also cut.
    """
    candidates = split_points.find(text)
    targets = np.append(np.arange(SEGMENT_BYTES, len(text), SEGMENT_BYTES), len(text))
    last_before = np.searchsorted(candidates, targets, side="right") - 1
    cuts = {*candidates[last_before[last_before >= 0]].tolist()}
    edges = np.concatenate(([0], candidates, [len(text)]))
    for gap in np.flatnonzero(np.diff(edges) > SEGMENT_BYTES).tolist() if cut_anywhere else ():
        begin, end = int(edges[gap]), int(edges[gap + 1])
        while end - begin > SEGMENT_BYTES:
            begin += SEGMENT_BYTES
            while text[begin] & 0xC0 == 0x80:  # do not cut inside a character
                begin -= 1
            cuts.add(begin)
    return sorted(cuts)


class Encoder:
    """Encodes segments with one tokenizer and caches the ids of chunks. `note` receives a message if tiktoken's ids differ."""

    def __init__(self, backend: tokenizers.Tokenizer, tokenizer_json: Mapping[str, Any], split_points: SplitPoints | None) -> None:
        self._backend = backend
        self._tokenizer_json = tokenizer_json
        self._index = ChunkIndex(split_points) if split_points is not None else None
        self._id_of_byte = _byte_table(tokenizer_json)
        self._id_of_character = _character_table(tokenizer_json)
        self._engine: Engine | None = None
        self.note: Note = lambda text: None
        self._clear()

    def _clear(self) -> None:
        if self._index is not None:
            self._index.clear()
        # The ids of chunk n are flat[starts[n] : starts[n] + sizes[n]].
        self._flat = np.zeros(1024, dtype=np.uint32)
        self._starts = np.zeros(1024, dtype=np.int64)
        self._sizes = np.zeros(1024, dtype=np.int64)
        self._n_chunks = self._n_ids = 0

    def encode(self, text: bytes) -> np.ndarray:
        """Encode one segment (see `segments`) to ids, uint32 (tokens,)."""
        if self._id_of_byte is not None:
            return np.take(self._id_of_byte, np.frombuffer(text, dtype=np.uint8))
        if self._id_of_character is not None:
            return np.take(self._id_of_character, np.frombuffer(text.decode("utf-8").encode("utf-32-le"), dtype="<u4"))
        if self._index is None:
            return np.array(self._encode_with_tokenizers([text.decode("utf-8")])[0], dtype=np.uint32)
        if self._index.is_full:
            self._clear()
        numbers = self._index.find(text)
        self._encode_chunks(self._index.chunks[self._n_chunks :])
        sizes = self._sizes[numbers]
        if (kernels := kernel_loading.kernels_if_worthwhile(0)) is not None:
            ids = np.empty(int(sizes.sum()), dtype=np.uint32)
            kernels.gather_ids(self._flat, self._starts, self._sizes, numbers, ids)
            return ids
        begins = np.cumsum(sizes) - sizes  # where the ids of each chunk begin in the result
        return self._flat[np.repeat(self._starts[numbers] - begins, sizes) + np.arange(int(sizes.sum()))]

    def _encode_with_tokenizers(self, texts: Sequence[str]) -> list[list[int]]:
        with translate_backend_errors():
            return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _encode_chunks(self, chunks: Sequence[bytes]) -> None:
        """Encode new chunks and append their ids to the cache."""
        for start in range(0, len(chunks), _ENGINE_CHUNKS):
            texts = [chunk.decode("utf-8") for chunk in chunks[start : start + _ENGINE_CHUNKS]]
            if self._engine is None:
                self._engine = self._choose_engine(texts[:_SAMPLE_CHUNKS])
            encoded = self._engine(texts)
            sizes = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
            total = int(sizes.sum())
            self._flat = _grown(self._flat, self._n_ids + total)
            self._starts, self._sizes = (_grown(a, self._n_chunks + len(encoded)) for a in (self._starts, self._sizes))
            self._flat[self._n_ids : self._n_ids + total] = np.fromiter(chain.from_iterable(encoded), dtype=np.uint32, count=total)
            added = slice(self._n_chunks, self._n_chunks + len(encoded))
            self._sizes[added] = sizes
            self._starts[added] = self._n_ids + np.cumsum(sizes) - sizes
            self._n_chunks += len(encoded)
            self._n_ids += total

    def _choose_engine(self, sample: Sequence[str]) -> Engine:
        engine = tiktoken_engine(self._tokenizer_json, self._encode_with_tokenizers)
        if engine is None:
            return self._encode_with_tokenizers
        if engine(sample) != self._encode_with_tokenizers(sample):
            self.note("tiktoken produces different ids for this tokenizer; encoding with tokenizers instead, which is slower")
            return self._encode_with_tokenizers
        return engine


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    """Return the array, extended with zeros if it is shorter than `size`."""
    return array if len(array) >= size else np.concatenate((array, np.zeros(2 * size - len(array), dtype=array.dtype)))


def _no_normalizer_or_added_tokens(tokenizer_json: Mapping[str, Any]) -> bool:
    """Special tokens do not count, because text is never encoded to them."""
    return tokenizer_json.get("normalizer") is None and all(token["special"] for token in tokenizer_json["added_tokens"])


def _byte_table(tokenizer_json: Mapping[str, Any]) -> np.ndarray | None:
    """Return the id of each byte, uint32 (256,), or None if this is not a byte-level vocabulary without merges."""
    model = tokenizer_json["model"]
    decoder = tokenizer_json.get("decoder") or {}
    if (
        model["type"] != "BPE"
        or model["merges"]
        or decoder.get("type") != "ByteLevel"
        or not _no_normalizer_or_added_tokens(tokenizer_json)
    ):
        return None
    character_of = bytes_to_unicode()
    if not all(character in model["vocab"] for character in character_of.values()):
        return None
    return np.array([model["vocab"][character_of[byte]] for byte in range(256)], dtype=np.uint32)


def _character_table(tokenizer_json: Mapping[str, Any]) -> np.ndarray | None:
    """Return the id of each code point, uint32, or None if this is not a vocabulary of single characters with an unknown token."""
    model = tokenizer_json["model"]
    if model["type"] != "BPE" or model["merges"] or tokenizer_json.get("pre_tokenizer") is not None:
        return None
    if not _no_normalizer_or_added_tokens(tokenizer_json):
        return None
    if model["fuse_unk"] or model["byte_fallback"] or model["unk_token"] not in model["vocab"]:
        return None
    table = np.full(0x110000, model["vocab"][model["unk_token"]], dtype=np.uint32)
    for token, id in model["vocab"].items():
        if len(token) == 1:
            table[ord(token)] = id
    return table


def tiktoken_engine(tokenizer_json: Mapping[str, Any], fallback: Engine) -> Engine | None:
    """Return a tiktoken engine with the same merges, or None if tiktoken is not installed or cannot represent the tokenizer.

    `fallback` encodes texts that are too long for tiktoken.
    """
    if not tokenizer_json["model"].get("merges") or tokenizer_json["model"].get("ignore_merges"):
        return None
    try:
        pattern, ranks = tiktoken_files.representation(tokenizer_json)
    except InputError:
        return None
    try:
        import tiktoken
    except ImportError:
        return None
    core = tiktoken.Encoding("tinylm", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return lambda texts: [
        core.encode_ordinary(text) if len(text) <= _MAX_TIKTOKEN_CHARACTERS else fallback([text])[0] for text in texts
    ]
