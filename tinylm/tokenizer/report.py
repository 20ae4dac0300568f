"""Evaluate how well a tokenizer fits a text: compression, token frequencies, unknown tokens, split words and lossless decoding."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tinylm.errors import InputError
from tinylm.paths import cache_folder, cached_file
from tinylm.recipe.schema import BpeTokenizer
from tinylm.text.sources import Corpus, Piece
from tinylm.tokenizer import training
from tinylm.tokenizer.adapters import TokenizerAdapter, adapt
from tinylm.tokenizer.tokenizer import Tokenizer

RENYI_ALPHA = 2.5
RARE_COUNT = 5
"""Tokens that are used at least once but fewer than this many times are reported as rare."""
BASELINE_TEXT = "builtin:python-docs"
_MAX_FAILURES = 5
_MAX_EXCERPT = 40
_MAX_SPLIT_WORDS = 300_000
"""`words_split` considers only this many of the most frequent distinct words."""
_MAX_TOKEN_LENGTH = 16


@dataclass(frozen=True)
class FileReport:
    """The metrics of a tokenizer on one file of a text."""

    name: str
    bytes: int
    tokens: int
    bytes_per_token: float
    unknown_tokens: int


@dataclass(frozen=True)
class RoundTripFailure:
    """A line that decoding did not restore, with excerpts of the line and of the decoded text around the first difference."""

    file: str
    line: int
    text: str
    decoded: str


@dataclass(frozen=True)
class TokenizerReport:
    """The metrics of one tokenizer on one text. The field names are the keys of `tinylm tokenize report --json`."""

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
    """The fraction of whitespace-separated words that are split into several tokens."""
    unused_tokens: int
    rare_tokens: int
    """Number of tokens that are used at least once but fewer than `RARE_COUNT` times."""
    unknown_tokens: int
    renyi_efficiency: float
    """The Rényi entropy of order 2.5 of the token frequencies, divided by the log of the vocabulary size (Zouhar et al. 2023,
    "Tokenization and the Noiseless Channel")."""
    round_trip_failures: int
    """Number of lines that decoding did not restore exactly."""
    encode_megabytes_per_second: float
    frequent_tokens: list[tuple[str, int]]
    longest_tokens: list[str]
    token_lengths: list[int]
    """Number of tokens in the text with 0, 1, 2, ... bytes. The last entry includes all longer tokens."""
    failures: list[RoundTripFailure]
    """The first few round-trip failures."""
    files: list[FileReport]


def build_report(tokenizer: Tokenizer | TokenizerAdapter, files: Iterable[tuple[str, Iterable[Piece]]]) -> TokenizerReport:
    """Encode and decode a text. `files` yields (name, pieces) for each file. Raises `InputError` if the text is empty."""
    adapter = adapt(tokenizer) if isinstance(tokenizer, Tokenizer) else tokenizer
    totals = _Totals(adapter)
    for name, pieces in files:
        totals.add_file(name, pieces)
    n_bytes, counts, words = sum(file.bytes for file in totals.files), totals.counts, totals.words
    if not n_bytes:
        raise InputError("the text is empty")
    tokens, table = int(counts.sum()), adapter.token_bytes
    used = np.flatnonzero(counts)
    frequent = used[np.argsort(-counts[used], kind="stable")][:10]
    longest = sorted((int(id) for id in used), key=lambda id: (-len(table[id]), id))[:10]
    capped_lengths = np.minimum([len(token) for token in table], _MAX_TOKEN_LENGTH)
    return TokenizerReport(
        kind=adapter.kind,
        vocab_size=adapter.vocab_size,
        documents=totals.documents,
        bytes=n_bytes,
        characters=totals.characters,
        words=words.total(),
        tokens=tokens,
        bytes_per_token=n_bytes / max(tokens, 1),
        tokens_per_word=tokens / max(words.total(), 1),
        words_split=_share_of_split_words(adapter, words),
        unused_tokens=int((counts == 0).sum()),
        rare_tokens=int(((counts > 0) & (counts < RARE_COUNT)).sum()),
        unknown_tokens=_unknown_count(adapter, counts),
        renyi_efficiency=_renyi_efficiency(counts),
        round_trip_failures=totals.n_failures,
        encode_megabytes_per_second=n_bytes / 1e6 / max(totals.encode_seconds, 1e-9),
        frequent_tokens=[(table[id].decode("utf-8", "replace"), int(counts[id])) for id in frequent],
        longest_tokens=[table[id].decode("utf-8", "replace") for id in longest],
        token_lengths=np.bincount(capped_lengths, counts, minlength=_MAX_TOKEN_LENGTH + 1).astype(int).tolist(),
        failures=totals.failures,
        files=totals.files,
    )


class _Totals:
    """Running totals over the files of a text."""

    def __init__(self, adapter: TokenizerAdapter) -> None:
        self._adapter = adapter
        self.counts = np.zeros(adapter.vocab_size, dtype=np.int64)
        """How often each token occurs."""
        self.words: Counter[str] = Counter()
        self.documents = self.characters = self.n_failures = 0
        self.encode_seconds = 0.0
        self.files: list[FileReport] = []
        self.failures: list[RoundTripFailure] = []

    def add_file(self, name: str, pieces: Iterable[Piece]) -> None:
        adapter = self._adapter
        n_bytes, counts_before, line = 0, self.counts.copy(), 1
        for segment, starts_document in adapter.segments(pieces):
            start = time.perf_counter()
            ids = adapter.encode(segment)
            self.encode_seconds += time.perf_counter() - start
            self.counts += np.bincount(ids, minlength=len(self.counts))
            text = segment.decode("utf-8")
            self.documents += starts_document
            n_bytes += len(segment)
            self.characters += len(text)
            self.words.update(text.split())
            if adapter.decode(ids.tolist()) != text:
                failures = _round_trip_failures(adapter, name, line, text)
                self.n_failures += len(failures)
                self.failures += failures[: _MAX_FAILURES - len(self.failures)]
            line += text.count("\n")
        counts = self.counts - counts_before
        tokens = int(counts.sum())
        self.files.append(FileReport(name, n_bytes, tokens, n_bytes / max(tokens, 1), _unknown_count(adapter, counts)))


def _unknown_count(adapter: TokenizerAdapter, counts: np.ndarray) -> int:
    return int(counts[adapter.unknown]) if adapter.unknown is not None else 0


def _round_trip_failures(adapter: TokenizerAdapter, file: str, first_line: int, text: str) -> list[RoundTripFailure]:
    """Return the lines of a text that decoding does not restore, or the whole text if every line is restored separately."""
    lines = text.splitlines(keepends=True)
    failures = []
    for number, (line, ids) in enumerate(zip(lines, adapter.encode_batch(lines), strict=True), first_line):
        if (decoded := adapter.decode(ids)) != line:
            failures.append(RoundTripFailure(file, number, *_excerpts(line, decoded)))
    if failures:
        return failures
    return [RoundTripFailure(file, first_line, *_excerpts(text, adapter.decode(adapter.encode_batch([text])[0])))]


def _excerpts(text: str, decoded: str) -> tuple[str, str]:
    """Return excerpts of both texts around their first difference."""
    differences = (i for i, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b)
    first_difference = next(differences, min(len(text), len(decoded)))
    start = max(0, first_difference - _MAX_EXCERPT // 2)
    return text[start : start + _MAX_EXCERPT], decoded[start : start + _MAX_EXCERPT]


def _share_of_split_words(adapter: TokenizerAdapter, words: Counter[str]) -> float:
    """Return the fraction of words with several tokens, ignoring whitespace tokens. Each word is encoded with a leading space."""
    common = words.most_common(_MAX_SPLIT_WORDS)
    is_visible = np.array([bool(token.strip()) for token in adapter.token_bytes])
    encoded = adapter.encode_batch([f" {word}" for word, _ in common])
    split = sum(count for (_, count), ids in zip(common, encoded, strict=True) if is_visible[ids].sum() > 1)
    return split / max(sum(count for _, count in common), 1)


def _renyi_efficiency(counts: np.ndarray) -> float:
    """See `TokenizerReport.renyi_efficiency`."""
    if not counts.any():
        return 0.0
    shares = counts[counts > 0] / counts.sum()
    entropy = np.log(np.sum(shares**RENYI_ALPHA)) / (1 - RENYI_ALPHA)
    return float(entropy / np.log(len(counts))) if len(counts) > 1 else 0.0


def gpt2_style(vocab_size: int) -> Tokenizer:
    """Return a baseline tokenizer: byte-level BPE with GPT-2's split pattern, trained on `BASELINE_TEXT` and cached."""
    section = BpeTokenizer(kind="bpe", vocab_size=min(max(vocab_size, 257), 50_257), split="gpt2")
    with Corpus([BASELINE_TEXT]) as corpus:
        path = cache_folder("tokenizers") / f"gpt2-style-{section.vocab_size}.json"
        cached_file(path, lambda temporary: training.train(section, corpus.pieces(), lambda warning: None).save(temporary))
    return Tokenizer.load(path)


def bytes_per_token(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> float:
    n_bytes = tokens = 0
    for text, _ in adapt(tokenizer).segments(pieces):
        n_bytes += len(text)
        tokens += len(tokenizer.encoder.encode(text))
    return n_bytes / max(tokens, 1)
