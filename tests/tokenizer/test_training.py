"""Training a tokenizer is reproducible, respects its options, and warns about unsuitable text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tinylm.errors import InputError
from tinylm.recipe.schema import BpeTokenizer, ByteTokenizer, CharTokenizer, FileTokenizer, TokenizerSection
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


def train(text: str, *, warnings: list[str] | None = None, **settings: object) -> Tokenizer:
    section = BpeTokenizer.model_validate({"kind": "bpe", **settings})
    return training.train(section, [Piece(text, True)], (warnings if warnings is not None else []).append)


@pytest.mark.parametrize(
    "section", [BpeTokenizer(kind="bpe", vocab_size=600), CharTokenizer(kind="char"), ByteTokenizer(kind="byte")]
)
def test_training_twice_writes_the_same_bytes(section: TokenizerSection, english: str, tmp_path: Path) -> None:
    for name, size in {"a": 1000, "b": 1000, "c": 1000}.items():
        pieces = [Piece(english[start : start + size], True) for start in range(0, 150_000, size)]
        training.train(section, pieces, print).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_the_vocabulary_size_includes_the_end_of_text_token(english: str) -> None:
    for size in (257, 258, 700):
        tokenizer = train(english[:50_000], vocab_size=size)
        assert tokenizer.vocab_size == size
        assert tokenizer.end_of_text == size - 1


def test_the_most_frequent_pairs_are_merged_first() -> None:
    tokenizer = train("ab " * 100 + "cd " * 50, vocab_size=260)
    new = [tokenizer.token_bytes[id] for id in range(256, 259)]
    assert new[0] == b"ab"  # The counts are 100 for "ab", 99 for " ab" and 50 for "cd".
    assert set(new[1:]) == {b" ab", b"cd"}


def test_a_text_that_is_too_small_for_the_vocabulary_causes_a_warning() -> None:
    warnings: list[str] = []
    tokenizer = train("abab", vocab_size=5000, warnings=warnings)
    assert warnings == [
        f"the text is too small for tokenizer.vocab_size 5,000: the vocabulary has only {tokenizer.vocab_size} tokens"
    ]
    assert tokenizer.vocab_size == 256 + 2 + 1, "ab, abab and the end-of-text token"


def test_a_large_enough_text_causes_no_warning(english: str) -> None:
    warnings: list[str] = []
    train(english[:50_000], vocab_size=500, warnings=warnings)
    assert warnings == []


def test_tokens_do_not_span_words_lines_or_more_than_two_digits(english: str) -> None:
    numbers = " ".join(str(number) for number in range(0, 400_000, 7))
    tokenizer = train(english[:100_000] + numbers, vocab_size=1500)
    for token in tokenizer.token_bytes:
        text = token.decode("utf-8", "replace")
        assert sum(c.isdigit() for c in text) <= 2, text
        assert " " not in text.strip(" "), text
    assert [tokenizer.decode([id]) for id in tokenizer.encode("1234567")] == ["12", "34", "56", "7"]


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_the_digits_option_limits_the_digits_in_a_token(digits: int) -> None:
    numbers = " ".join(str(number) for number in range(20_000))
    tokenizer = train(numbers, vocab_size=1400, digits=digits)
    assert max(sum(c in b"0123456789" for c in token) for token in tokenizer.token_bytes) == digits


def test_tokens_do_not_span_the_splits_of_a_regular_expression() -> None:
    tokenizer = train("a-b-c-" * 500, vocab_size=300, split="[^-]+|-")
    assert not any(b"-" in token and len(token) > 1 for token in tokenizer.token_bytes)


def test_an_invalid_regular_expression_is_an_error() -> None:
    with pytest.raises(InputError, match=r"tokenizer\.split: '\(a' is not a valid regular expression"):
        train("abc", split="(a")


def test_a_char_vocabulary_cannot_be_learned_from_empty_text() -> None:
    with pytest.raises(InputError, match="the text has no characters to learn a vocabulary from"):
        training.train(CharTokenizer(kind="char"), [], print)


def test_a_tokenizer_file_is_loaded_unchanged(english: str, tmp_path: Path) -> None:
    saved = train(english[:20_000], vocab_size=300)
    saved.save(tmp_path / "saved.json")
    loaded = training.train(FileTokenizer(kind="file", path=str(tmp_path / "saved.json")), [], print)
    assert loaded.fingerprint == saved.fingerprint


def test_only_part_of_a_text_without_spaces_is_used_and_a_warning_is_printed() -> None:
    rng = random.Random(3)
    dna = "".join(rng.choices("ACGT", k=2_000_000))
    warnings: list[str] = []
    tokenizer = train(dna, vocab_size=320, warnings=warnings)
    assert warnings == [
        "the text has words of more than 256 characters (text without spaces?); at most 1,048,576 characters of such words are used"
    ]
    assert tokenizer.vocab_size == 320
    assert len(tokenizer.encode(dna[:10_000])) < 5000
    assert tokenizer.decode(tokenizer.encode(dna[:10_000])) == dna[:10_000]


def test_tokens_are_learned_from_the_parts_of_a_long_word() -> None:
    tokenizer = train("xyz" * 1000, vocab_size=260)
    assert any(len(set(token)) == 3 for token in tokenizer.token_bytes), "xyz or a rotation of it"


def test_chinese_sentences_without_spaces_cause_no_warning() -> None:
    warnings: list[str] = []
    chinese = "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？" * 60_000
    training.train(BpeTokenizer(kind="bpe", vocab_size=300), [Piece(chinese, True)], warnings.append)
    assert not any("words of more than" in warning for warning in warnings)


def test_every_nth_piece_of_a_text_larger_than_max_megabytes_is_used() -> None:
    warnings: list[str] = []
    pieces = [Piece(f"{'ab' if index % 3 else 'xy'} " * 1000, True) for index in range(1000)]
    section = BpeTokenizer(kind="bpe", vocab_size=260, max_megabytes=1)
    tokenizer = training.train(section, pieces, warnings.append, 3_000_000)
    assert warnings[0] == "the tokenizer learns from 1/3 of the text (tokenizer.max_megabytes 1)"
    assert tokenizer.encode("xyxy") != tokenizer.encode("abab")
    assert len(tokenizer.encode("xy")) == 1, "pieces with xy must be used"
    assert len(tokenizer.encode("ab")) == 2, "pieces with ab must not be used"
