"""One view of any tokenizer for measuring it: ours and Hugging Face's tokenizer.json, tiktoken's ranks, sentencepiece's models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinylm.errors import InputError, need_extra
from tinylm.text.sources import Piece
from tinylm.tokenizer import splits
from tinylm.tokenizer.encoding import units
from tinylm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Codec:
    """What measuring needs of a tokenizer."""

    name: str
    kind: str
    vocab_size: int
    unknown: int | None
    token_bytes: Sequence[bytes]
    """What each id stands for."""
    borders: splits.SplitPoints | None
    encode: Callable[[bytes], np.ndarray]
    """UTF-8 text, cut as `units` cuts it, to ids."""
    encode_each: Callable[[Sequence[str]], list[list[int]]]
    """Many short texts to their ids."""
    decode: Callable[[Sequence[int]], str]

    def encoded(self, pieces: Iterable[Piece]) -> Iterator[tuple[bytes, bool]]:
        """The units of a text, to be given to `encode` one after the other."""
        return units(pieces, self.borders)


def codec_of(tokenizer: Tokenizer, name: str = "") -> Codec:
    def encode_each(texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    return Codec(
        name,
        tokenizer.kind,
        tokenizer.vocab_size,
        tokenizer.unknown,
        tokenizer.token_bytes,
        tokenizer.borders,
        tokenizer.encoder.encode,
        encode_each,
        tokenizer.decode,
    )


def open_codec(path: str) -> Codec:
    """A tokenizer by its file. Raises `InputError` for what is none.

    A tokenizer.json or a folder that holds one (a run, a Hugging Face model); tiktoken ranks (`FILE.tiktoken`, or
    `FILE.tiktoken:SPLIT`; unless named, the split is llama3, which is cl100k's); a name that tiktoken knows (`tiktoken:gpt2`); a
    sentencepiece `.model`.
    """
    if path.startswith("tiktoken:"):
        return _tiktoken_by_name(path)
    file, _, split = path.rpartition(":") if ".tiktoken:" in path else (path, "", "llama3")
    if file.endswith(".tiktoken"):
        return _tiktoken_ranks(path, file, split)
    if path.endswith(".model"):
        return _sentencepiece(path)
    found = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    return codec_of(Tokenizer.load(found), path)


def _tiktoken_by_name(path: str) -> Codec:
    try:
        import tiktoken
    except ImportError:
        raise need_extra("compare", "reading tiktoken's vocabularies") from None
    try:
        encoding = tiktoken.get_encoding(path.removeprefix("tiktoken:"))
    except Exception as error:  # an unknown name, or no network
        raise InputError(f"tiktoken cannot load it: {error}".splitlines()[0], where=path) from None
    return _tiktoken(path, encoding)


def _tiktoken_ranks(path: str, file: str, split: str) -> Codec:
    try:
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe
    except ImportError:
        raise need_extra("compare", "reading tiktoken's vocabularies") from None
    if not Path(file).is_file():
        raise InputError("no such tokenizer file", where=file)
    try:
        ranks = load_tiktoken_bpe(str(Path(file).absolute()))
    except Exception as error:  # whatever its parser stumbles over
        raise InputError(f"not a file of tiktoken ranks: {error}", where=file) from None
    try:
        encoding = tiktoken.Encoding(path, pat_str=splits.pattern_of(split, None), mergeable_ranks=ranks, special_tokens={})
    except Exception as error:
        raise InputError(f"cannot be used: {error}", where=path) from None
    return _tiktoken(path, encoding)


def _tiktoken(name: str, encoding: object) -> Codec:
    import tiktoken

    assert isinstance(encoding, tiktoken.Encoding)
    size = encoding.n_vocab
    table = [b""] * size
    for token in encoding.token_byte_values():
        table[encoding.encode_single_token(token)] = token
    return Codec(
        name,
        "tiktoken bpe",
        size,
        None,
        table,
        None,
        lambda text: np.array(encoding.encode_ordinary(text.decode("utf-8")), dtype=np.uint32),
        lambda texts: [encoding.encode_ordinary(text) for text in texts],
        encoding.decode,
    )


def _sentencepiece(path: str) -> Codec:
    try:
        import sentencepiece
    except ImportError:
        raise need_extra("compare", "reading sentencepiece models") from None
    if not Path(path).is_file():
        raise InputError("no such tokenizer file", where=path)
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
        raise InputError(f"not a sentencepiece model: {error}", where=path) from None
    size = model.get_piece_size()

    def bytes_of(id: int) -> bytes:
        if model.is_byte(id):
            return bytes([int(model.id_to_piece(id)[3:5], 16)])
        if model.is_control(id):
            return b""
        return "\ufffd".encode() if model.is_unknown(id) else str(model.id_to_piece(id)).replace("▁", " ").encode()

    return Codec(
        path,
        "sentencepiece",
        size,
        model.unk_id(),
        [bytes_of(id) for id in range(size)],
        None,
        lambda text: np.array(model.encode(text.decode("utf-8")), dtype=np.uint32),
        lambda texts: model.encode(list(texts)),
        lambda ids: model.decode(list(map(int, ids))),
    )
