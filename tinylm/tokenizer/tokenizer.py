"""A tokenizer: text to token ids and back, over one `tokenizer.json` in Hugging Face's format.

Text is text: a document that holds `<|endoftext|>` is encoded as those characters, never as the control token, also after
reloading the file (`tokenizers` does not save that choice; it is set here on every load).
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from tinylm.errors import InputError
from tinylm.paths import write_whole
from tinylm.text.sources import Piece
from tinylm.tokenizer.encoding import UNIT_BYTES, Encoder, units
from tinylm.tokenizer.splits import SplitPoints, borders_of, byte_level_table

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""What stands for a byte in vocabularies of characters."""
_BYTE_OF = {token: bytes([byte]) for byte, token in enumerate(BYTE_TOKENS)}


class Tokenizer:
    """Encodes and decodes. Make one with `Tokenizer.load` or with `tinylm.tokenizer.training.train`."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.encode_special_tokens = True
        backend.no_truncation()  # a file may ask for either, and text would be lost or added
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None  # or the same text would get other ids each time
        self.backend = backend
        self.described: dict[str, Any] = json.loads(backend.to_str())
        """The tokenizer.json, parsed."""
        self._model: dict[str, Any] = self.described["model"]
        self._decoding = Decoding.of(self.described)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json. Raises `InputError` when there is none, it is not one, or of a kind that is not read here."""
        path = Path(path)
        if not path.is_file():
            raise InputError("no such tokenizer file", where=str(path))
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception for a file it cannot read
            raise InputError(f"not a tokenizer.json: {error}", where=str(path)) from None
        try:
            return cls(backend)
        except InputError as error:
            raise InputError(error.message, where=str(path), hint=error.hint) from None

    @classmethod
    def from_text(cls, text: str) -> Tokenizer:
        """The tokenizer that a tokenizer.json with this text holds."""
        return cls(tokenizers.Tokenizer.from_str(text))

    def save(self, path: str | Path) -> None:
        write_whole(Path(path), self.backend.to_str(pretty=True) + "\n")

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id, special and added tokens included; a file may leave ids below it unused."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def kind(self) -> str:
        """bpe, unigram, wordpiece, word, char or byte."""
        model = str(self._model["type"])
        if model == "BPE" and not self._model["merges"]:
            return "byte" if self._decoding.byte_level else "char"
        return {"WordLevel": "word"}.get(model, model.lower())

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
        if self._model.get("byte_fallback") and all(self.backend.token_to_id(token) is not None for token in BYTE_TOKENS):
            return None
        if self._model["type"] == "Unigram":
            id: int | None = self._model["unk_id"]
            return id
        token = self._model.get("unk_token")
        return self.backend.token_to_id(token) if token else None

    def _id_of(self, *tokens: str) -> int | None:
        ids = (self.backend.token_to_id(token) for token in tokens)
        return next((id for id in ids if id is not None), None)

    @cached_property
    def borders(self) -> SplitPoints | None:
        """Where its text may be cut; None when nothing is known of the way it divides text."""
        return borders_of(self.described)

    @cached_property
    def encoder(self) -> Encoder:
        """The fast way to many ids, which keeps what it has met."""
        return Encoder(self.backend, self.described, self.borders)

    @property
    def is_byte_level(self) -> bool:
        """Whether its tokens are bytes, written as GPT-2 writes them."""
        return self._decoding.byte_level

    @cached_property
    def merge_ranks(self) -> dict[tuple[str, str], int]:
        """For BPE: each pair of tokens that is merged, with its place in the order of merges; else empty."""
        merges = self._model.get("merges", ())
        pairs = (tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in merges)
        return {(left, right): rank for rank, (left, right) in enumerate(pairs)}

    def encode(self, text: str) -> list[int]:
        """The ids of a text, none added. Text that spells a special token is text.

        Raises `InputError` for half of a surrogate pair.
        """
        try:
            if len(text) > UNIT_BYTES // 4:  # in bytes it may be more than a unit
                return [id for ids, _ in self.encode_pieces([Piece(text, True)]) for id in ids.tolist()]
            return list(self.backend.encode(text, add_special_tokens=False).ids)
        except (TypeError, UnicodeEncodeError):  # what is said of a string that has no UTF-8
            raise InputError("half of a surrogate pair is not text") from None

    def token(self, named: str) -> int:
        """The id of one token: `@123`, or the token's own text. Raises `InputError` for a text that is several tokens."""
        if named.startswith("@") and named[1:].isdigit():
            id = int(named[1:])
            if id >= self.vocab_size:
                raise InputError(f"{named} is not an id below {self.vocab_size}")
            return id
        special = self.backend.token_to_id(named) if named in (END_OF_TEXT, UNKNOWN) else None
        if special is not None:
            return int(special)
        spoken = named.encode()
        if spoken and spoken in self.token_bytes:
            return self.token_bytes.index(spoken)
        ids = self.encode(named)
        raise InputError(f"{named!r} is not one token but {len(ids)}", hint=f"ids are written @{ids[0] if ids else 0}")

    def encode_pieces(self, pieces: Iterable[Piece]) -> Iterator[tuple[np.ndarray, bool]]:
        """(ids as uint32, whether they begin a document), in order. A document's ids do not depend on how `pieces` cut it."""
        for text, starts in units(pieces, self.borders):
            yield self.encoder.encode(text), starts

    def encode_pieces_with_special(self, pieces: Iterable[Piece]) -> Iterator[tuple[np.ndarray, bool]]:
        """The same, but text that spells a special token becomes that token. Each document is encoded as a whole."""
        obedient = tokenizers.Tokenizer.from_str(self.backend.to_str())
        obedient.encode_special_tokens = False
        for text, starts in units(pieces, None):
            yield np.array(obedient.encode(text.decode("utf-8"), add_special_tokens=False).ids, dtype=np.uint32), starts

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 on their own become U+FFFD. Raises `InputError` for an unknown id."""
        table, ids = self.token_bytes, list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < len(table):
            raise InputError(f"an id is not below the vocabulary's size {self.vocab_size}, or is negative")
        decoder = self.byte_decoder()
        return b"".join(decoder.push(id) for id in ids).decode("utf-8", "replace")

    def byte_decoder(self) -> ByteDecoder:
        return ByteDecoder(self.token_bytes, self._decoding.space_before)

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(self.byte_decoder())

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """What each id stands for, as bytes. Special tokens stand for nothing, except the unknown one: U+FFFD.

        Tokens of kinds that drop white space stand for a space and themselves; of a whole text, the first space goes.
        """
        added = self.backend.get_added_tokens_decoder()
        special = {id for id, token in added.items() if token.special}
        special |= {id for id in (self.end_of_text, self.unknown) if id is not None}
        table = []
        for id in range(self.vocab_size):
            token = self.backend.id_to_token(id) or ""
            if id in special:
                unknown = " \ufffd" if self._decoding.space_before == "always" else "\ufffd"
                table.append(unknown.encode() if id == self.unknown else b"")
            elif id in added:
                table.append(((" " if self._decoding.space_before == "always" else "") + token).encode("utf-8"))
            else:
                table.append(self._decoding.bytes_of(token))
        return table

    @cached_property
    def token_byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, as int64 (vocabulary size,)."""
        return np.array([len(token) for token in self.token_bytes], dtype=np.int64)


@dataclass(frozen=True)
class Decoding:
    """How a tokenizer.json says that tokens become text, as far as tokens can be looked at one by one."""

    byte_level: bool
    byte_fallback: bool
    prefix: str | None
    """What marks a piece inside a word (WordPiece)."""
    replaced: tuple[tuple[str, str], ...]
    space_before: str
    """always: tokens are joined by spaces. once: only the text's first space goes. never: as they are."""

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Decoding:
        """Raises `InputError` for a decoder that is not known here."""
        steps = _decoder_steps(described.get("decoder"))
        kinds = [step["type"] for step in steps]
        unknown = {*kinds} - {"ByteLevel", "ByteFallback", "Fuse", "WordPiece", "Replace", "Metaspace", "Strip"}
        if unknown or any("String" not in step["pattern"] for step in steps if step["type"] == "Replace"):
            model = described["model"]["type"].lower()
            raise InputError(f"{model} tokenizers of this form are not read ({', '.join(sorted(unknown)) or 'Replace'})")
        replaced = [(step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"]
        replaced += [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
        once = any(step["type"] == "Strip" and step["content"] == " " and step["start"] == 1 for step in steps)
        once |= any(step["type"] == "Metaspace" and step["prepend_scheme"] != "never" for step in steps)
        prefix = next((step["prefix"] for step in steps if step["type"] == "WordPiece"), None)
        space = "always" if prefix is not None or not steps else "once" if once else "never"
        return cls("ByteLevel" in kinds, "ByteFallback" in kinds, prefix, tuple(replaced), space)

    def bytes_of(self, token: str) -> bytes:
        if self.byte_level:
            table = byte_level_table()
            return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode("utf-8")
        if self.byte_fallback and token in _BYTE_OF:
            return _BYTE_OF[token]
        for old, new in self.replaced:
            token = token.replace(old, new)
        if self.prefix is not None and token.startswith(self.prefix):
            return token[len(self.prefix) :].encode("utf-8")
        return (" " * (self.space_before == "always") + token).encode("utf-8")


def _decoder_steps(node: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if node is None:
        return []
    return [step for inner in node["decoders"] for step in _decoder_steps(inner)] if node["type"] == "Sequence" else [node]


class ByteDecoder:
    """The bytes of ids as they come."""

    def __init__(self, token_bytes: Sequence[bytes], space_before: str) -> None:
        self._token_bytes = token_bytes
        self._drop_space = space_before != "never"

    def push(self, id: int) -> bytes:
        found = self._token_bytes[id]
        if self._drop_space and found:
            self._drop_space = False
            return found.removeprefix(b" ")
        return found


class StreamDecoder:
    """Decodes ids as they come and never shows half a character."""

    def __init__(self, bytes_of: ByteDecoder) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters that `id` completes; often one token's text, sometimes nothing."""
        return self._decoder.decode(self._bytes_of.push(id))

    def finish(self) -> str:
        """U+FFFD for a character that was begun and never completed, else nothing."""
        return self._decoder.decode(b"", final=True)
