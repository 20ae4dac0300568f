"""The figures of a tokenizer on a text are those that counting by hand gives."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from tinylm.errors import InputError
from tinylm.recipe.schema import BpeTokenizer, ByteTokenizer, CharTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import training
from tinylm.tokenizer.report import report


def test_a_small_text_counted_by_hand() -> None:
    char = training.train(CharTokenizer(kind="char"), [Piece("ab c", True)], print)
    found = report(char, [("a", [Piece("ab", True), Piece(" aé", False), Piece("aa", True)])])
    assert (found.kind, found.vocab_size) == ("char", 6)
    assert (found.documents, found.characters, found.bytes, found.words, found.tokens) == (2, 7, 8, 3, 7)
    assert found.bytes_per_token == pytest.approx(8 / 7)
    assert found.tokens_per_word == pytest.approx(7 / 3)
    assert found.unused_tokens == 2, "c and the end of text"
    assert found.unknown_tokens == 1
    assert found.round_trip_failures == 1, "the line with é"
    assert found.frequent_tokens == [("a", 4), (" ", 1), ("b", 1), ("\ufffd", 1)]
    shares = [4 / 7, 1 / 7, 1 / 7, 1 / 7]
    entropy = math.log(sum(share**2.5 for share in shares)) / (1 - 2.5)
    assert found.renyi_efficiency == pytest.approx(entropy / math.log(6))


def test_real_text_agrees_with_counting_its_tokens(english: str) -> None:
    bpe = training.train(BpeTokenizer(kind="bpe", vocab_size=500), [Piece(english[:60_000], True)], print)
    text = english[60_000:90_000]
    found = report(bpe, [("a", [Piece(text, True)])])
    ids = bpe.encode(text)
    counts = Counter(ids)
    assert found.tokens == len(ids)
    assert found.unused_tokens == 500 - len(counts)
    assert found.unknown_tokens == found.round_trip_failures == 0
    assert [count for _, count in found.frequent_tokens] == [count for _, count in counts.most_common(10)]
    assert found.longest_tokens[0] == max((bpe.decode([id]) for id in counts), key=lambda token: len(token.encode()))
    assert found.encode_megabytes_per_second > 0


def test_all_bytes_equally_often_are_perfectly_balanced_but_for_the_unused_token() -> None:
    byte = training.train(ByteTokenizer(kind="byte"), [], print)
    text = "".join(map(chr, range(128)))
    found = report(byte, [("a", [Piece(text, True)])])
    assert found.renyi_efficiency == pytest.approx(math.log(128) / math.log(257))
    assert found.bytes_per_token == 1


def test_an_empty_text_is_refused() -> None:
    byte = training.train(ByteTokenizer(kind="byte"), [], print)
    with pytest.raises(InputError, match="the text is empty"):
        report(byte, [("a", [])])
