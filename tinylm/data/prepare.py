"""From a recipe's text to tokens on disk: scan, split, train the tokenizer, encode; each result cached by what decides it.

The cache key of the tokens is made of the text's content, the split and the tokenizer, so a changed text or tokenizer can
never meet old tokens, and an unchanged one is never encoded twice.
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
from tinylm.data.workers import encoded
from tinylm.errors import InputError
from tinylm.paths import cache_folder
from tinylm.recipe.schema import BpeTokenizer, DataSection, FileTokenizer, HeldoutShare, TokenizerSection
from tinylm.reporting import Advance, Reporter
from tinylm.text import split
from tinylm.text.sources import Corpus, Piece, describe
from tinylm.text.split import Scan, Split
from tinylm.tokenizer import Tokenizer, training
from tinylm.tokenizer.dropout import DropoutEncoder

_FORMAT = 2
EncodePieces = Callable[[Iterable[Piece]], Iterator[tuple[np.ndarray, bool]]]


@dataclass(frozen=True)
class Text:
    """Both halves of a text, scanned and split but not yet read into anything."""

    train_corpus: Corpus
    heldout_corpus: Corpus
    train_scan: Scan
    heldout_scan: Scan
    split: Split | None
    """None when the held-out text is a source of its own."""

    def pieces(self, half: str) -> Iterator[Piece]:
        """The text of a half. Raises `InputError` when its source is no longer what was scanned."""
        if self.split is not None:
            return self.split.select(_as_scanned(self.train_corpus, self.train_scan), half)
        if half == "train":
            return _as_scanned(self.train_corpus, self.train_scan)
        return _as_scanned(self.heldout_corpus, self.heldout_scan)

    @property
    def fingerprint(self) -> str:
        """Of both halves: their text and which is which."""
        boundaries = b"" if self.split is None else self.split.boundaries.astype("<i8").tobytes()
        return _digest(self.train_scan.fingerprint, self.heldout_scan.fingerprint, hashlib.sha256(boundaries).hexdigest())

    def sizes(self, half: str) -> tuple[int, int]:
        """(documents, characters) of a half."""
        if self.split is None:
            found = self.train_scan if half == "train" else self.heldout_scan
            return found.documents, found.characters
        boundaries, lengths = self.split.boundaries, self.split.lengths
        parts = boundaries if half == "train" else lengths - boundaries
        return int((parts > 0).sum()), int(parts.sum())


@dataclass(frozen=True)
class Prepared:
    """What training needs of a text."""

    tokenizer: Tokenizer
    train: Shard
    heldout: Shard
    folder: Path
    """Where the tokens lie in the cache."""
    fingerprint: str
    """Of the tokens: text, split and tokenizer."""


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def prepare(data: DataSection, tokenizer: TokenizerSection, reporter: Reporter, workers: int = 1) -> Prepared:
    """Everything up to the tokens, which so many processes encode: the same whatever their number.

    Raises `InputError` for a text that cannot be read, split or learned from.
    """
    with ExitStack() as stack:
        return prepare_text(open_text(data, reporter, stack), tokenizer, reporter, workers)


def prepare_text(text: Text, tokenizer: TokenizerSection, reporter: Reporter, workers: int = 1) -> Prepared:
    """The tokens of a text that is open."""
    trained = _tokenizer(text, tokenizer, reporter)
    _check_end_of_text(trained)
    trained.encoder.note = reporter.note
    share = tokenizer.dropout if isinstance(tokenizer, BpeTokenizer) else 0.0
    key = _digest(text.fingerprint, trained.fingerprint, str(_FORMAT), *([f"dropout {share}"] if share else []))
    folder = cache_folder("tokens", key)
    plainly = partial(encoded, trained, workers=workers)
    encoders: dict[str, EncodePieces] = {
        "train": DropoutEncoder(trained, share).encode_pieces if share else plainly,
        "heldout": plainly,
    }
    halves = {half: _shard(folder, half, text, trained, encoders[half], reporter) for half in encoders}
    _warn_of_unknown(halves["heldout"], reporter)
    return Prepared(trained, halves["train"], halves["heldout"], folder, key)


def reopened(folder: Path, fingerprint: str, tokenizer: str) -> Prepared:
    """What another process has prepared: its folder and fingerprint, and the text of its tokenizer.json."""
    halves = {half: shards.open_shard(folder, half) for half in ("train", "heldout")}
    return Prepared(Tokenizer.from_text(tokenizer), halves["train"], halves["heldout"], folder, fingerprint)


def _check_end_of_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.end_of_text
    if end is None:
        raise InputError("the tokenizer has no end-of-text token", where="tokenizer.path", hint="add <|endoftext|> to it")
    written = str(tokenizer.backend.id_to_token(end))
    if end in tokenizer.encode(written):
        raise InputError(
            f"a text that holds {written} would hold the end-of-text token",
            where="tokenizer.path",
            hint='mark it "special": true under added_tokens',
        )


def open_text(data: DataSection, reporter: Reporter, stack: ExitStack) -> Text:
    """Open, scan and split the text; say on the reporter what came out. `stack` closes it."""
    corpus = stack.enter_context(Corpus(data.train, field=data.field, errors=data.errors))
    found = _scan(corpus, reporter)
    heldout = data.heldout
    if isinstance(heldout, HeldoutShare):
        divide = split.by_document if heldout.by == "document" else split.by_tail
        division = divide(found, heldout.share)
        text = Text(corpus, corpus, found, found, division)
        first, second = division.boundaries > 0, division.boundaries == 0
        repeated = split.repeated_documents(found.hashes[first], found.hashes[second])
        how = f"{heldout.share:.0%} by {heldout.by}"
    else:
        other = stack.enter_context(Corpus(heldout.sources, field=data.field, errors=data.errors))
        text = Text(corpus, other, found, _scan(other, reporter), None)
        repeated = split.repeated_documents(found.hashes, text.heldout_scan.hashes)
        how = describe(heldout.sources)
    documents, characters = text.sizes("train")
    held_documents, held_characters = text.sizes("heldout")
    if not characters or not held_characters:
        raise InputError("one half of the split is empty", where="data.heldout", hint="use more text or another share")
    reporter.note(
        f"text: {characters:,} characters in {_documents(documents)} to learn, {held_characters:,} in "
        f"{_documents(held_documents)} held out ({how})"
    )
    if text.split is not None and text.split.cuts_a_document:
        reporter.note("the held-out half begins inside a document, which is cut in two")
    if repeated:
        reporter.warn(
            f"{repeated:,} of {held_documents:,} held-out documents also occur in training; held-out numbers will flatter"
        )
    return text


def _documents(count: int) -> str:
    return f"{count:,} document{'' if count == 1 else 's'}"


def _as_scanned(corpus: Corpus, found: Scan) -> Iterator[Piece]:
    """The pieces of a corpus, as long as they are as many as were scanned: tokens are kept under the scanned text's name."""
    documents = characters = 0
    for piece in corpus.pieces():
        documents += piece.starts_document
        characters += len(piece.text)
        if documents > found.documents or characters > found.characters:
            break
        yield piece
    if (documents, characters) != (found.documents, found.characters):
        raise InputError("the text changed while it was read", where=describe(corpus.sources), hint="try again, or work on a copy")


def _scan(corpus: Corpus, reporter: Reporter) -> Scan:
    for path in corpus.skipped[:3]:
        reporter.note(f"skipped {path}: not text")
    if len(corpus.skipped) > 3:
        reporter.note(f"skipped {len(corpus.skipped) - 3} more files that are not text")
    with reporter.progress("reading", None, "B") as advance:
        found = split.scan(corpus.pieces(), advance)
    if not found.characters:
        raise InputError("the text is empty", where=describe(corpus.sources))
    return found


def _tokenizer(text: Text, section: TokenizerSection, reporter: Reporter) -> Tokenizer:
    if isinstance(section, FileTokenizer):
        return Tokenizer.load(section.path)
    decisive = section.model_dump(exclude={"allow_smaller", "dropout"})
    key = _digest(text.fingerprint, json.dumps(decisive), str(_FORMAT))
    path = cache_folder("tokenizers") / f"{key}.json"
    if path.exists():
        tokenizer = Tokenizer.load(path)
        training.check_size(tokenizer, section, reporter.warn)
        reporter.note(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens (from the cache)")
        return tokenizer
    with reporter.progress("training the tokenizer", text.train_scan.bytes, "B") as advance:
        tokenizer = training.train(section, _watched(text.pieces("train"), advance), reporter.warn, text.train_scan.bytes)
    tokenizer.save(path)
    reporter.note(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens")
    return tokenizer


def _watched(pieces: Iterator[Piece], advance: Advance) -> Iterator[Piece]:
    done = 0
    for piece in pieces:
        yield piece
        done += len(piece.text)
        advance(done)


def _shard(folder: Path, half: str, text: Text, tokenizer: Tokenizer, encode_pieces: EncodePieces, reporter: Reporter) -> Shard:
    if not (folder / f"{half}.json").exists():
        with reporter.progress(f"encoding {half}", text.sizes(half)[1], "B") as advance:
            encode(folder, half, text.pieces(half), tokenizer, advance, encode_pieces)
    return shards.open_shard(folder, half)


def encode(
    folder: Path,
    name: str,
    pieces: Iterator[Piece],
    tokenizer: Tokenizer,
    advance: Advance,
    encode_pieces: EncodePieces | None = None,
) -> Shard:
    """Write a text's tokens as `folder/name.npy` and map them; `encode_pieces`: another way to ids than the tokenizer's own."""
    size = characters = 0

    def measured() -> Iterator[Piece]:
        nonlocal size, characters
        for piece in pieces:
            size += len(piece.text.encode("utf-8"))
            characters += len(piece.text)
            advance(characters)
            yield piece

    end_of_text = tokenizer.end_of_text
    assert end_of_text is not None
    shards.write(
        folder,
        name,
        (encode_pieces or tokenizer.encode_pieces)(measured()),
        vocab_size=tokenizer.vocab_size,
        end_of_text=end_of_text,
        unknown=tokenizer.unknown,
        sizes=lambda: (size, characters),
    )
    return shards.open_shard(folder, name)


def _warn_of_unknown(heldout: Shard, reporter: Reporter) -> None:
    unknown = heldout.counts.unknown_tokens
    if unknown:
        reporter.warn(
            f"{unknown:,} held-out tokens are unknown to the tokenizer: bits per byte will look better than they are "
            "(use tokenizer kind bpe or byte)"
        )
