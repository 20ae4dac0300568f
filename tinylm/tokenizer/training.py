"""Train a tokenizer on a stream of text.

bpe: byte-level byte-pair encoding through `tokenizers`, deterministic. char: one token per character seen, in code point
order. byte: the 256 bytes. Every vocabulary ends with the end-of-text token (and, for char, the unknown one).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from tinylm.errors import InputError
from tinylm.recipe.schema import BpeTokenizer, ByteTokenizer, FileTokenizer, TokenizerSection
from tinylm.text.sources import Piece
from tinylm.tokenizer.tokenizer import END_OF_TEXT, UNKNOWN, Tokenizer

Warn = Callable[[str], None]

_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,{digits}}}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

LONGEST_RUN = 256
RUNS_BUDGET = 1 << 20


def split_pattern(section: BpeTokenizer) -> str:
    """The regular expression between whose matches no merge reaches."""
    if section.split == "gpt4":
        return _GPT4.format(digits=section.digits or 2)
    return _GPT2 if section.split == "gpt2" else section.split


def train(section: TokenizerSection, pieces: Iterable[Piece], warn: Warn, size: int | None = None) -> Tokenizer:
    """The tokenizer that `section` describes, learned from `pieces`, which are `size` bytes in all where that is known.

    `warn` hears of what the user should know: a text that supports fewer tokens than asked for, text without borders.
    Raises `InputError` for a wrong pattern or a text without characters.
    """
    if isinstance(section, FileTokenizer):
        return Tokenizer.load(section.path)
    if isinstance(section, BpeTokenizer):
        return _train_bpe(section, _thinned(section, pieces, size, warn), warn)
    if isinstance(section, ByteTokenizer):
        return _byte_level(models.BPE(vocab={c: i for i, c in enumerate(_alphabet())}, merges=[]), None)
    return _train_char(pieces)


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _byte_level(model: models.Model, pattern: str | None) -> Tokenizer:
    backend = tokenizers.Tokenizer(model)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        backend.pre_tokenizer = byte_level
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(backend)


def _train_bpe(section: BpeTokenizer, pieces: Iterable[Piece], warn: Warn) -> Tokenizer:
    pattern = split_pattern(section)
    scratch = tokenizers.Tokenizer(models.BPE())
    try:
        scratch.pre_tokenizer = _byte_level(models.BPE(), pattern).backend.pre_tokenizer
    except Exception as error:  # tokenizers raises plain Exception for a pattern it cannot compile
        raise InputError(f"{section.split!r} is not a regular expression: {error}", where="tokenizer.split") from None
    trainer = trainers.BpeTrainer(
        vocab_size=section.vocab_size - 1,
        initial_alphabet=_alphabet(),
        show_progress=False,
        special_tokens=[],
    )
    scratch.train_from_iterator(_without_endless_runs(pieces, warn), trainer)
    tokenizer = _byte_level(scratch.model, pattern)
    if tokenizer.vocab_size < section.vocab_size:
        warn_of_smaller(tokenizer, section.vocab_size, warn)
    return tokenizer


def _thinned(section: BpeTokenizer, pieces: Iterable[Piece], size: int | None, warn: Warn) -> Iterator[Piece]:
    """Every n-th piece, so that at most `most_megabytes` of a text of `size` bytes remain."""
    every = math.ceil((size or 0) / (section.most_megabytes * 1_000_000)) or 1
    if every > 1:
        warn(f"merges are learned from 1/{every} of the text (tokenizer.most_megabytes {section.most_megabytes})")
    yield from itertools.islice(pieces, 0, None, every)


def warn_of_smaller(tokenizer: Tokenizer, wanted: int, warn: Warn) -> None:
    """Say that the text had fewer tokens to give than the recipe wanted."""
    warn(f"the text supports {tokenizer.vocab_size:,} tokens, fewer than tokenizer.vocab_size {wanted:,}")


def _without_endless_runs(pieces: Iterable[Piece], warn: Warn) -> Iterator[str]:
    """The text with runs of letters, digits or signs that no pattern splits cut short, and only the first part of them kept.

    Every merge visits every word that holds the pair: on a text without borders (DNA) that is the whole text for each of
    thousands of merges. A megabyte of such runs is enough to learn their merges.
    """
    more = f"{{{LONGEST_RUN + 1},}}"
    endless = re.compile(rf"[^\W\d_]{more}|\d{more}|[^\w\s]{more}")
    kept = left_out = 0

    def shorten(match: re.Match[str]) -> str:
        nonlocal kept, left_out
        run = match[0]
        keep = run[: max(0, RUNS_BUDGET - kept)]
        kept += len(keep)
        left_out += len(run) - len(keep)
        return " ".join(keep[start : start + LONGEST_RUN] for start in range(0, len(keep), LONGEST_RUN))

    for piece in pieces:
        yield endless.sub(shorten, piece.text)
    if left_out:
        warn(
            f"{left_out + kept:,} characters stand in runs of more than {LONGEST_RUN} without a border; "
            f"merges were learned from the first {kept:,} of them"
        )


def _train_char(pieces: Iterable[Piece]) -> Tokenizer:
    characters: set[str] = set()
    for piece in pieces:
        characters.update(piece.text)
    if not characters:
        raise InputError("no characters to make a vocabulary of", where="tokenizer")
    tokens = [*sorted(characters), END_OF_TEXT, UNKNOWN]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, fuse_unk=False))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (END_OF_TEXT, UNKNOWN)])
    return Tokenizer(backend)
