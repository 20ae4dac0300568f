"""Train a tokenizer on a stream of text.

The kinds `bpe`, `unigram`, `wordpiece` and `word` learn their vocabulary from word counts. The vocabulary of `char` is the
characters of the text, and the vocabulary of `byte` is the 256 bytes. The result is a tokenizer.json that other libraries can load.
The same text always produces the same file. The end-of-text token comes after the learned tokens.
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
from tinylm.tokenizer import merges, pretokenizer, unigram
from tinylm.tokenizer.backend_errors import translate_backend_errors
from tinylm.tokenizer.byte_level import unicode_to_bytes
from tinylm.tokenizer.split_points import split_points_of
from tinylm.tokenizer.tokenizer import BYTE_TOKENS, END_OF_TEXT, UNKNOWN, Tokenizer
from tinylm.tokenizer.word_counts import Warn, WordCounts, character_counts, count_characters, count_words, warn_if_binary

CONTINUATION_PREFIX = "##"
RESERVED_SCORE = -1000.0
"""Upper limit for the log probability of Unigram's byte and unknown tokens. It is so low that text that spells out such a token is
encoded with other tokens."""


def train(section: TokenizerSection, pieces: Iterable[Piece], warn: Warn, n_bytes: int | None = None) -> Tokenizer:
    """Train the tokenizer that `section` describes. `pieces` is the text, and `n_bytes` is its size if known.

    `warn` is called if the text is too small for the vocabulary size, contains very long words, or looks like a binary file. Raises
    `InputError` for an invalid split pattern, an empty text, or a text that is too small for the vocabulary size.
    """
    if isinstance(section, FileTokenizer):
        return Tokenizer.load(section.path)
    tokenizer = learn(section, count(section, _subsample(section, pieces, n_bytes, warn), warn))
    check_size(tokenizer, section, warn)
    return tokenizer


def count(section: LearnedTokenizer, pieces: Iterable[Piece], warn: Warn) -> WordCounts:
    """Count the words in a text after normalizing and pretokenizing it. The counts can be reused for any vocabulary size."""
    if isinstance(section, ByteTokenizer):
        return WordCounts([], np.zeros(0, dtype=np.int64))
    backend = _backend_without_model(section)
    pieces = warn_if_binary(pieces, warn)
    with translate_backend_errors():
        if isinstance(section, CharTokenizer):
            return count_characters(backend, pieces)
        return count_words(backend, split_points_of(json.loads(backend.to_str())), pieces, warn)


def learn(section: LearnedTokenizer, word_counts: WordCounts) -> Tokenizer:
    """Learn the tokenizer from the result of `count`. Raises `InputError` if there are no words."""
    if not word_counts.words and not isinstance(section, ByteTokenizer):
        raise InputError("the text has no characters to learn a vocabulary from", where="tokenizer")
    backend = _backend_without_model(section)
    backend.model = _model(section, word_counts)
    for token in section.special_tokens:
        if backend.token_to_id(token) is not None:
            raise InputError(
                f"{token!r} was also learned from the text", where="tokenizer.special_tokens", hint="choose a longer control token"
            )
    _add_tokens(backend, section)
    return Tokenizer(backend)


def check_size(tokenizer: Tokenizer, section: TokenizerSection, warn: Warn) -> None:
    """Warn if the vocabulary is smaller than requested, or raise `InputError` if `allow_smaller` is off."""
    if not isinstance(section, VocabularyTokenizer) or tokenizer.vocab_size >= section.vocab_size:
        return
    actual, requested = f"{tokenizer.vocab_size:,}", f"{section.vocab_size:,}"
    if not section.allow_smaller:
        raise InputError(
            f"the text is too small for {requested} tokens: the largest vocabulary that fits has {actual}",
            where="tokenizer.vocab_size",
            hint="set it to this number, or set allow_smaller",
        )
    warn(f"the text is too small for tokenizer.vocab_size {requested}: the vocabulary has only {actual} tokens")


def sampling_interval(section: TokenizerSection, n_bytes: int, warn: Warn) -> int:
    """Return n if the tokenizer should learn from 1/n of a text of `n_bytes` bytes, so that it uses about `max_megabytes`."""
    if not isinstance(section, VocabularyTokenizer):
        return 1
    every = math.ceil(n_bytes / (section.max_megabytes * 1_000_000)) or 1
    if every > 1:
        warn(f"the tokenizer learns from 1/{every} of the text (tokenizer.max_megabytes {section.max_megabytes})")
    return every


def _subsample(section: TokenizerSection, pieces: Iterable[Piece], n_bytes: int | None, warn: Warn) -> Iterator[Piece]:
    """Yield every n-th piece, so that about `max_megabytes` of the text are used. `n_bytes` is the size of the whole text."""
    every = sampling_interval(section, n_bytes or 0, warn)
    for piece in itertools.islice(pieces, 0, None, every):
        yield Piece(piece.text, True) if every > 1 else piece  # start a new document, because the previous piece was skipped


def _byte_alphabet() -> list[str]:
    return sorted(unicode_to_bytes())


def _is_byte_level(section: LearnedTokenizer) -> bool:
    return isinstance(section, ByteTokenizer) or (isinstance(section, BpeTokenizer) and section.alphabet == "bytes")


def _backend_without_model(section: LearnedTokenizer) -> tokenizers.Tokenizer:
    """Create a tokenizer with the normalizer, pretokenizer and decoder for `section`. Its model is a placeholder."""
    backend = tokenizers.Tokenizer(models.WordLevel({UNKNOWN: 0}, unk_token=UNKNOWN))
    if section.normalize:
        backend.normalizer = normalizers.Sequence([step for name in section.normalize for step in _NORMALIZERS[name]()])
    steps: list[pre_tokenizers.PreTokenizer] = []
    if isinstance(section, (BpeTokenizer, UnigramTokenizer)):
        steps = pretokenizer.split_steps(section.split, section.digits)
    elif isinstance(section, (WordPieceTokenizer, WordTokenizer)):
        backend.pre_tokenizer = pretokenizer.space_dropping_pretokenizer(section.split)
    if _is_byte_level(section):
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        backend.decoder = decoders.ByteLevel()
    elif isinstance(section, (BpeTokenizer, UnigramTokenizer)):
        backend.decoder = (
            decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]) if section.byte_fallback else decoders.Fuse()
        )
    elif isinstance(section, WordPieceTokenizer):
        backend.decoder = decoders.WordPiece(prefix=CONTINUATION_PREFIX, cleanup=False)
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


def _model(section: LearnedTokenizer, word_counts: WordCounts) -> models.Model:
    if isinstance(section, ByteTokenizer):
        return models.BPE(vocab=_vocabulary(_byte_alphabet()), merges=[])
    if isinstance(section, BpeTokenizer):
        return _byte_bpe(section, word_counts) if section.alphabet == "bytes" else _character_bpe(section, word_counts)
    if isinstance(section, UnigramTokenizer):
        return _unigram(section, word_counts)
    if isinstance(section, WordPieceTokenizer):
        return _wordpiece(section, word_counts)
    counted = zip(word_counts.words, word_counts.counts.tolist(), strict=True)
    if isinstance(section, WordTokenizer):
        control = _control_tokens(section)
        words = [word for word, count in counted if count >= section.min_frequency and word not in control]
        return models.WordLevel(_vocabulary([UNKNOWN, *words[: _model_size(section) - 1]]), unk_token=UNKNOWN)
    assert isinstance(section, CharTokenizer)
    tokens = [*sorted(character for character, count in counted if count >= section.min_frequency), END_OF_TEXT, UNKNOWN]
    return models.BPE(vocab=_vocabulary(tokens), merges=[], unk_token=UNKNOWN, fuse_unk=False)


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    """Map each token to its id, which is its index in `tokens`."""
    return {token: id for id, token in enumerate(tokens)}


def _model_size(section: VocabularyTokenizer) -> int:
    """Return the number of tokens left for the model after the end-of-text, special and added tokens."""
    return section.vocab_size - 1 - len(section.special_tokens) - len(section.added_tokens)


def _control_tokens(section: LearnedTokenizer) -> set[str]:
    """Return the tokens that must not be learned, because text that spells them out would then be encoded to them."""
    return {END_OF_TEXT, UNKNOWN, *section.special_tokens}


def _byte_bpe(section: BpeTokenizer, word_counts: WordCounts) -> models.Model:
    learned = merges.learn(
        word_counts,
        _byte_alphabet(),
        _model_size(section),
        min_frequency=section.min_frequency,
        max_token_length=section.max_token_length,
        reserved=_control_tokens(section),
    )
    return models.BPE(vocab=_vocabulary(learned.tokens), merges=learned.as_text())


def _character_bpe(section: BpeTokenizer, word_counts: WordCounts) -> models.Model:
    reserved = [*BYTE_TOKENS] if section.byte_fallback else [UNKNOWN]
    size = _model_size(section) - len(reserved)
    alphabet = _alphabet(section.alphabet, word_counts)
    _check_alphabet_size(section, alphabet, len(alphabet), size)
    learned = merges.learn(
        word_counts,
        alphabet,
        size,
        min_frequency=section.min_frequency,
        max_token_length=section.max_token_length,
        reserved={*reserved} | _control_tokens(section),
    )
    return models.BPE(
        vocab=_vocabulary([*reserved, *learned.tokens]),
        merges=learned.as_text(),
        unk_token=None if section.byte_fallback else UNKNOWN,
        fuse_unk=False,
        byte_fallback=section.byte_fallback,
    )


def _alphabet(alphabet: int | str, word_counts: WordCounts) -> list[str]:
    """Return the characters that get their own tokens, in code point order."""
    if alphabet == "text":
        chosen = [*character_counts(word_counts)]
    elif isinstance(alphabet, int):
        chosen = [*character_counts(word_counts)][:alphabet]
    else:
        chosen = [*{*alphabet}]
    return sorted(chosen)


def _check_alphabet_size(section: VocabularyTokenizer, alphabet: Sequence[str], needed: int, available: int) -> None:
    """Raise `InputError` if an alphabet needs more tokens than are available. The hint contains the smallest sufficient size."""
    if needed > available:
        raise InputError(
            f"the alphabet has {len(alphabet):,} characters, which need {needed:,} tokens, but the vocabulary has only "
            f"{max(0, available):,} left for them",
            where="tokenizer.vocab_size",
            hint=f"set it to at least {section.vocab_size + needed - available:,}, or set a smaller tokenizer.alphabet",
        )


def _unigram(section: UnigramTokenizer, word_counts: WordCounts) -> models.Model:
    reserved = [UNKNOWN, *(BYTE_TOKENS if section.byte_fallback else [])]
    size = _model_size(section) - len(reserved)
    spelling = {*"".join(reserved)}  # with these characters, text that spells out a reserved token can be encoded without it
    alphabet = sorted(spelling | {*_alphabet(section.alphabet, word_counts)})
    _check_alphabet_size(section, alphabet, len(alphabet), size)
    pieces = unigram.learn(word_counts, alphabet, size, max_token_length=section.max_token_length)
    pieces = [(piece, score) for piece, score in pieces if piece not in {*reserved} | _control_tokens(section)]
    score = min(RESERVED_SCORE, 2 * len(UNKNOWN) * min(score for _, score in pieces))
    return models.Unigram([*((token, score) for token in reserved), *pieces], unk_id=0, byte_fallback=section.byte_fallback)


def _wordpiece(section: WordPieceTokenizer, word_counts: WordCounts) -> models.Model:
    size = _model_size(section) - 1  # one token is the unknown token
    alphabet = _alphabet(section.alphabet, word_counts)
    _check_alphabet_size(section, alphabet, 2 * len(alphabet), size)  # each character with and without the prefix
    learned = merges.learn(
        word_counts,
        alphabet,
        size,
        inner_alphabet=[CONTINUATION_PREFIX + character for character in alphabet],
        min_frequency=section.min_frequency,
        max_token_length=section.max_token_length,
        join=_join_wordpieces,
        reserved=_control_tokens(section),
    )
    return models.WordPiece(
        _vocabulary([UNKNOWN, *learned.tokens]),
        unk_token=UNKNOWN,
        continuing_subword_prefix=CONTINUATION_PREFIX,
        max_input_chars_per_word=100,
    )


def _join_wordpieces(left: str, right: str) -> str:
    return left + right.removeprefix(CONTINUATION_PREFIX)


def _add_tokens(backend: tokenizers.Tokenizer, section: LearnedTokenizer) -> None:
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in section.added_tokens])
    special = [*section.special_tokens, END_OF_TEXT, *([UNKNOWN] if backend.token_to_id(UNKNOWN) is not None else [])]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
