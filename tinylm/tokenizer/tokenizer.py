"""`Tokenizer` converts text to token ids and back. Its vocabulary is in Hugging Face's tokenizer.json format.

Text is never encoded as a control token: if a document contains `<|endoftext|>`, its characters are encoded like any other text.
The `tokenizers` library does not store this setting in the file, so it is set on every load.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers

from tinylm.errors import InputError
from tinylm.file_kinds import identify
from tinylm.paths import atomic_write_text
from tinylm.text.sources import Piece
from tinylm.tokenizer import gpt2_files, sentencepiece_files, tiktoken_files, validation
from tinylm.tokenizer.backend_errors import translate_backend_errors
from tinylm.tokenizer.byte_level import unicode_to_bytes
from tinylm.tokenizer.encoding import SEGMENT_BYTES, Encoder, segments
from tinylm.tokenizer.pretokenizer import flat_steps
from tinylm.tokenizer.split_points import SplitPoints, split_points_of

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""The tokens for single bytes in vocabularies with byte fallback."""
_BYTE_OF_TOKEN = {token: bytes([byte]) for byte, token in enumerate(BYTE_TOKENS)}


class Tokenizer:
    """Encodes and decodes text. Create one with `Tokenizer.load` or `tinylm.tokenizer.training.train`."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.encode_special_tokens = True
        backend.no_truncation()  # a file may enable truncation or padding, which would drop or add tokens
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None  # with BPE dropout, the ids for a text would vary
        self.backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        validation.check_ids(vocabulary)  # before `to_str`, which allocates memory for every id up to the highest
        self.tokenizer_json: dict[str, Any] = json.loads(backend.to_str())
        """The parsed contents of the tokenizer.json."""
        validation.check_growth(self.tokenizer_json)
        validation.check_unknown(self.tokenizer_json, vocabulary)
        self._model: dict[str, Any] = self.tokenizer_json["model"]
        self._decoding = DecodingRules.from_json(self.tokenizer_json)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer file, or the tokenizer file in a folder.

        `path` is a tokenizer.json, GPT-2's vocab.json or merges.txt, a sentencepiece model (`FILE.model`), or a tiktoken rank file
        (`FILE.tiktoken` or `FILE.tiktoken:SPLIT`, where SPLIT is the name of a split or a regular expression). Raises `InputError`
        if the tokenizer is missing, invalid, or not supported.
        """
        rank_file = tiktoken_files.parse_path(str(path))
        if rank_file is not None:
            return cls._converted(tiktoken_files.read(*rank_file, END_OF_TEXT), rank_file[0])
        path = Path(path)
        if path.is_dir():
            path = gpt2_files.tokenizer_file(path)
        if path.name in (gpt2_files.VOCABULARY, gpt2_files.MERGES):
            return cls(gpt2_files.read(path.parent, END_OF_TEXT))
        if path.suffix == tiktoken_files.SUFFIX:
            return cls.load(str(path))
        if path.suffix == sentencepiece_files.SUFFIX:
            return cls._converted(sentencepiece_files.read(str(path), END_OF_TEXT), str(path))
        if not path.is_file():
            raise InputError("no such tokenizer file", where=str(path))
        if kind := identify(path):
            raise InputError(f"this is {kind.name}", where=str(path), hint=kind.hint)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception for a file that it cannot read
            raise InputError(f"not a valid tokenizer.json: {error}", where=str(path)) from None
        return cls._checked(backend, str(path))

    @classmethod
    def _converted(cls, backend: tokenizers.Tokenizer, where: str) -> Tokenizer:
        """Create a tokenizer as its tokenizer.json will be read, so that its fingerprint does not change when it is saved."""
        return cls._checked(tokenizers.Tokenizer.from_str(backend.to_str()), where)

    @classmethod
    def _checked(cls, backend: tokenizers.Tokenizer, where: str) -> Tokenizer:
        """Create a tokenizer and encode a short text with it. Raises `InputError` if it is not supported."""
        try:
            tokenizer = cls(backend)
            validation.check_encoding(backend.encode)
            return tokenizer
        except InputError as error:
            raise InputError(error.message, where=where, hint=error.hint) from None

    @classmethod
    def from_text(cls, text: str) -> Tokenizer:
        """Create a tokenizer from the contents of a tokenizer.json. Raises `InputError` if it is not supported."""
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises plain Exception
            raise InputError(f"not a valid tokenizer.json: {error}") from None
        return cls(backend)

    def save(self, path: str | Path) -> None:
        atomic_write_text(Path(path), self.backend.to_str(pretty=True) + "\n")

    @cached_property
    def vocab_size(self) -> int:
        """The highest id plus one, including special and added tokens. Some lower ids may be unused."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def kind(self) -> str:
        """One of `bpe`, `unigram`, `wordpiece`, `word`, `char` and `byte`."""
        model = str(self._model["type"])
        if model == "BPE" and not self._model["merges"] and not self._model.get("byte_fallback") and not self._splits_words:
            return "byte" if self._decoding.byte_level else "char"
        return {"WordLevel": "word"}.get(model, model.lower())

    @property
    def _splits_words(self) -> bool:
        """Whether the pretokenizer does more than map bytes to characters."""
        steps = flat_steps(self.tokenizer_json.get("pre_tokenizer"), "pretokenizers")
        return any(step["type"] != "ByteLevel" or step.get("use_regex", True) for step in steps)

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the tokenizer.json in canonical form. It covers everything that affects encoding."""
        canonical = json.dumps(json.loads(self.backend.to_str()), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def end_of_text(self) -> int | None:
        """The id of the token between documents, or None if the vocabulary has no such token."""
        ids = (self.backend.token_to_id(token) for token in (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]"))
        return next((id for id in ids if id is not None), None)

    @cached_property
    def unknown(self) -> int | None:
        """The id of the token for text outside the vocabulary, or None if every text can be encoded."""
        if self._model.get("byte_fallback") and all(self.backend.token_to_id(token) is not None for token in BYTE_TOKENS):
            return None
        if self._model["type"] == "Unigram":
            id: int | None = self._model["unk_id"]
            return id
        token = self._model.get("unk_token")
        return self.backend.token_to_id(token) if token else None

    @cached_property
    def split_points(self) -> SplitPoints | None:
        """The positions where a text can be cut without changing its tokens. None if they are not known for the pretokenizer."""
        return split_points_of(self.tokenizer_json)

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder for large texts, which caches the ids of chunks."""
        return Encoder(self.backend, self.tokenizer_json, self.split_points)

    @property
    def is_byte_level(self) -> bool:
        """Whether the tokens are byte sequences, written with GPT-2's characters (see `byte_level`)."""
        return self._decoding.byte_level

    @cached_property
    def merge_ranks(self) -> dict[tuple[str, str], int]:
        """The rank of each merge by its pair of tokens. Rank 0 is applied first. Empty if the tokenizer has no merges."""
        merges = self._model.get("merges", ())
        pairs = (tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in merges)
        return {(left, right): rank for rank, (left, right) in enumerate(pairs)}

    def encode(self, text: str) -> list[int]:
        """Encode a text without adding special tokens. A special token spelled out in the text is encoded as plain text.

        Raises `InputError` if the text contains an unpaired surrogate, or if the split pattern backtracks too much.
        """
        try:
            if len(text) > SEGMENT_BYTES // 4:  # may be more than one segment, because a character has up to 4 bytes
                return [id for ids, _ in self.encode_pieces([Piece(text, True)]) for id in ids.tolist()]
            with translate_backend_errors():
                return list(self.backend.encode(text, add_special_tokens=False).ids)
        except (TypeError, UnicodeEncodeError):  # raised by tokenizers and str.encode for an unpaired surrogate
            raise InputError("the text contains an unpaired surrogate, which UTF-8 cannot encode") from None
        except BaseException as error:  # a panic in Rust code is not an `Exception`
            if type(error).__name__ != "PanicException":
                raise
            raise InputError("the tokenizer cannot split this text", hint=f"its split pattern failed: {error}") from None

    def token_id(self, name: str) -> int:
        """Return the id of a token. `name` is `@ID` or the token's text. Raises `InputError` if there is no such token."""
        if name.startswith("@") and name[1:].isdecimal() and name.isascii() and len(name) < 20:
            id = int(name[1:])
            if id >= self.vocab_size:
                raise InputError(f"{name} is not an id below {self.vocab_size}")
            return id
        special = self.backend.token_to_id(name) if name in (END_OF_TEXT, UNKNOWN) else None
        if special is not None:
            return int(special)
        encoded = name.encode()
        if encoded and encoded in self.token_bytes:
            return self.token_bytes.index(encoded)
        ids = self.encode(name)
        raise InputError(
            f"{name!r} is not a single token but {len(ids)}", hint=f"to specify a token by its id, write @{ids[0] if ids else 0}"
        )

    def encode_pieces(self, pieces: Iterable[Piece]) -> Iterator[tuple[np.ndarray, bool]]:
        """Yield the uint32 ids of each segment, and whether the segment begins a document.

        The ids of a document do not depend on how `pieces` divide the document.
        """
        for text, starts_document in segments(pieces, self.split_points):
            yield self.encoder.encode(text), starts_document

    def encode_pieces_with_special(self, pieces: Iterable[Piece]) -> Iterator[tuple[np.ndarray, bool]]:
        """Like `encode_pieces`, but recognize special tokens spelled out in the text. Each document is encoded as a whole."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        for text, starts_document in segments(pieces, None):
            with translate_backend_errors():
                ids = backend.encode(text.decode("utf-8"), add_special_tokens=False).ids
            yield np.array(ids, dtype=np.uint32), starts_document

    def decode(self, ids: Iterable[int], *, keep_first_space: bool = False) -> str:
        """Decode ids to text. Invalid UTF-8 becomes U+FFFD. Raises `InputError` for an id outside the vocabulary.

        `keep_first_space` is for a text that continues another one. See `space_precedes`.
        """
        table, ids = self.token_bytes, list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < len(table):
            raise InputError(f"ids must be between 0 and {self.vocab_size - 1}")
        decoder = self.byte_decoder(keep_first_space=keep_first_space)
        return b"".join(decoder.push(id) for id in ids).decode("utf-8", "replace")

    def byte_decoder(self, *, keep_first_space: bool = False) -> ByteDecoder:
        return ByteDecoder(self.token_bytes, drop_first_space=self._decoding.space_before != "never" and not keep_first_space)

    def stream_decoder(self, *, keep_first_space: bool = False) -> StreamDecoder:
        return StreamDecoder(self.byte_decoder(keep_first_space=keep_first_space))

    def space_precedes(self, prompt: str, ids: Sequence[int]) -> bool:
        """Whether the first space of a continuation belongs to the text. `ids` are the tokens of the prompt.

        It does not at the start of a document or message, where the last token has no text, or if encoding drops whitespace and the
        prompt already ends with it.
        """
        if not prompt or not ids or not self.token_bytes[ids[-1]]:
            return False
        return self._decoding.space_before == "once" or not prompt[-1].isspace()

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The text of each id as bytes. The text of the unknown token is U+FFFD. Other special tokens have no text.

        If the tokenizer drops whitespace, tokens that begin a word start with a space. Decoding removes the first space of a text.
        """
        added = self.backend.get_added_tokens_decoder()
        special = {id for id, token in added.items() if token.special}
        special |= {id for id in (self.end_of_text, self.unknown) if id is not None}
        space = " " if self._decoding.space_before == "always" else ""
        table = []
        for id in range(self.vocab_size):
            token = self.backend.id_to_token(id) or ""
            if id in special:
                table.append(f"{space}\ufffd".encode() if id == self.unknown else b"")
            elif id in added:
                table.append((space + token).encode("utf-8"))
            else:
                table.append(self._decoding.bytes_of(token))
        return table

    @cached_property
    def token_byte_lengths(self) -> np.ndarray:
        """The length of each id's text in bytes, as int64 (vocabulary size,)."""
        return np.array([len(token) for token in self.token_bytes], dtype=np.int64)


@dataclass(frozen=True)
class DecodingRules:
    """Rules for decoding the tokens of a tokenizer.json. Only decoders that handle each token separately are supported."""

    byte_level: bool
    byte_fallback: bool
    continuation_prefix: str | None
    """Marks a token that continues a word, for example `##` in WordPiece."""
    replacements: tuple[tuple[str, str], ...]
    space_before: Literal["always", "once", "never"]
    """`always`: a space precedes each token that begins a word. `once`: encoding adds one space before the text. In both cases,
    decoding removes the first space of a text."""

    @classmethod
    def from_json(cls, tokenizer_json: Mapping[str, Any]) -> DecodingRules:
        """Read the rules from a parsed tokenizer.json. Raises `InputError` if the decoder is not supported."""
        steps = _decoder_steps(tokenizer_json.get("decoder"))
        kinds = [step["type"] for step in steps]
        unsupported = {*kinds} - {"ByteLevel", "ByteFallback", "Fuse", "WordPiece", "Replace", "Metaspace", "Strip"}
        if unsupported or any("String" not in step["pattern"] for step in steps if step["type"] == "Replace"):
            model = tokenizer_json["model"]["type"].lower()
            names = ", ".join(sorted(unsupported)) or "Replace"
            raise InputError(f"{model} tokenizers with the decoder {names} are not supported")
        replacements = [(step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"]
        replacements += [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
        once = any(step["type"] == "Strip" and step["content"] == " " and step["start"] == 1 for step in steps)
        once |= any(step["type"] == "Metaspace" and step["prepend_scheme"] != "never" for step in steps)
        prefix = next((step["prefix"] for step in steps if step["type"] == "WordPiece"), None)
        return cls(
            byte_level="ByteLevel" in kinds,
            byte_fallback="ByteFallback" in kinds,
            continuation_prefix=prefix,
            replacements=tuple(replacements),
            space_before="always" if prefix is not None or not steps else "once" if once else "never",
        )

    def bytes_of(self, token: str) -> bytes:
        """Return the text of a vocabulary token as bytes."""
        if self.byte_level:
            table = unicode_to_bytes()
            return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode("utf-8")
        if self.byte_fallback and token in _BYTE_OF_TOKEN:
            return _BYTE_OF_TOKEN[token]
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.continuation_prefix is not None and token.startswith(self.continuation_prefix):
            return token[len(self.continuation_prefix) :].encode("utf-8")
        space = " " if self.space_before == "always" else ""
        return (space + token).encode("utf-8")


def _decoder_steps(node: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    return [step for inner in node["decoders"] for step in _decoder_steps(inner)]


class ByteDecoder:
    """Decodes ids one by one to bytes."""

    def __init__(self, token_bytes: Sequence[bytes], *, drop_first_space: bool) -> None:
        self._token_bytes = token_bytes
        self._drop_space = drop_first_space

    def push(self, id: int) -> bytes:
        raw = self._token_bytes[id]
        if self._drop_space and raw:
            self._drop_space = False
            return raw.removeprefix(b" ")
        return raw


class StreamDecoder:
    """Decodes ids one by one to text. Holds back the bytes of an incomplete character until the rest arrives."""

    def __init__(self, decoder: ByteDecoder) -> None:
        self._bytes = decoder
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Return the characters that `id` completes, which may be an empty string."""
        return self._utf8.decode(self._bytes.push(id))

    def finish(self) -> str:
        """Return U+FFFD if the last character is incomplete, otherwise an empty string."""
        return self._utf8.decode(b"", final=True)
