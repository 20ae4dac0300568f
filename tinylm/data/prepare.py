"""Turn a recipe's text into tokens on disk: scan and split the text, train the tokenizer, and encode.

Tokenizers and tokens are cached. The cache key of the tokens is a hash of the text's content, the split and the tokenizer, so a
changed text or tokenizer never uses stale tokens, and an unchanged text is encoded only once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tinylm.data import shards
from tinylm.data.shards import Shard
from tinylm.data.workers import encode_in_parallel
from tinylm.errors import InputError
from tinylm.paths import cache_folder
from tinylm.recipe.schema import BpeTokenizer, DataSection, FileTokenizer, HeldoutShare, TokenizerSection
from tinylm.reporting import Advance, Reporter
from tinylm.text import split
from tinylm.text.sources import Corpus, Piece, describe
from tinylm.text.split import Scan, Split
from tinylm.tokenizer import Tokenizer, training
from tinylm.tokenizer.dropout import DropoutEncoder

_CACHE_VERSION = 2
_MAX_SKIPPED_NOTES = 3
EncodePieces = Callable[[Iterable[Piece]], Iterator[tuple[np.ndarray, bool]]]
"""Encodes a text and yields (ids, whether they start a document)."""


@dataclass(frozen=True)
class SplitText:
    """A text that has been opened, scanned and split into two parts, "train" and "heldout"."""

    train_corpus: Corpus
    heldout_corpus: Corpus
    train_scan: Scan
    heldout_scan: Scan
    split: Split | None
    """None if the held-out text has its own sources."""

    def pieces(self, part: str) -> Iterator[Piece]:
        """Yield the text of a part. Raises `InputError` if its source has changed since the scan."""
        if self.split is not None:
            return self.split.select(_check_unchanged(self.train_corpus, self.train_scan), part)
        if part == "train":
            return _check_unchanged(self.train_corpus, self.train_scan)
        return _check_unchanged(self.heldout_corpus, self.heldout_scan)

    @property
    def fingerprint(self) -> str:
        """A hash of the content of both parts and of the boundaries between them."""
        boundaries = b"" if self.split is None else self.split.boundaries.astype("<i8").tobytes()
        return _digest(self.train_scan.fingerprint, self.heldout_scan.fingerprint, hashlib.sha256(boundaries).hexdigest())

    def sizes(self, part: str) -> tuple[int, int]:
        """Return (documents, characters) of a part."""
        if self.split is None:
            scan = self.train_scan if part == "train" else self.heldout_scan
            return scan.documents, scan.characters
        boundaries, lengths = self.split.boundaries, self.split.lengths
        characters = boundaries if part == "train" else lengths - boundaries
        return int((characters > 0).sum()), int(characters.sum())


@dataclass(frozen=True)
class PreparedData:
    """A tokenizer and the tokens of both parts of a text, ready for training."""

    tokenizer: Tokenizer
    train: Shard
    heldout: Shard
    folder: Path
    """The cache folder that contains the tokens."""
    fingerprint: str
    """A hash of the text, the split and the tokenizer."""


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def prepare(data: DataSection, tokenizer: TokenizerSection, reporter: Reporter, workers: int = 1) -> PreparedData:
    """Prepare a text for training. The result is the same for any number of worker processes.

    Raises `InputError` if the text cannot be read or split, or if no tokenizer can be trained on it.
    """
    with ExitStack() as stack:
        return prepare_text(open_text(data, reporter, stack), tokenizer, reporter, workers)


def prepare_text(text: SplitText, section: TokenizerSection, reporter: Reporter, workers: int = 1) -> PreparedData:
    """Like `prepare`, but for a text that is already open."""
    tokenizer = _load_or_train_tokenizer(text, section, reporter)
    _check_end_of_text(tokenizer)
    tokenizer.encoder.note = reporter.note
    dropout = section.dropout if isinstance(section, BpeTokenizer) else 0.0
    fingerprint = _digest(
        text.fingerprint, tokenizer.fingerprint, str(_CACHE_VERSION), *([f"dropout {dropout}"] if dropout else [])
    )
    folder = cache_folder("tokens", fingerprint)
    encode_heldout: EncodePieces = partial(encode_in_parallel, tokenizer, workers=workers)
    encode_train = DropoutEncoder(tokenizer, dropout).encode_pieces if dropout else encode_heldout
    train = _open_or_encode(folder, "train", text, tokenizer, encode_train, reporter)
    heldout = _open_or_encode(folder, "heldout", text, tokenizer, encode_heldout, reporter)
    _warn_about_unknown_tokens(heldout, reporter)
    return PreparedData(tokenizer, train, heldout, folder, fingerprint)


def open_prepared(folder: Path, fingerprint: str, tokenizer_json: str) -> PreparedData:
    """Open data that another process has prepared, given its folder, its fingerprint and the content of its tokenizer.json."""
    train, heldout = (shards.open_shard(folder, part) for part in ("train", "heldout"))
    return PreparedData(Tokenizer.from_text(tokenizer_json), train, heldout, folder, fingerprint)


def _check_end_of_text(tokenizer: Tokenizer) -> None:
    """Raise `InputError` if there is no end-of-text token, or if a text can be encoded to it."""
    end_of_text = tokenizer.end_of_text
    if end_of_text is None:
        raise InputError("the tokenizer has no end-of-text token", where="tokenizer.path", hint="add <|endoftext|> to it")
    token = str(tokenizer.backend.id_to_token(end_of_text))
    if end_of_text in tokenizer.encode(token):
        raise InputError(
            f"the text {token} encodes to the end-of-text token",
            where="tokenizer.path",
            hint='set "special": true for this token under added_tokens',
        )


def open_text(data: DataSection, reporter: Reporter, stack: ExitStack) -> SplitText:
    """Open, scan and split a text, and report its sizes. Closing `stack` closes the text.

    Raises `InputError` if the text is empty or cannot be split.
    """
    corpus = stack.enter_context(Corpus(data.train, field=data.field, errors=data.errors))
    scan = _scan(corpus, reporter)
    heldout = data.heldout
    if isinstance(heldout, HeldoutShare):
        split_by = split.by_document if heldout.by == "document" else split.by_tail
        text_split = split_by(scan, heldout.share)
        text = SplitText(corpus, corpus, scan, scan, text_split)
        repeated = split.repeated_documents(scan.hashes[text_split.boundaries > 0], scan.hashes[text_split.boundaries == 0])
        split_description = f"{heldout.share:.0%} by {heldout.by}"
    else:
        heldout_corpus = stack.enter_context(Corpus(heldout.sources, field=data.field, errors=data.errors))
        text = SplitText(corpus, heldout_corpus, scan, _scan(heldout_corpus, reporter), None)
        repeated = split.repeated_documents(scan.hashes, text.heldout_scan.hashes)
        split_description = describe(heldout.sources)
    _report_sizes(text, split_description, repeated, reporter)
    return text


def _report_sizes(text: SplitText, split_description: str, repeated: int, reporter: Reporter) -> None:
    """Report the sizes of both parts. Raises `InputError` if one part is empty."""
    documents, characters = text.sizes("train")
    heldout_documents, heldout_characters = text.sizes("heldout")
    if not characters or not heldout_characters:
        raise InputError(
            "the split leaves no training text or no held-out text",
            where="data.heldout",
            hint="use more text or a different share",
        )
    reporter.note(
        f"text: {characters:,} characters in {_count_documents(documents)} for training, {heldout_characters:,} in "
        f"{_count_documents(heldout_documents)} held out ({split_description})"
    )
    if text.split is not None and text.split.cuts_a_document:
        reporter.note("the split cuts a document in two; the held-out text starts inside it")
    if repeated:
        reporter.warn(
            f"{repeated:,} of {heldout_documents:,} held-out documents also occur in the training text, "
            "so held-out scores will be too good"
        )


def _count_documents(count: int) -> str:
    return f"{count:,} document{'' if count == 1 else 's'}"


def _check_unchanged(corpus: Corpus, scan: Scan) -> Iterator[Piece]:
    """Yield the pieces of a corpus. Raises `InputError` if its sizes differ from the scan's sizes.

    The scan determines the cache key, so the tokens of a changed text would be cached under the key of the old text.
    """
    documents = characters = 0
    for piece in corpus.pieces():
        documents += piece.starts_document
        characters += len(piece.text)
        if documents > scan.documents or characters > scan.characters:
            break
        yield piece
    if (documents, characters) != (scan.documents, scan.characters):
        raise InputError(
            "the text changed while it was read", where=describe(corpus.sources), hint="try again, or use a copy of the text"
        )


def _scan(corpus: Corpus, reporter: Reporter) -> Scan:
    """Read a corpus once, and report which files were skipped."""
    for path in corpus.skipped[:_MAX_SKIPPED_NOTES]:
        reporter.note(f"skipped {path}: not text")
    if len(corpus.skipped) > _MAX_SKIPPED_NOTES:
        reporter.note(f"skipped {len(corpus.skipped) - _MAX_SKIPPED_NOTES} more files that are not text")
    with reporter.progress("reading", None, "B") as advance:
        scan = split.scan(corpus.pieces(), advance)
    if not scan.characters:
        raise InputError("the text is empty", where=describe(corpus.sources))
    return scan


def _load_or_train_tokenizer(text: SplitText, section: TokenizerSection, reporter: Reporter) -> Tokenizer:
    if isinstance(section, FileTokenizer):
        return Tokenizer.load(section.path)
    settings = section.model_dump(exclude={"allow_smaller", "dropout"})
    key = _digest(text.fingerprint, json.dumps(settings), str(_CACHE_VERSION))
    path = cache_folder("tokenizers") / f"{key}.json"
    if path.exists():
        tokenizer = Tokenizer.load(path)
        training.check_size(tokenizer, section, reporter.warn)
        reporter.note(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens (from the cache)")
        return tokenizer
    with reporter.progress("training the tokenizer", text.train_scan.bytes, "B") as advance:
        pieces = _report_progress(text.pieces("train"), advance)
        tokenizer = training.train(section, pieces, reporter.warn, text.train_scan.bytes)
    tokenizer.save(path)
    reporter.note(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens")
    return tokenizer


def _report_progress(pieces: Iterator[Piece], advance: Advance) -> Iterator[Piece]:
    done = 0
    for piece in pieces:
        yield piece
        done += len(piece.text)
        advance(done)


def _open_or_encode(
    folder: Path, part: str, text: SplitText, tokenizer: Tokenizer, encode_pieces: EncodePieces, reporter: Reporter
) -> Shard:
    """Open the tokens of a part, encoding them first if they are not in the cache."""
    if not (folder / f"{part}.json").exists():
        with reporter.progress(f"encoding {part}", text.sizes(part)[1], "B") as advance:
            encode_to_shard(folder, part, text.pieces(part), tokenizer, advance, encode_pieces)
    return shards.open_shard(folder, part)


def encode_to_shard(
    folder: Path,
    name: str,
    pieces: Iterator[Piece],
    tokenizer: Tokenizer,
    advance: Advance,
    encode_pieces: EncodePieces | None = None,
) -> Shard:
    """Encode a text into `folder/name.npy` and memory-map it. `encode_pieces` defaults to `tokenizer.encode_pieces`.

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


def _warn_about_unknown_tokens(heldout: Shard, reporter: Reporter) -> None:
    unknown = heldout.counts.unknown_tokens
    if unknown:
        reporter.warn(
            f"{unknown:,} held-out tokens are unknown to the tokenizer, so bits per byte will be too low "
            "(use tokenizer kind bpe or byte)"
        )
