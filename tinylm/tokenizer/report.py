"""How well a tokenizer fits a text: compression, coverage, balance, words split, and whether decoding gives the text back."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tinylm.errors import InputError
from tinylm.paths import cache_folder
from tinylm.recipe.schema import BpeTokenizer
from tinylm.text.sources import Corpus, Piece
from tinylm.tokenizer import training
from tinylm.tokenizer.codec import Codec, codec_of
from tinylm.tokenizer.tokenizer import Tokenizer

RENYI_ALPHA = 2.5
RARE = 5
BASELINE_TEXT = "builtin:python-docs"
_SHOWN = 5
_MOST_WORDS = 300_000
_LONGEST_SHOWN = 40


@dataclass(frozen=True)
class FileFigures:
    """One file of the text."""

    name: str
    bytes: int
    tokens: int
    bytes_per_token: float
    unknown_tokens: int


@dataclass(frozen=True)
class RoundTripFailure:
    """A line that decoding did not give back: around the first difference, what stood there and what came back."""

    file: str
    line: int
    text: str
    decoded: str


@dataclass(frozen=True)
class TokenizerReport:
    """Figures of one tokenizer on one text; the names are the keys of `tinylm tokenize report --json`."""

    kind: str
    vocab_size: int
    documents: int
    bytes: int
    characters: int
    words: int
    tokens: int
    bytes_per_token: float
    tokens_per_word: float
    words_split: float
    """Share of the words between white space that are more than one token."""
    unused_tokens: int
    rare_tokens: int
    """Tokens used, but fewer than `RARE` times."""
    unknown_tokens: int
    renyi_efficiency: float
    """Rényi entropy of order 2.5 of the token frequencies over log of the vocabulary (Zouhar et al. 2023)."""
    round_trip_failures: int
    """Lines of text that decoding did not give back exactly."""
    encode_megabytes_per_second: float
    frequent_tokens: list[tuple[str, int]]
    longest_tokens: list[str]
    token_lengths: list[int]
    """How many of the text's tokens have 0, 1, 2, ... bytes; the last entry is for all longer ones."""
    failures: list[RoundTripFailure]
    """The first few of them."""
    files: list[FileFigures]


def report(tokenizer: Tokenizer | Codec, files: Iterable[tuple[str, Iterable[Piece]]]) -> TokenizerReport:
    """Encode and decode a text, given as (name, pieces) of its files, and count. Raises `InputError` when it is empty."""
    codec = codec_of(tokenizer) if isinstance(tokenizer, Tokenizer) else tokenizer
    counts = np.zeros(codec.vocab_size, dtype=np.int64)
    words: Counter[str] = Counter()
    documents = characters = failed = 0
    seconds = 0.0
    listed: list[FileFigures] = []
    failures: list[RoundTripFailure] = []
    for name, pieces in files:
        size, before, line = 0, counts.copy(), 1
        for text, starts in codec.encoded(pieces):
            start = time.perf_counter()
            ids = codec.encode(text)
            seconds += time.perf_counter() - start
            counts += np.bincount(ids, minlength=len(counts))
            written = text.decode("utf-8")
            documents += starts
            size += len(text)
            characters += len(written)
            words.update(written.split())
            if codec.decode(ids.tolist()) != written:
                found = _failures(codec, name, line, written)
                failed += len(found)
                failures += found[: _SHOWN - len(failures)]
            line += written.count("\n")
        here = counts - before
        tokens, unknown = int(here.sum()), int(here[codec.unknown]) if codec.unknown is not None else 0
        listed.append(FileFigures(name, size, tokens, size / max(tokens, 1), unknown))
    size, tokens = sum(file.bytes for file in listed), int(counts.sum())
    if not size:
        raise InputError("the text is empty")
    table = codec.token_bytes
    used = np.flatnonzero(counts)
    frequent = used[np.argsort(-counts[used], kind="stable")][:10]
    longest = sorted((int(id) for id in used), key=lambda id: (-len(table[id]), id))[:10]
    lengths = np.bincount(np.minimum([len(token) for token in table], 16), counts, minlength=17)
    return TokenizerReport(
        kind=codec.kind,
        vocab_size=codec.vocab_size,
        documents=documents,
        bytes=size,
        characters=characters,
        words=words.total(),
        tokens=tokens,
        bytes_per_token=size / max(tokens, 1),
        tokens_per_word=tokens / max(words.total(), 1),
        words_split=_share_split(codec, words),
        unused_tokens=int((counts == 0).sum()),
        rare_tokens=int(((counts > 0) & (counts < RARE)).sum()),
        unknown_tokens=int(counts[codec.unknown]) if codec.unknown is not None else 0,
        renyi_efficiency=_renyi_efficiency(counts),
        round_trip_failures=failed,
        encode_megabytes_per_second=size / 1e6 / max(seconds, 1e-9),
        frequent_tokens=[(table[id].decode("utf-8", "replace"), int(counts[id])) for id in frequent],
        longest_tokens=[table[id].decode("utf-8", "replace") for id in longest],
        token_lengths=lengths.astype(int).tolist(),
        failures=failures,
        files=listed,
    )


def _failures(codec: Codec, file: str, first: int, text: str) -> list[RoundTripFailure]:
    """The lines of a text that do not come back; the text itself when each line does."""
    lines = text.splitlines(keepends=True)
    found = []
    for number, (line, ids) in enumerate(zip(lines, codec.encode_each(lines), strict=True), first):
        if (decoded := codec.decode(ids)) != line:
            found.append(RoundTripFailure(file, number, *_around_difference(line, decoded)))
    return found or [RoundTripFailure(file, first, *_around_difference(text, codec.decode(codec.encode_each([text])[0])))]


def _around_difference(text: str, decoded: str) -> tuple[str, str]:
    same = next((at for at, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b), min(len(text), len(decoded)))
    start = max(0, same - _LONGEST_SHOWN // 2)
    return text[start : start + _LONGEST_SHOWN], decoded[start : start + _LONGEST_SHOWN]


def _share_split(codec: Codec, words: Counter[str]) -> float:
    """Of the most frequent words, each behind a space, those with more than one token that is not only white space."""
    common = words.most_common(_MOST_WORDS)
    solid = np.array([bool(token.strip()) for token in codec.token_bytes])
    encoded = codec.encode_each([f" {word}" for word, _ in common])
    split = sum(count for (_, count), ids in zip(common, encoded, strict=True) if solid[ids].sum() > 1)
    return split / max(sum(count for _, count in common), 1)


def _renyi_efficiency(counts: np.ndarray) -> float:
    if not counts.any():
        return 0.0
    shares = counts[counts > 0] / counts.sum()
    entropy = np.log(np.sum(shares**RENYI_ALPHA)) / (1 - RENYI_ALPHA)
    return float(entropy / np.log(len(counts))) if len(counts) > 1 else 0.0


def gpt2_style(vocab_size: int) -> Tokenizer:
    """A stock tokenizer to compare with: byte-level BPE with GPT-2's split, learned from `BASELINE_TEXT`; cached."""
    section = BpeTokenizer(kind="bpe", vocab_size=min(max(vocab_size, 257), 50_257), split="gpt2")
    with Corpus([BASELINE_TEXT]) as corpus:
        path = cache_folder("tokenizers") / f"gpt2-style-{section.vocab_size}.json"
        if not path.exists():
            training.train(section, corpus.pieces(), lambda warning: None).save(path)
    return Tokenizer.load(path)


def bytes_per_token(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> float:
    """Bytes of a text over its tokens."""
    size = tokens = 0
    for text, _ in codec_of(tokenizer).encoded(pieces):
        size += len(text)
        tokens += len(tokenizer.encoder.encode(text))
    return size / max(tokens, 1)
