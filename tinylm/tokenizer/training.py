"""Train a tokenizer on a stream of text.

bpe, unigram, wordpiece and word learn from counted words; char takes every character seen; byte is the 256 bytes. Each gives one
tokenizer.json that other libraries load, and the same text always gives the same file. The end-of-text token comes last.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from tinylm.errors import InputError
from tinylm.recipe.schema import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    FileTokenizer,
    LearnedTokenizer,
    TokenizerSection,
    UnigramTokenizer,
    VocabularyTokenizer,
    WordPieceTokenizer,
    WordTokenizer,
)
from tinylm.text.sources import Piece
from tinylm.tokenizer import merges, splits, unigram
from tinylm.tokenizer.counting import Words, character_counts, count_characters, count_words, warn_of_binary
from tinylm.tokenizer.splits import byte_level_table
from tinylm.tokenizer.tokenizer import BYTE_TOKENS, END_OF_TEXT, UNKNOWN, Tokenizer

Warn = Callable[[str], None]

CONTINUING = "##"
NEVER = -1000.0
"""The score of pieces that text must never choose by their spelling: bytes and the unknown token."""


def train(section: TokenizerSection, pieces: Iterable[Piece], warn: Warn, size: int | None = None) -> Tokenizer:
    """The tokenizer that `section` describes, learned from `pieces`, which are `size` bytes in all where that is known.

    `warn` hears of what the user should know: a text that supports fewer tokens than asked for, text without borders, what looks
    like a binary file. Raises `InputError` for a wrong pattern, a text without characters, or a vocabulary too large for the text.
    """
    if isinstance(section, FileTokenizer):
        return Tokenizer.load(section.path)
    if isinstance(section, VocabularyTokenizer):
        pieces = _thinned(section, pieces, size, warn)
    tokenizer = learn(section, count(section, pieces, warn))
    check_size(tokenizer, section, warn)
    return tokenizer


def count(section: LearnedTokenizer, pieces: Iterable[Piece], warn: Warn) -> Words:
    """The words of a text as `section` normalises and divides it; they serve for every vocabulary size."""
    if isinstance(section, ByteTokenizer):
        return Words([], np.zeros(0, dtype=np.int64))
    backend = _prepared(section)
    pieces = warn_of_binary(pieces, warn)
    if isinstance(section, CharTokenizer):
        return count_characters(backend, pieces)
    return count_words(backend, splits.borders_of(json.loads(backend.to_str())), pieces, warn)


def learn(section: LearnedTokenizer, words: Words) -> Tokenizer:
    """The tokenizer of counted words. Raises `InputError` when there are none."""
    if not words.texts and not isinstance(section, ByteTokenizer):
        raise InputError("no characters to make a vocabulary of", where="tokenizer")
    backend = _prepared(section)
    backend.model = _model(section, words)
    _add_tokens(backend, section)
    return Tokenizer(backend)


def check_size(tokenizer: Tokenizer, section: TokenizerSection, warn: Warn) -> None:
    """Say, or with `allow_smaller` off raise `InputError`, that the text had fewer tokens to give than were asked for."""
    if not isinstance(section, VocabularyTokenizer) or tokenizer.vocab_size >= section.vocab_size:
        return
    found, wanted = f"{tokenizer.vocab_size:,}", f"{section.vocab_size:,}"
    if not section.allow_smaller:
        raise InputError(
            f"the text does not support {wanted} tokens: the largest vocabulary that fits has {found}",
            where="tokenizer.vocab_size",
            hint="ask for that, or allow a smaller one",
        )
    warn(f"the text supports {found} tokens, fewer than tokenizer.vocab_size {wanted}")


def _thinned(section: VocabularyTokenizer, pieces: Iterable[Piece], size: int | None, warn: Warn) -> Iterator[Piece]:
    """Every n-th piece, so that at most `max_megabytes` of a text of `size` bytes remain."""
    every = math.ceil((size or 0) / (section.max_megabytes * 1_000_000)) or 1
    if every > 1:
        warn(f"words are counted in 1/{every} of the text (tokenizer.max_megabytes {section.max_megabytes})")
    for piece in itertools.islice(pieces, 0, None, every):
        yield Piece(piece.text, True) if every > 1 else piece  # what is no longer beside each other is not joined


def _bytes() -> list[str]:
    return sorted(byte_level_table())


def _is_byte_level(section: LearnedTokenizer) -> bool:
    return isinstance(section, ByteTokenizer) or (isinstance(section, BpeTokenizer) and section.alphabet == "bytes")


def _prepared(section: LearnedTokenizer) -> tokenizers.Tokenizer:
    """Everything but the model: how text is normalised and divided, and how tokens become text again."""
    backend = tokenizers.Tokenizer(models.WordLevel({UNKNOWN: 0}, unk_token=UNKNOWN))  # until there is a model
    if section.normalize:
        backend.normalizer = normalizers.Sequence([step for name in section.normalize for step in _NORMALIZERS[name]()])
    steps: list[pre_tokenizers.PreTokenizer] = []
    if isinstance(section, (BpeTokenizer, UnigramTokenizer)):
        steps = splits.pre_tokenizer(section.split, section.digits)
    elif isinstance(section, (WordPieceTokenizer, WordTokenizer)):
        backend.pre_tokenizer = splits.pre_tokenizer_without_spaces(section.split)
    if _is_byte_level(section):
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        backend.decoder = decoders.ByteLevel()
    elif isinstance(section, (BpeTokenizer, UnigramTokenizer)):
        backend.decoder = (
            decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]) if section.byte_fallback else decoders.Fuse()
        )
    elif isinstance(section, WordPieceTokenizer):
        backend.decoder = decoders.WordPiece(prefix=CONTINUING, cleanup=False)
    elif isinstance(section, CharTokenizer):
        backend.decoder = decoders.Fuse()
    if steps:
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    return backend


_NORMALIZERS: dict[str, Callable[[], Sequence[normalizers.Normalizer]]] = {
    "nfc": lambda: [normalizers.NFC()],
    "nfd": lambda: [normalizers.NFD()],
    "nfkc": lambda: [normalizers.NFKC()],
    "nfkd": lambda: [normalizers.NFKD()],
    "lowercase": lambda: [normalizers.Lowercase()],
    "strip_accents": lambda: [normalizers.NFD(), normalizers.StripAccents(), normalizers.NFC()],
}


def _model(section: LearnedTokenizer, words: Words) -> models.Model:
    if isinstance(section, ByteTokenizer):
        return models.BPE(vocab={letter: id for id, letter in enumerate(_bytes())}, merges=[])
    if isinstance(section, BpeTokenizer):
        return _byte_pairs(section, words) if section.alphabet == "bytes" else _character_pairs(section, words)
    if isinstance(section, UnigramTokenizer):
        return _unigram(section, words)
    if isinstance(section, WordPieceTokenizer):
        return _word_piece(section, words)
    if isinstance(section, WordTokenizer):
        room = _room(section) - 1
        kept = [word for word, count in zip(words.texts, words.counts.tolist(), strict=True) if count >= section.min_frequency]
        return models.WordLevel({token: id for id, token in enumerate([UNKNOWN, *kept[:room]])}, unk_token=UNKNOWN)
    assert isinstance(section, CharTokenizer)
    counted = zip(words.texts, words.counts.tolist(), strict=True)
    tokens = [*sorted(character for character, count in counted if count >= section.min_frequency), END_OF_TEXT, UNKNOWN]
    return models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=[], unk_token=UNKNOWN, fuse_unk=False)


def _room(section: VocabularyTokenizer) -> int:
    """Tokens for the model itself, without those that are added to it."""
    return section.vocab_size - 1 - len(section.special_tokens) - len(section.added_tokens)


def _byte_pairs(section: BpeTokenizer, words: Words) -> models.Model:
    learned = merges.learn(
        words, _bytes(), None, _room(section), min_frequency=section.min_frequency, longest=section.max_token_length
    )
    return models.BPE(vocab={token: id for id, token in enumerate(learned.tokens)}, merges=learned.written())


def _character_pairs(section: BpeTokenizer, words: Words) -> models.Model:
    reserved = [*BYTE_TOKENS] if section.byte_fallback else [UNKNOWN]
    room = _room(section) - len(reserved)
    learned = merges.learn(
        words,
        _alphabet(section.alphabet, words, room),
        None,
        room,
        min_frequency=section.min_frequency,
        longest=section.max_token_length,
        reserved={*reserved},
    )
    return models.BPE(
        vocab={token: id for id, token in enumerate([*reserved, *learned.tokens])},
        merges=learned.written(),
        unk_token=None if section.byte_fallback else UNKNOWN,
        fuse_unk=False,
        byte_fallback=section.byte_fallback,
    )


def _alphabet(wanted: int | str, words: Words, room: int) -> list[str]:
    """The characters that are tokens of their own, in code point order. Raises `InputError` when there is no room for them."""
    counted = character_counts(words)
    chosen = list(counted) if wanted == "text" else list(counted)[:wanted] if isinstance(wanted, int) else sorted({*wanted})
    if len(chosen) > room:
        raise InputError(
            f"the alphabet has {len(chosen):,} characters, and {max(0, room):,} find room in the vocabulary",
            where="tokenizer.vocab_size",
            hint=f"ask for {len(chosen) - room:,} more, or for a smaller tokenizer.alphabet",
        )
    return sorted(chosen)


def _unigram(section: UnigramTokenizer, words: Words) -> models.Model:
    reserved = [UNKNOWN, *(BYTE_TOKENS if section.byte_fallback else [])]
    room = _room(section) - len(reserved)
    spelled = {*"".join(reserved)}  # so that text that spells a reserved piece can be written without it
    alphabet = sorted(spelled | {*_alphabet(section.alphabet, words, max(0, room))})
    if len(alphabet) > room:
        _alphabet("".join(alphabet), words, room)
    pieces = unigram.learn(words, alphabet, room, longest=section.max_token_length)
    pieces = [(piece, score) for piece, score in pieces if piece not in reserved]
    return models.Unigram([*((token, NEVER) for token in reserved), *pieces], unk_id=0, byte_fallback=section.byte_fallback)


def _word_piece(section: WordPieceTokenizer, words: Words) -> models.Model:
    room = _room(section) - 1
    alphabet = _alphabet(section.alphabet, words, room // 2)
    inner = [CONTINUING + character for character in alphabet]
    learned = merges.learn(
        words, alphabet, inner, room, min_frequency=section.min_frequency, longest=section.max_token_length, join=_continued
    )
    vocabulary = {token: id for id, token in enumerate([UNKNOWN, *learned.tokens])}
    return models.WordPiece(vocabulary, unk_token=UNKNOWN, continuing_subword_prefix=CONTINUING, max_input_chars_per_word=100)


def _continued(left: str, right: str) -> str:
    return left + right.removeprefix(CONTINUING)


def _add_tokens(backend: tokenizers.Tokenizer, section: LearnedTokenizer) -> None:
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in section.added_tokens])
    special = [*section.special_tokens, END_OF_TEXT, *([UNKNOWN] if backend.token_to_id(UNKNOWN) is not None else [])]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
