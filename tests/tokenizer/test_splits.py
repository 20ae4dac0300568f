"""A border is where a new word begins whatever stands around it; what is counted between borders is what the whole text holds."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import pairwise

import pytest
import tokenizers
from tokenizer.test_tokenizer import random_texts
from tokenizers import models

from tinylm.text.sources import Piece
from tinylm.tokenizer import splits
from tinylm.tokenizer.chunks import ChunkIndex
from tinylm.tokenizer.counting import count_words
from tinylm.tokenizer.encoding import Encoder

RISKY = " \t\n\r\v\f\x1c\x85\xa0\u2003\u2028\u3000\u180e\u0301'sS'tll0190.,:(){}<>-_aZéЖ語🙂\u0345\ufb01½"


def backend(name: str) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    if name == "bert":
        made.pre_tokenizer = splits.pre_tokenizer_without_spaces(name)
    else:
        made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(splits.pre_tokenizer(name, 2 if name == "gpt2" else None))
    return made


@pytest.mark.parametrize("name", [*splits.NAMES, "bert"])
def test_a_text_cut_at_its_borders_has_the_same_words(name: str, english: str) -> None:
    made = backend(name)
    borders = splits.borders_of(json.loads(made.to_str()))
    assert borders is not None
    drawn = random.Random(11)
    texts = ["".join(drawn.choices(RISKY, k=drawn.randint(1, 30))) for _ in range(3000)]
    found = 0
    for text in [*texts, *random_texts(200, english), english[:20_000]]:
        written = text.encode()
        cuts = [0, *borders.find(written).tolist(), len(written)]
        found += len(cuts) - 2
        whole = [word for word, _ in made.pre_tokenizer.pre_tokenize_str(text)]
        parts = [
            word for begin, end in pairwise(cuts) for word, _ in made.pre_tokenizer.pre_tokenize_str(written[begin:end].decode())
        ]
        assert parts == whole, repr(text)
    assert found > 300


def test_nothing_is_claimed_of_what_is_not_known() -> None:
    made = backend("gpt4")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("a+"), "isolated")
    assert splits.borders_of(json.loads(made.to_str())) is None
    made = backend("gpt4")
    made.add_tokens(["two words"])
    assert splits.borders_of(json.loads(made.to_str())) is None
    made = backend("gpt4")
    made.normalizer = tokenizers.normalizers.Replace("a", " ")
    assert splits.borders_of(json.loads(made.to_str())) is None


def test_chunks_get_one_number_each(english: str) -> None:
    index = ChunkIndex(splits.KNOWN["gpt4"])
    text = english[:50_000].encode() + b" " + b"x" * 100 + b" " + b"y" * 24 + b" " + b"y" * 25
    for _ in range(2):
        numbers = index.find(text).tolist()
        assert b"".join(index.chunks[number] for number in numbers) == text
        assert len({*index.chunks}) == len(index.chunks)
    assert {*numbers} == {*range(len(index.chunks))}
    assert index.find(b"").tolist() == []


def test_chunks_that_share_their_first_bytes_or_end_in_zeros_are_told_apart() -> None:
    index = ChunkIndex(splits.KNOWN["whitespace"])
    chunks = [b"a", b"a\0", b"a\0\0", b"x" * 24, b"x" * 25, b"x" * 26, b"x" * 23 + b"y"]
    numbers = [index.find(chunk).tolist() for chunk in (*chunks, *chunks)]
    assert numbers == [[number] for number in (*range(7), *range(7))]


@pytest.mark.parametrize("name", ["gpt4", "gpt2", "none", "bert", "custom"])
def test_words_are_counted_as_the_whole_text_has_them(name: str, english: str) -> None:
    made = backend(name) if name != "custom" else backend("gpt4")
    if name == "custom":
        made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[^ ]+ ?| "), "isolated")
    text = english[:80_000]
    pieces = [Piece(text[at : at + 7001], at == 0) for at in range(0, len(text), 7001)]
    words = count_words(made, splits.borders_of(json.loads(made.to_str())), pieces, pytest.fail)
    assert dict(zip(words.texts, words.counts.tolist(), strict=True)) == Counter(
        word for word, _ in made.pre_tokenizer.pre_tokenize_str(text)
    )


def test_a_long_text_with_a_pattern_of_ones_own_is_counted_in_windows_with_the_same_result(
    english: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinylm.tokenizer.counting._WINDOW", 5000)
    made = backend("gpt4")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[^ ]+ ?| "), "isolated")
    words = count_words(made, None, [Piece(english[:50_000], True)], pytest.fail)
    assert dict(zip(words.texts, words.counts.tolist(), strict=True)) == Counter(
        word for word, _ in made.pre_tokenizer.pre_tokenize_str(english[:50_000])
    )


def test_memory_is_bounded_by_what_is_kept_and_not_by_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinylm.tokenizer.chunks.MOST_CHUNKS", 1000)
    monkeypatch.setattr("tinylm.tokenizer.counting.MOST_WORDS", 1500)
    drawn = random.Random(3)
    words = ["common", *("".join(drawn.choices("abcdefghij", k=8)) for _ in range(30_000))]
    pieces = [
        Piece(" ".join(word for pair in words[at : at + 500] for word in ("common", pair)), True) for at in range(0, 30_000, 500)
    ]
    warnings: list[str] = []
    made = backend("whitespace")
    borders = splits.borders_of(json.loads(made.to_str()))
    counted = count_words(made, borders, pieces, warnings.append)
    assert len(counted.texts) <= 1500
    assert (counted.texts[0], counted.counts[0]) == (" common", 30_000 - len(pieces) + 1)
    assert "more than 1,500 different words" in warnings[0]
    encoder = Encoder(made, json.loads(made.to_str()), borders)
    for piece in pieces:
        assert len(encoder.encode(piece.text.encode())) == len(made.pre_tokenizer.pre_tokenize_str(piece.text))
        assert len(encoder._index.chunks) <= 2000  # type: ignore[union-attr]
