"""A tokenizer: text to token ids and back, over one `tokenizer.json` in Hugging Face's format.

Text is text: a document that holds `<|endoftext|>` is encoded as those characters, never as the control token, also after
reloading the file (`tokenizers` does not save that choice; it is set here on every load).
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from tinylm.errors import InputError
from tinylm.paths import write_whole
from tinylm.text.sources import Piece

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"
_BATCH_CHARACTERS = 1 << 22


class Tokenizer:
    """Encodes and decodes. Make one with `Tokenizer.load` or with `tinylm.tokenizer.training.train`."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.encode_special_tokens = True
        backend.no_truncation()  # a file may ask for either, and text would be lost or added
        backend.no_padding()
        self.backend = backend
        self._model: dict[str, Any] = json.loads(backend.to_str())["model"]

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json. Raises `InputError` when there is none, it is not one, or of a kind that is not read here."""
        path = Path(path)
        if not path.is_file():
            raise InputError("no such tokenizer file", where=str(path))
        try:
            tokenizer = cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # tokenizers raises plain Exception for a file it cannot read
            raise InputError(f"not a tokenizer.json: {error}", where=str(path)) from None
        if not (tokenizer._is_byte_level or tokenizer.kind == "char"):
            raise InputError(
                f"{tokenizer.kind} tokenizers of this form are not read yet", where=str(path), hint="byte-level BPE is"
            )
        return tokenizer

    def save(self, path: str | Path) -> None:
        write_whole(Path(path), self.backend.to_str(pretty=True) + "\n")

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id, special and added tokens included; a file may leave ids below it unused."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def kind(self) -> str:
        """bpe, char or byte for our own; otherwise the model's name in lower case."""
        if not self._is_byte_level:
            plain = self._model.get("type") == "BPE" and not self._model.get("merges")
            return "char" if plain else str(self._model.get("type", "unknown")).lower()
        return "bpe" if self._model.get("merges") else "byte"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides which ids a text gets."""
        canonical = json.dumps(json.loads(self.backend.to_str()), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def end_of_text(self) -> int | None:
        """Id of the token between documents, or None when the tokenizer has none."""
        return self._id_of(END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")

    @cached_property
    def unknown(self) -> int | None:
        """Id of the token for what the vocabulary lacks, or None when it lacks nothing."""
        token = self._model.get("unk_token")
        return self.backend.token_to_id(token) if token else None

    def _id_of(self, *tokens: str) -> int | None:
        ids = (self.backend.token_to_id(token) for token in tokens)
        return next((id for id in ids if id is not None), None)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, no special token added."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_pieces(self, pieces: Iterable[Piece]) -> Iterator[tuple[np.ndarray, bool]]:
        """(ids as uint32, whether they begin a document) for each piece, in order, encoded on all cores."""
        batch: list[Piece] = []
        size = 0
        for piece in pieces:
            batch.append(piece)
            size += len(piece.text)
            if size >= _BATCH_CHARACTERS:
                yield from self._encode_batch(batch)
                batch, size = [], 0
        yield from self._encode_batch(batch)

    def _encode_batch(self, batch: Sequence[Piece]) -> Iterator[tuple[np.ndarray, bool]]:
        encodings = self.backend.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            yield np.array(encoding.ids, dtype=np.uint32), piece.starts_document

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 on their own become U+FFFD. Raises `InputError` for an unknown id."""
        return self._bytes_of(ids).decode("utf-8", "replace")

    def _bytes_of(self, ids: Iterable[int]) -> bytes:
        table, ids = self.token_bytes, list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < len(table):
            raise InputError(f"an id is not below the vocabulary's size {self.vocab_size}, or is negative")
        return b"".join(table[id] for id in ids)

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(self.token_bytes)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """What each id stands for, as bytes. Special tokens stand for nothing, except the unknown one: U+FFFD."""
        special = {id for id, token in self.backend.get_added_tokens_decoder().items() if token.special}
        special |= {id for id in (self.end_of_text, self.unknown) if id is not None}
        to_bytes = byte_level_table() if self._is_byte_level else None
        table = []
        for id in range(self.vocab_size):
            token = self.backend.id_to_token(id) or ""
            if id in special:
                table.append("\ufffd".encode() if id == self.unknown else b"")
            elif to_bytes is not None and all(character in to_bytes for character in token):
                table.append(bytes(to_bytes[character] for character in token))
            else:
                table.append(token.encode("utf-8"))
        return table

    @cached_property
    def token_byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, as int64 (vocabulary size,)."""
        return np.array([len(token) for token in self.token_bytes], dtype=np.int64)

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = json.loads(self.backend.to_str())["decoder"]
        return bool(decoder) and decoder.get("type") == "ByteLevel"


class StreamDecoder:
    """Decodes ids as they come and never shows half a character."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters that `id` completes; often one token's text, sometimes nothing."""
        return self._decoder.decode(self._token_bytes[id])

    def finish(self) -> str:
        """U+FFFD for a character that was begun and never completed, else nothing."""
        return self._decoder.decode(b"", final=True)


def byte_level_table() -> dict[str, int]:
    """GPT-2's reversible map between bytes and printable characters (Radford et al. 2019, released code), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}
