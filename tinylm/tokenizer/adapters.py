"""A common interface to tokenizers from several libraries, for comparing them.

It supports tokenizer.json files (from tinylm and Hugging Face), tiktoken ranks, and sentencepiece models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinylm.errors import InputError, missing_extra
from tinylm.text.sources import Piece
from tinylm.tokenizer.backend_errors import translate_backend_errors
from tinylm.tokenizer.encoding import segments
from tinylm.tokenizer.pretokenizer import split_pattern
from tinylm.tokenizer.split_points import SplitPoints
from tinylm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tiktoken


@dataclass(frozen=True)
class TokenizerAdapter:
    """A tokenizer from any library, with the interface that reports and comparisons use."""

    kind: str
    vocab_size: int
    unknown: int | None
    """The id of the token for text outside the vocabulary."""
    token_bytes: Sequence[bytes]
    """The text of each token, by id."""
    split_points: SplitPoints | None
    encode: Callable[[bytes], np.ndarray]
    """Encodes one segment of UTF-8 text (see `segments`) to uint32 ids."""
    encode_batch: Callable[[Sequence[str]], list[list[int]]]
    """Encodes many short texts at once."""
    decode: Callable[[Sequence[int]], str]

    def segments(self, pieces: Iterable[Piece]) -> Iterator[tuple[bytes, bool]]:
        """Divide a text into segments for `encode`, and yield (UTF-8 text, whether it begins a document)."""
        return segments(pieces, self.split_points)


def adapt(tokenizer: Tokenizer) -> TokenizerAdapter:
    """Wrap a `Tokenizer`."""

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        with translate_backend_errors():
            return [encoding.ids for encoding in tokenizer.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    return TokenizerAdapter(
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        unknown=tokenizer.unknown,
        token_bytes=tokenizer.token_bytes,
        split_points=tokenizer.split_points,
        encode=tokenizer.encoder.encode,
        encode_batch=encode_batch,
        decode=tokenizer.decode,
    )


def open_tokenizer(path: str) -> TokenizerAdapter:
    """Open the tokenizer at `path`. Raises `InputError` if it does not exist or cannot be read.

    `path` is one of:

    - a tokenizer.json, or a folder that contains one (a run, a Hugging Face model)
    - `FILE.tiktoken` or `FILE.tiktoken:SPLIT`: a tiktoken rank file. SPLIT is its split pattern (default: llama3, as in cl100k)
    - `tiktoken:NAME`: an encoding that tiktoken provides, for example `tiktoken:gpt2`
    - `FILE.model`: a sentencepiece model
    """
    if path.startswith("tiktoken:"):
        return _tiktoken_by_name(path)
    file, _, split = path.rpartition(":") if ".tiktoken:" in path else (path, "", "llama3")
    if file.endswith(".tiktoken"):
        return _tiktoken_from_ranks(path, file, split)
    if path.endswith(".model"):
        return _sentencepiece(path)
    return adapt(Tokenizer.load(Path(path) / "tokenizer.json" if Path(path).is_dir() else path))


def _tiktoken_by_name(path: str) -> TokenizerAdapter:
    try:
        import tiktoken
    except ImportError:
        raise missing_extra("compare", "reading tiktoken's vocabularies") from None
    try:
        encoding = tiktoken.get_encoding(path.removeprefix("tiktoken:"))
    except Exception as error:  # an unknown name, or a failed download
        raise InputError(f"tiktoken cannot load this encoding: {error}".splitlines()[0], where=path) from None
    return _adapt_tiktoken(encoding)


def _tiktoken_from_ranks(path: str, file: str, split: str) -> TokenizerAdapter:
    try:
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe
    except ImportError:
        raise missing_extra("compare", "reading tiktoken's vocabularies") from None
    if not Path(file).is_file():
        raise InputError("no such tokenizer file", where=file)
    try:
        ranks = load_tiktoken_bpe(str(Path(file).absolute()))
    except Exception as error:  # the parser raises exceptions of several types
        raise InputError(f"not a tiktoken rank file: {error}", where=file) from None
    try:
        encoding = tiktoken.Encoding(path, pat_str=split_pattern(split, None), mergeable_ranks=ranks, special_tokens={})
    except Exception as error:
        raise InputError(f"tiktoken cannot use these ranks: {error}", where=path) from None
    return _adapt_tiktoken(encoding)


def _adapt_tiktoken(encoding: tiktoken.Encoding) -> TokenizerAdapter:
    table = [b""] * encoding.n_vocab
    for token in encoding.token_byte_values():
        table[encoding.encode_single_token(token)] = token
    return TokenizerAdapter(
        kind="tiktoken bpe",
        vocab_size=encoding.n_vocab,
        unknown=None,
        token_bytes=table,
        split_points=None,
        encode=lambda text: np.array(encoding.encode_ordinary(text.decode("utf-8")), dtype=np.uint32),
        encode_batch=lambda texts: [encoding.encode_ordinary(text) for text in texts],
        decode=encoding.decode,
    )


def _sentencepiece(path: str) -> TokenizerAdapter:
    try:
        import sentencepiece
    except ImportError:
        raise missing_extra("compare", "reading sentencepiece models") from None
    if not Path(path).is_file():
        raise InputError("no such tokenizer file", where=path)
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
        raise InputError(f"not a sentencepiece model: {error}", where=path) from None

    def bytes_of(id: int) -> bytes:
        if model.is_byte(id):  # for example <0x41>
            return bytes([int(model.id_to_piece(id)[3:5], 16)])
        if model.is_control(id):
            return b""
        return "\ufffd".encode() if model.is_unknown(id) else str(model.id_to_piece(id)).replace("▁", " ").encode()

    size = model.get_piece_size()
    return TokenizerAdapter(
        kind="sentencepiece",
        vocab_size=size,
        unknown=model.unk_id(),
        token_bytes=[bytes_of(id) for id in range(size)],
        split_points=None,
        encode=lambda text: np.array(model.encode(text.decode("utf-8")), dtype=np.uint32),
        encode_batch=lambda texts: model.encode(list(texts)),
        decode=lambda ids: model.decode(list(map(int, ids))),
    )
