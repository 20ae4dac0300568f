"""Training a tokenizer gives the same file each time, and tells what the text could not give."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tinylm.errors import InputError
from tinylm.recipe.schema import BpeTokenizer, ByteTokenizer, CharTokenizer, FileTokenizer, TokenizerSection
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


def learned(text: str, *, warnings: list[str] | None = None, **settings: object) -> Tokenizer:
    section = BpeTokenizer.model_validate({"kind": "bpe", **settings})
    return training.train(section, [Piece(text, True)], (warnings if warnings is not None else []).append)


@pytest.mark.parametrize(
    "section", [BpeTokenizer(kind="bpe", vocab_size=600), CharTokenizer(kind="char"), ByteTokenizer(kind="byte")]
)
def test_two_trainings_write_the_same_bytes(section: TokenizerSection, english: str, tmp_path: Path) -> None:
    for name, size in {"a": 1000, "b": 1000, "c": 1000}.items():
        pieces = [Piece(english[at : at + size], True) for at in range(0, 150_000, size)]
        training.train(section, pieces, print).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_the_vocabulary_is_as_large_as_asked_the_end_of_text_included(english: str) -> None:
    for size in (257, 258, 700):
        tokenizer = learned(english[:50_000], vocab_size=size)
        assert tokenizer.vocab_size == size
        assert tokenizer.end_of_text == size - 1


def test_merges_are_the_most_frequent_pairs_first() -> None:
    tokenizer = learned("ab " * 100 + "cd " * 50, vocab_size=260)
    new = [tokenizer.token_bytes[id] for id in range(256, 259)]
    assert new[0] == b"ab"  # 100 times; then " ab" 99 times, then "cd" 50 times
    assert set(new[1:]) == {b" ab", b"cd"}


def test_a_text_with_less_to_give_says_how_much_it_gave() -> None:
    warnings: list[str] = []
    tokenizer = learned("abab", vocab_size=5000, warnings=warnings)
    assert warnings == [f"the text supports {tokenizer.vocab_size} tokens, fewer than tokenizer.vocab_size 5,000"]
    assert tokenizer.vocab_size == 256 + 2 + 1, "ab, abab and the end of text"


def test_enough_text_gives_no_warning(english: str) -> None:
    warnings: list[str] = []
    learned(english[:50_000], vocab_size=500, warnings=warnings)
    assert warnings == []


def test_no_token_reaches_across_words_lines_or_many_digits(english: str) -> None:
    numbers = " ".join(str(number) for number in range(0, 400_000, 7))
    tokenizer = learned(english[:100_000] + numbers, vocab_size=1500)
    for token in tokenizer.token_bytes:
        text = token.decode("utf-8", "replace")
        assert sum(c.isdigit() for c in text) <= 2, text
        assert " " not in text.strip(" "), text
    assert [tokenizer.decode([id]) for id in tokenizer.encode("1234567")] == ["12", "34", "56", "7"]


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_the_longest_group_of_digits_can_be_chosen(digits: int) -> None:
    numbers = " ".join(str(number) for number in range(20_000))
    tokenizer = learned(numbers, vocab_size=1400, digits=digits)
    assert max(sum(c in b"0123456789" for c in token) for token in tokenizer.token_bytes) == digits


def test_a_regular_expression_can_say_where_merges_end() -> None:
    tokenizer = learned("a-b-c-" * 500, vocab_size=300, split="[^-]+|-")
    assert not any(b"-" in token and len(token) > 1 for token in tokenizer.token_bytes)


def test_a_wrong_regular_expression_is_refused() -> None:
    with pytest.raises(InputError, match=r"tokenizer\.split: '\(a' is not a regular expression"):
        learned("abc", split="(a")


def test_a_char_vocabulary_of_no_text_is_refused() -> None:
    with pytest.raises(InputError, match="no characters to make a vocabulary of"):
        training.train(CharTokenizer(kind="char"), [], print)


def test_a_tokenizer_file_is_taken_as_it_is(english: str, tmp_path: Path) -> None:
    mine = learned(english[:20_000], vocab_size=300)
    mine.save(tmp_path / "mine.json")
    taken = training.train(FileTokenizer(kind="file", path=str(tmp_path / "mine.json")), [], print)
    assert taken.fingerprint == mine.fingerprint


def test_text_without_spaces_is_learned_quickly_and_the_user_is_told() -> None:
    drawn = random.Random(3)
    dna = "".join(drawn.choices("ACGT", k=2_000_000))
    warnings: list[str] = []
    start = time.monotonic()
    tokenizer = learned(dna, vocab_size=320, warnings=warnings)
    assert time.monotonic() - start < 30
    assert warnings == [
        "the text has runs of more than 256 characters without a border; at most 1,048,576 characters of such runs are learned from"
    ]
    assert tokenizer.vocab_size == 320
    assert len(tokenizer.encode(dna[:10_000])) < 5000
    assert tokenizer.decode(tokenizer.encode(dna[:10_000])) == dna[:10_000]


def test_a_run_that_is_cut_short_teaches_what_it_holds() -> None:
    tokenizer = learned("xyz" * 1000, vocab_size=260)
    assert any(len(set(token)) == 3 for token in tokenizer.token_bytes), "xyz, or it turned round"


def test_sentences_without_spaces_are_learned_from_in_full() -> None:
    warnings: list[str] = []
    chinese = "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？" * 60_000
    training.train(BpeTokenizer(kind="bpe", vocab_size=300), [Piece(chinese, True)], warnings.append)
    assert not any("runs of more than" in warning for warning in warnings)


def test_of_a_long_text_every_nth_piece_is_learned_from() -> None:
    heard: list[str] = []
    pieces = [Piece(f"{'ab' if index % 3 else 'xy'} " * 1000, True) for index in range(1000)]
    section = BpeTokenizer(kind="bpe", vocab_size=260, max_megabytes=1)
    learned = training.train(section, pieces, heard.append, 3_000_000)
    assert heard[0] == "words are counted in 1/3 of the text (tokenizer.max_megabytes 1)"
    assert learned.encode("xyxy") != learned.encode("abab")
    assert len(learned.encode("xy")) == 1, "the pieces that were taken"
    assert len(learned.encode("ab")) == 2, "those that were not"
