"""Train a tokenizer on the training split of a recipe's text, and encode all splits as tokens on disk.

Tokenizers and tokens are cached. The cache key for the tokens is a hash of the text, its splits and the tokenizer. Stale tokens are
therefore never used for a changed text or tokenizer, and an unchanged text is encoded only once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from tinylm.data import prepared_folder, shards, training_text
from tinylm.data.ngrams import NgramSample, open_ngrams, sample_ngrams, save_ngrams
from tinylm.data.prepared import PreparedData
from tinylm.data.shards import Shard
from tinylm.data.source_spans import FILE as SPANS_FILE
from tinylm.data.source_spans import Span, find_spans, open_spans, write_spans
from tinylm.data.split_text import SplitText, open_text
from tinylm.data.training_text import TrainingText
from tinylm.data.workers import encode_in_parallel
from tinylm.errors import InputError
from tinylm.paths import cache_folder, cached_file, clean_cache, temporary_folder
from tinylm.recipe.schema import BpeTokenizer, DataSection, FileTokenizer, TokenizerSection
from tinylm.reporting import Advance, Reporter
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training
from tinylm.tokenizer.dropout import DropoutEncoder

_CACHE_VERSION = 3
NGRAMS_FILE = "train-ngrams.safetensors"
EncodePieces = Callable[[Iterable[Piece]], Iterator[tuple[np.ndarray, bool]]]
"""A function that encodes a text and yields (ids, whether they start a document)."""


class TextParts(Protocol):
    """A text that is divided into splits. The first one is `train`."""

    @property
    def fingerprint(self) -> str:
        """A hash of the content of all splits."""

    @property
    def train_bytes(self) -> int:
        """The approximate size of the training split in bytes."""

    def pieces(self, part: str) -> Iterator[Piece]:
        """Yield the text of a split."""

    def sizes(self, part: str) -> tuple[int, int]:
        """Return the number of documents and characters in a split."""


@dataclass(frozen=True)
class PreparedText(PreparedData):
    """A tokenizer and the tokens of each split of a text."""

    train: Shard
    heldout: Shard
    test: Shard | None = None
    spans: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)
    """For a mixture, the tokens of each source in each split. A split with separate sources has no entry."""

    @property
    def heldout_files(self) -> tuple[str, ...]:
        parts = ("heldout",) if self.test is None else ("heldout", "test")
        return (*(f"{part}.{suffix}" for part in parts for suffix in ("npy", "json")), *([SPANS_FILE] if self.spans else []))

    @property
    def ngrams(self) -> NgramSample:
        """A sample of the n-grams in the training split."""
        return open_ngrams(self.folder / NGRAMS_FILE)


def digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def prepare(data: DataSection, tokenizer: TokenizerSection, reporter: Reporter, workers: int = 1) -> PreparedText:
    """Prepare a text for training. The result is the same for any number of worker processes.

    Raises `InputError` if the text cannot be read or split, or if the tokenizer cannot be trained on it.
    """
    if (folder := prepared_folder.find(data)) is not None:
        return _open_prepared_folder(folder, tokenizer, reporter)
    with ExitStack() as stack:
        return prepare_text(open_text(data, reporter, stack), tokenizer, reporter, workers)


def _open_prepared_folder(folder: Path, section: TokenizerSection, reporter: Reporter) -> PreparedText:
    """Open a folder that `tinylm prepare` wrote. Raises `InputError` if it is damaged or has another tokenizer than the recipe."""
    tokenizer = prepared_folder.load_tokenizer(folder, section)
    train, heldout = (_open_undamaged(folder, part, tokenizer.vocab_size) for part in ("train", "heldout"))
    reporter.note(
        f"text: {train.counts.tokens:,} tokens in {train.counts.documents:,} documents for training, "
        f"{heldout.counts.tokens:,} in {heldout.counts.documents:,} held out (prepared in {folder})"
    )
    fingerprint = digest(prepared_folder.read_manifest(folder)["fingerprint"], tokenizer.fingerprint, str(train.sha256))
    prepared = PreparedText(tokenizer, folder, fingerprint, train, heldout)
    _warn_about_heldout(prepared, TrainingText((str(folder),), prepared.ngrams, tokenizer), reporter)
    return prepared


def prepare_text(text: SplitText, section: TokenizerSection, reporter: Reporter, workers: int = 1) -> PreparedText:
    """Like `prepare`, but for a text that is already open."""
    tokenizer = load_or_train_tokenizer(text, section, reporter)
    tokenizer.encoder.note = reporter.note
    dropout = section.dropout if isinstance(section, BpeTokenizer) else 0.0
    fingerprint = digest(text.fingerprint, tokenizer.fingerprint, str(_CACHE_VERSION), *([f"dropout {dropout}"] if dropout else []))
    folder = cache_folder("tokens", fingerprint)
    encode_heldout: EncodePieces = partial(encode_in_parallel, tokenizer, workers=workers)
    encode_train = DropoutEncoder(tokenizer, dropout).encode_pieces if dropout else encode_heldout
    train = open_or_encode(folder, "train", text, tokenizer, encode_train, reporter)
    ngrams = _sample_training_ngrams(folder, train, text, tokenizer, encode_heldout if dropout else None)
    # The held-out split is encoded last, because its files indicate that everything else is in the cache.
    test = open_or_encode(folder, "test", text, tokenizer, encode_heldout, reporter) if "test" in text.parts else None
    heldout = open_or_encode(folder, "heldout", text, tokenizer, encode_heldout, reporter)
    spans = _record_spans(folder, text, tokenizer, {"train": train, "heldout": heldout, "test": test})
    prepared = PreparedText(tokenizer, folder, fingerprint, train, heldout, test, spans)
    _warn_about_heldout(prepared, TrainingText(text.sources, ngrams, tokenizer), reporter)
    return prepared


def _record_spans(
    folder: Path, text: SplitText, tokenizer: Tokenizer, shards: Mapping[str, Shard | None]
) -> dict[str, tuple[Span, ...]]:
    """Find and save the tokens of each source of a mixture in each split. Return an empty dictionary for other texts."""
    if len(text.texts) == 1:
        return {}
    spans = {
        part: find_spans(shard, text.documents_by_source(part), tokenizer.token_byte_lengths)
        for part, shard in shards.items()
        if shard is not None and text.documents_by_source(part)
    }
    write_spans(folder, spans)
    return spans


def _sample_training_ngrams(
    folder: Path, train: Shard, text: SplitText, tokenizer: Tokenizer, encode_pieces: EncodePieces | None
) -> NgramSample:
    """Open the cached sample of n-grams in the training text, or compute it.

    If `train` was encoded with BPE dropout, its tokens are random. In this case, `encode_pieces` encodes the text again without
    dropout.
    """

    def write(file: Path) -> None:
        if encode_pieces is None:
            save_ngrams(sample_ngrams(train), file)
            return
        with temporary_folder(cache_folder("spool"), "ngrams") as plain:
            shard = encode_to_shard(plain, "train", text.pieces("train"), tokenizer, lambda size: None, encode_pieces)
            save_ngrams(sample_ngrams(shard), file)
            del shard  # Windows cannot remove a file while it is mapped

    return open_ngrams(cached_file(folder / NGRAMS_FILE, write))


def open_prepared(folder: Path, fingerprint: str, tokenizer_json: str) -> PreparedText:
    """Open data that another process has prepared. `tokenizer_json` is the content of its tokenizer.json."""
    train, heldout = (shards.open_shard(folder, part) for part in ("train", "heldout"))
    test = shards.open_shard(folder, "test") if (folder / "test.json").exists() else None
    opened = {"train": train, "heldout": heldout, "test": test}
    spans = {part: open_spans(folder, part, shard) for part, shard in opened.items() if shard is not None}
    spans = {part: of_part for part, of_part in spans.items() if of_part}
    return PreparedText(Tokenizer.from_text(tokenizer_json), folder, fingerprint, train, heldout, test, spans)


def _check_end_of_text(tokenizer: Tokenizer) -> None:
    """Raise `InputError` if the tokenizer has no end-of-text token, or if text can be encoded to it."""
    end_of_text = tokenizer.end_of_text
    if end_of_text is None:
        raise InputError("the tokenizer has no end-of-text token", where="tokenizer.path", hint="add <|endoftext|> to it")
    token = str(tokenizer.backend.id_to_token(end_of_text))
    if end_of_text in tokenizer.encode(token):
        raise InputError(
            f"the text {token} is encoded to the end-of-text token",
            where="tokenizer.path",
            hint='set "special": true for this token under added_tokens',
        )


def load_tokenizer_file(section: FileTokenizer) -> Tokenizer:
    """Load a tokenizer. Raises `InputError` if its end-of-text token is missing, or if text can be encoded to it."""
    tokenizer = Tokenizer.load(section.path)
    _check_end_of_text(tokenizer)
    return tokenizer


def load_or_train_tokenizer(text: TextParts, section: TokenizerSection, reporter: Reporter) -> Tokenizer:
    """Load the recipe's tokenizer from a file or the cache, or train it. No text is encoded to its end-of-text token."""
    if isinstance(section, FileTokenizer):
        return load_tokenizer_file(section)
    settings = section.model_dump(exclude={"allow_smaller", "dropout"})
    key = digest(text.fingerprint, json.dumps(settings), str(_CACHE_VERSION))
    path = cache_folder("tokenizers") / f"{key}.json"
    trained: list[Tokenizer] = []

    def train_tokenizer(temporary: Path) -> None:
        with reporter.progress("training the tokenizer", text.train_bytes, "B") as advance:
            pieces = _report_progress(text.pieces("train"), advance)
            trained.append(training.train(section, pieces, reporter.warn, text.train_bytes))
        trained[0].save(temporary)

    cached_file(path, train_tokenizer, lambda path: reporter.warn(f"{path} is damaged; training the tokenizer again"))
    tokenizer = trained[0] if trained else Tokenizer.load(path)
    if not trained:
        training.check_size(tokenizer, section, reporter.warn)
    reporter.note(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens{'' if trained else ' (from the cache)'}")
    _check_end_of_text(tokenizer)
    return tokenizer


def _report_progress(pieces: Iterator[Piece], advance: Advance) -> Iterator[Piece]:
    done = 0
    for piece in pieces:
        yield piece
        done += len(piece.text)
        advance(done)


def open_or_encode(
    folder: Path, part: str, text: TextParts, tokenizer: Tokenizer, encode_pieces: EncodePieces, reporter: Reporter
) -> Shard:
    """Open the cached tokens of a split. Encode the text if they are missing or damaged."""
    if (folder / f"{part}.json").exists():
        try:
            return _open_undamaged(folder, part, tokenizer.vocab_size)
        except InputError as error:
            reporter.warn(f"{error}; encoding the text again")
    clean_cache()
    with reporter.progress(f"encoding {part}", text.sizes(part)[1], "B") as advance:
        return encode_to_shard(folder, part, text.pieces(part), tokenizer, advance, encode_pieces)


def _open_undamaged(folder: Path, part: str, vocab_size: int) -> Shard:
    """Open cached tokens and verify their hash. Raises `InputError` if they are damaged."""
    shard = shards.open_shard(folder, part)
    problem = shard.problem(vocab_size)
    if problem is not None:
        raise InputError(f"the tokens are damaged: {problem}", where=str(folder / f"{part}.npy"))
    return shard


def encode_to_shard(
    folder: Path,
    name: str,
    pieces: Iterator[Piece],
    tokenizer: Tokenizer,
    advance: Advance,
    encode_pieces: EncodePieces | None = None,
) -> Shard:
    """Encode a text to `folder/name.npy` and memory-map it. `encode_pieces` defaults to `tokenizer.encode_pieces`.

    `advance` is called with the number of characters read so far.
    """
    size = characters = 0

    def counted() -> Iterator[Piece]:
        nonlocal size, characters
        for piece in pieces:
            size += len(piece.text.encode("utf-8"))
            characters += len(piece.text)
            advance(characters)
            yield piece

    end_of_text = tokenizer.end_of_text
    assert end_of_text is not None
    shards.write_shard(
        folder,
        name,
        (encode_pieces or tokenizer.encode_pieces)(counted()),
        vocab_size=tokenizer.vocab_size,
        end_of_text=end_of_text,
        unknown=tokenizer.unknown,
        sizes=lambda: (size, characters),
    )
    return shards.open_shard(folder, name)


def _warn_about_heldout(prepared: PreparedText, trained: TrainingText, reporter: Reporter) -> None:
    """Warn about unknown held-out tokens, and about held-out and test text that also occurs in the training text."""
    _warn_about_unknown_tokens(prepared.heldout, reporter)
    for shard, name in ((prepared.heldout, "the held-out text"), (prepared.test, "the test text")):
        if shard is not None:
            training_text.warn(training_text.measure([trained], shard, prepared.tokenizer), name, reporter)


def _warn_about_unknown_tokens(heldout: Shard, reporter: Reporter) -> None:
    unknown = heldout.counts.unknown_tokens
    if unknown:
        reporter.warn(
            f"{unknown:,} held-out tokens are unknown to the tokenizer, so bits per byte will be too low "
            "(use a tokenizer of the kind bpe or byte)"
        )
