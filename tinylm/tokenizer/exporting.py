"""Export a tokenizer as a tiktoken rank file, and check that the file produces the same ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinylm.errors import InputError, WorkError
from tinylm.paths import atomic_file
from tinylm.text.sources import Piece
from tinylm.tokenizer import tiktoken_files
from tinylm.tokenizer.encoding import segments
from tinylm.tokenizer.tokenizer import END_OF_TEXT, Tokenizer


@dataclass(frozen=True)
class TiktokenExport:
    """What a rank file does not contain but its users need, and how the file was checked."""

    vocab_size: int
    """The number of tokens, including the special tokens."""
    pattern: str
    """The split pattern."""
    special_tokens: dict[str, int]
    tokens_compared: int
    """The number of tokens of a text for which the ids of the rank file are the tokenizer's ids."""
    verified_with: tuple[str, ...]
    """The libraries that encoded this text: tinylm, and tiktoken if it is installed."""


def export_tiktoken(tokenizer: Tokenizer, path: Path, text: Iterable[Piece]) -> TiktokenExport:
    """Write a tokenizer to a rank file, read the file, and encode `text` with it. The file is kept only if all ids are equal.

    Raises `InputError` if tiktoken cannot represent the tokenizer, and `WorkError` if the ids differ.
    """
    pattern, ranks = tiktoken_files.representation(tokenizer.tokenizer_json)
    special = {token["content"]: token["id"] for token in tokenizer.tokenizer_json["added_tokens"]}
    with atomic_file(path) as temporary:
        tiktoken_files.write(temporary, ranks)
        read = Tokenizer(tiktoken_files.read(str(temporary), pattern, END_OF_TEXT))
        encoders: dict[str, Callable[[bytes], np.ndarray]] = {"tinylm": read.encoder.encode}
        if (encode := _tiktoken_encoder(temporary, pattern, special)) is not None:
            encoders["tiktoken"] = encode
        compared = 0
        for segment, _ in segments(text, tokenizer.split_points):
            ids = tokenizer.encoder.encode(segment)
            compared += len(ids)
            for name, encode in encoders.items():
                if not np.array_equal(encode(segment), ids):
                    raise WorkError(f"{name} produces other ids for the exported tokenizer", hint="no file was written")
    return TiktokenExport(tokenizer.vocab_size, pattern, special, compared, tuple(encoders))


def _tiktoken_encoder(file: Path, pattern: str, special: dict[str, int]) -> Callable[[bytes], np.ndarray] | None:
    """Return a function that encodes with tiktoken, or None if tiktoken is not installed."""
    try:
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe
    except ImportError:
        return None
    try:
        ranks = load_tiktoken_bpe(str(file.absolute()))
        encoding = tiktoken.Encoding(file.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    except Exception as error:  # tiktoken raises exceptions of several types
        raise InputError(f"tiktoken cannot load the exported tokenizer: {error}") from None
    return lambda text: np.array(encoding.encode_ordinary(text.decode("utf-8")), dtype=np.uint32)
