"""Text to ids, fast: each distinct chunk is encoded once, by the fastest engine that gives the same ids.

In front of every model whose borders are known (`splits.Borders`) stands a `ChunkIndex`; what it has not met goes to the engine:
tiktoken's core for byte-level BPE where it is installed and proves itself on a probe of this very text, else `tokenizers`. Byte
and character vocabularies need no model at all, only a table. Nothing here changes an id: the tests compare with `tokenizers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import tokenizers

from tinylm.text.sources import Piece
from tinylm.tokenizer.chunks import ChunkIndex
from tinylm.tokenizer.compiled import kernels
from tinylm.tokenizer.splits import SplitPoints, byte_level_table, pattern_in

Engine = Callable[[Sequence[str]], list[list[int]]]
Note = Callable[[str], None]

UNIT_BYTES = 1 << 18
LONGEST_UNIT = 1 << 18
"""Bytes after which a text without any border is cut all the same: a border is not expected any more."""
_PROBE = 2000
_LONGEST_FOR_TIKTOKEN = 500
"""Characters: its time grows with the square of a word without borders."""
_ENGINE_CHUNKS = 1 << 14


def units(pieces: Iterable[Piece], borders: SplitPoints | None) -> Iterator[tuple[bytes, bool]]:
    """(UTF-8 text, whether it begins a document), cut where no id depends on the cut, wherever `pieces` were cut.

    Without `borders` a unit is a whole document.
    """
    held, starts = bytearray(), False
    for piece in pieces:
        if piece.starts_document and (held or starts):
            yield bytes(held), starts
            held, starts = bytearray(), False
        starts = starts or piece.starts_document
        held += piece.text.encode("utf-8")
        if borders is None or len(held) < UNIT_BYTES:
            continue
        text, begin = bytes(held), 0
        for end in _cuts(text, borders):
            yield text[begin:end], starts
            begin, starts = end, False
        held = bytearray(text[begin:])
    if held or starts:
        yield bytes(held), starts


def _cuts(text: bytes, borders: SplitPoints) -> list[int]:
    """Where to cut a growing text: at the last border before every `UNIT_BYTES`, and inside what has no border for too long."""
    found = borders.find(text)
    wanted = np.searchsorted(found, np.append(np.arange(UNIT_BYTES, len(text), UNIT_BYTES), len(text)), side="right") - 1
    cuts = {*found[wanted[wanted >= 0]].tolist()}
    edges = np.concatenate(([0], found, [len(text)]))
    for gap in np.flatnonzero(np.diff(edges) > LONGEST_UNIT).tolist():
        begin, end = int(edges[gap]), int(edges[gap + 1])
        while end - begin > LONGEST_UNIT:
            begin += LONGEST_UNIT
            while text[begin] & 0xC0 == 0x80:  # not inside a character
                begin -= 1
            cuts.add(begin)
    return sorted(cuts)


class Encoder:
    """Encodes units of text for one tokenizer. `note` hears when a faster engine had to be given up."""

    def __init__(self, backend: tokenizers.Tokenizer, described: Mapping[str, Any], borders: SplitPoints | None) -> None:
        self._backend = backend
        self._described = described
        self._index = ChunkIndex(borders) if borders is not None else None
        self._table = _byte_table(described)
        self._characters = _character_table(described)
        self._engine: Engine | None = None
        self.note: Note = lambda text: None
        self._forget()

    def _forget(self) -> None:
        if self._index is not None:
            self._index.clear()
        self._flat = np.zeros(1024, dtype=np.uint32)
        self._starts = np.zeros(1024, dtype=np.int64)
        self._sizes = np.zeros(1024, dtype=np.int64)
        self._known = self._used = 0

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of one unit, as uint32."""
        if self._table is not None:
            return np.take(self._table, np.frombuffer(text, dtype=np.uint8))
        if self._characters is not None:
            return np.take(self._characters, np.frombuffer(text.decode("utf-8").encode("utf-32-le"), dtype="<u4"))
        if self._index is None:
            return np.array(self._slow([text.decode("utf-8")])[0], dtype=np.uint32)
        if self._index.is_full:
            self._forget()
        numbers = self._index.find(text)
        self._learn(self._index.chunks[self._known :])
        sizes = self._sizes[numbers]
        if (loops := kernels(0)) is not None:
            ids = np.empty(int(sizes.sum()), dtype=np.uint32)
            loops.gather(self._flat, self._starts, self._sizes, numbers, ids)
            return ids
        before = np.cumsum(sizes) - sizes
        return self._flat[np.repeat(self._starts[numbers] - before, sizes) + np.arange(int(sizes.sum()))]

    def _slow(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _learn(self, chunks: Sequence[bytes]) -> None:
        """Ask the engine for the ids of new chunks and put them behind those known."""
        for start in range(0, len(chunks), _ENGINE_CHUNKS):
            texts = [chunk.decode("utf-8") for chunk in chunks[start : start + _ENGINE_CHUNKS]]
            encoded = self._encode_new(texts)
            sizes = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
            total = int(sizes.sum())
            self._flat = _grown(self._flat, self._used + total)
            self._starts, self._sizes = (_grown(a, self._known + len(encoded)) for a in (self._starts, self._sizes))
            self._flat[self._used : self._used + total] = np.fromiter(chain.from_iterable(encoded), dtype=np.uint32, count=total)
            here = slice(self._known, self._known + len(encoded))
            self._sizes[here] = sizes
            self._starts[here] = self._used + np.cumsum(sizes) - sizes
            self._known += len(encoded)
            self._used += total

    def _encode_new(self, texts: list[str]) -> list[list[int]]:
        if self._engine is None:
            self._engine = self._proven(_tiktoken(self._described, self._slow), texts[:_PROBE])
        return self._engine(texts)

    def _proven(self, engine: Engine | None, probe: Sequence[str]) -> Engine:
        if engine is None:
            return self._slow
        if engine(probe) != self._slow(probe):
            self.note("tiktoken gives other ids for this tokenizer: encoding with tokenizers, which is slower")
            return self._slow
        return engine


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    return array if len(array) >= size else np.concatenate((array, np.zeros(2 * size - len(array), dtype=array.dtype)))


def _plain(described: Mapping[str, Any]) -> bool:
    """No normaliser and no added token that text could hold."""
    return described.get("normalizer") is None and all(token["special"] for token in described["added_tokens"])


def _byte_table(described: Mapping[str, Any]) -> np.ndarray | None:
    """The id of each byte, for a byte-level vocabulary without merges."""
    model = described["model"]
    decoder = described.get("decoder") or {}
    if model["type"] != "BPE" or model["merges"] or decoder.get("type") != "ByteLevel" or not _plain(described):
        return None
    letters = {byte: letter for letter, byte in byte_level_table().items()}
    if not all(letter in model["vocab"] for letter in letters.values()):
        return None
    return np.array([model["vocab"][letters[byte]] for byte in range(256)], dtype=np.uint32)


def _character_table(described: Mapping[str, Any]) -> np.ndarray | None:
    """The id of each code point, for a vocabulary of single characters with an unknown token."""
    model = described["model"]
    if model["type"] != "BPE" or model["merges"] or described.get("pre_tokenizer") is not None or not _plain(described):
        return None
    if model["fuse_unk"] or model["byte_fallback"] or model["unk_token"] not in model["vocab"]:
        return None
    table = np.full(0x110000, model["vocab"][model["unk_token"]], dtype=np.uint32)
    for token, id in model["vocab"].items():
        if len(token) == 1:
            table[ord(token)] = id
    return table


def _tiktoken(described: Mapping[str, Any], slow: Engine) -> Engine | None:
    """tiktoken's core over the same merges, where it is installed and can express this tokenizer."""
    pattern = pattern_in(described)
    model = described["model"]
    if pattern is None or model["type"] != "BPE" or not model["merges"] or not _plain(described):
        return None
    if model["byte_fallback"] or model["ignore_merges"] or (described.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    letters = byte_level_table()
    special = {token["content"] for token in described["added_tokens"]}
    vocabulary = {token: id for token, id in model["vocab"].items() if token not in special}
    made = [vocabulary.get("".join(merge if isinstance(merge, list) else merge.split(" ")), -1) for merge in model["merges"]]
    in_order = all(a < b for a, b in pairwise(made)) and made[0] >= 256
    if not in_order or not all(letter in letters for token in vocabulary for letter in token):
        return None
    ranks = {bytes(letters[letter] for letter in token): id for token, id in vocabulary.items()}
    if len(ranks) != len(made) + 256 or not all(bytes([byte]) in ranks for byte in range(256)):
        return None
    try:
        import tiktoken
    except ImportError:
        return None
    core = tiktoken.Encoding("tinylm", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return lambda texts: [core.encode_ordinary(text) if len(text) <= _LONGEST_FOR_TIKTOKEN else slow([text])[0] for text in texts]
