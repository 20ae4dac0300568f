"""The metrics in a report match independent counts."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from tinylm.errors import InputError
from tinylm.recipe.schema import BpeTokenizer, ByteTokenizer, CharTokenizer, WordTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import training
from tinylm.tokenizer.report import build_report


def test_the_metrics_for_a_small_text_match_manual_counts() -> None:
    char = training.train(CharTokenizer(kind="char"), [Piece("ab c", True)], print)
    report = build_report(char, [("a", [Piece("ab", True), Piece(" aé", False), Piece("aa", True)])])
    assert (report.kind, report.vocab_size) == ("char", 6)
    assert (report.documents, report.characters, report.bytes, report.words, report.tokens) == (2, 7, 8, 3, 7)
    assert report.bytes_per_token == pytest.approx(8 / 7)
    assert report.tokens_per_word == pytest.approx(7 / 3)
    assert report.unused_tokens == 2, "c and the end-of-text token are unused"
    assert report.unknown_tokens == 1
    assert report.round_trip_failures == 1, "only the line with é is not restored"
    assert report.frequent_tokens == [("a", 4), (" ", 1), ("b", 1), ("\ufffd", 1)]
    shares = [4 / 7, 1 / 7, 1 / 7, 1 / 7]
    entropy = math.log(sum(share**2.5 for share in shares)) / (1 - 2.5)
    assert report.renyi_efficiency == pytest.approx(entropy / math.log(6))


def test_the_metrics_for_english_text_match_counts_of_its_ids(english: str) -> None:
    bpe = training.train(BpeTokenizer(kind="bpe", vocab_size=500), [Piece(english[:60_000], True)], print)
    text = english[60_000:90_000]
    report = build_report(bpe, [("a", [Piece(text, True)])])
    ids = bpe.encode(text)
    counts = Counter(ids)
    assert report.tokens == len(ids)
    assert report.unused_tokens == 500 - len(counts)
    assert report.unknown_tokens == report.round_trip_failures == 0
    assert [count for _, count in report.frequent_tokens] == [count for _, count in counts.most_common(10)]
    assert report.longest_tokens[0] == max((bpe.decode([id]) for id in counts), key=lambda token: len(token.encode()))
    assert report.encode_megabytes_per_second > 0


def test_only_unused_tokens_reduce_the_renyi_efficiency_of_equally_frequent_bytes() -> None:
    byte = training.train(ByteTokenizer(kind="byte"), [], print)
    text = "".join(map(chr, range(128)))
    report = build_report(byte, [("a", [Piece(text, True)])])
    assert report.renyi_efficiency == pytest.approx(math.log(128) / math.log(257))
    assert report.bytes_per_token == 1


def test_an_empty_text_is_an_error() -> None:
    byte = training.train(ByteTokenizer(kind="byte"), [], print)
    with pytest.raises(InputError, match="the text is empty"):
        build_report(byte, [("a", [])])


def test_unknown_words_are_counted_per_file_and_round_trip_failures_are_listed() -> None:
    words = training.train(WordTokenizer(kind="word", vocab_size=100, split="whitespace"), [Piece("aa bb cc " * 9, True)], print)
    report = build_report(words, [("one.txt", [Piece("aa bb\naa zz\n", True)]), ("two.txt", [Piece("cc", True)])])
    assert (report.words_split, report.unknown_tokens) == (0.0, 1)
    assert [(file.name, file.tokens, file.unknown_tokens) for file in report.files] == [("one.txt", 4, 1), ("two.txt", 1, 0)]
    assert report.round_trip_failures == 2, "both lines of the first file, because their line feeds are lost"
    assert (report.failures[1].file, report.failures[1].line, report.failures[1].text) == ("one.txt", 2, "aa zz\n")
    byte = training.train(ByteTokenizer(kind="byte"), [], print)
    assert build_report(byte, [("a", [Piece("a bc d", True)])]).words_split == pytest.approx(1 / 3)
