"""A common interface to tokenizers from several libraries, for comparing them.

It supports all files that `Tokenizer.load` reads, and the encodings that tiktoken downloads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinylm.errors import InputError, missing_extra
from tinylm.text.sources import Piece
from tinylm.tokenizer.backend_errors import translate_backend_errors
from tinylm.tokenizer.encoding import segments
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

    `path` is anything that `Tokenizer.load` accepts, or `tiktoken:NAME`: an encoding that tiktoken provides, for example
    `tiktoken:gpt2`.
    """
    return _tiktoken_by_name(path) if path.startswith("tiktoken:") else adapt(Tokenizer.load(path))


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
