"""Word counts are the same as when the whole text is pretokenized at once, and memory use is bounded."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
import tokenizers
from tokenizer.test_split_points import make_backend

from tinylm.recipe.schema import BpeTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import training
from tinylm.tokenizer.encoding import Encoder
from tinylm.tokenizer.pretokenizer import PATTERNS, SPLIT_NAMES, ascii_pattern, split_steps
from tinylm.tokenizer.split_points import split_points_of
from tinylm.tokenizer.word_counts import count_words


@pytest.mark.parametrize("split", ["gpt4", "gpt2", "none", "bert", "custom"])
def test_counts_match_pretokenizing_the_whole_text(split: str, english: str) -> None:
    backend = make_backend(split) if split != "custom" else make_backend("gpt4")
    if split == "custom":
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[^ ]+ ?| "), "isolated")
    text = english[:80_000]
    pieces = [Piece(text[start : start + 7001], start == 0) for start in range(0, len(text), 7001)]
    counted = count_words(backend, split_points_of(json.loads(backend.to_str())), pieces, pytest.fail)
    assert dict(zip(counted.words, counted.counts.tolist(), strict=True)) == Counter(
        word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)
    )


def test_windows_do_not_change_word_counts_for_text_without_split_points(english: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinylm.tokenizer.word_counts.WINDOW_CHARACTERS", 5000)
    backend = make_backend("gpt4")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[^ ]+ ?| "), "isolated")
    counted = count_words(backend, None, [Piece(english[:50_000], True)], pytest.fail)
    assert dict(zip(counted.words, counted.counts.tolist(), strict=True)) == Counter(
        word for word, _ in backend.pre_tokenizer.pre_tokenize_str(english[:50_000])
    )


def test_the_numbers_of_words_and_chunks_in_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinylm.tokenizer.chunks.MAX_CHUNKS", 1000)
    monkeypatch.setattr("tinylm.tokenizer.word_counts.MAX_WORDS", 1500)
    rng = random.Random(3)
    words = ["common", *("".join(rng.choices("abcdefghij", k=8)) for _ in range(30_000))]
    pieces = [Piece(" ".join(f"common {word}" for word in words[start : start + 500]), True) for start in range(0, 30_000, 500)]
    warnings: list[str] = []
    backend = make_backend("whitespace")
    split_points = split_points_of(json.loads(backend.to_str()))
    counted = count_words(backend, split_points, pieces, warnings.append)
    assert len(counted.words) <= 1500
    assert (counted.words[0], counted.counts[0]) == (" common", 30_000 - len(pieces) + 1)
    assert "more than 1,500 distinct words" in warnings[0]
    encoder = Encoder(backend, json.loads(backend.to_str()), split_points)
    for piece in pieces:
        assert len(encoder.encode(piece.text.encode())) == len(backend.pre_tokenizer.pre_tokenize_str(piece.text))
        assert len(encoder._index.chunks) <= 2000  # type: ignore[union-attr]


def test_control_characters_cause_a_warning_about_a_binary_file() -> None:
    warnings: list[str] = []
    training.train(BpeTokenizer(kind="bpe", vocab_size=260), [Piece("\x00\x01\x02\ufffd" * 3000, True)], warnings.append)
    assert "is this a binary file?" in warnings[0]


@pytest.mark.parametrize("split", [*SPLIT_NAMES, "digits"])
def test_the_pattern_for_ascii_text_finds_the_same_words_as_the_pretokenizer(split: str) -> None:
    steps = split_steps("gpt4" if split == "digits" else split, 1 if split == "digits" else None)
    pretokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pretokenizer
    pattern = ascii_pattern(json.loads(backend.to_str()))
    assert pattern is not None
    rng = random.Random(1)
    parts = ["a", "Ab", " ", "  ", "\n", "\r\n", "\t", "\x0b", "\x0c", "\x1c", "\x00", "\x7f", "1", "234", "5678901"]
    parts += ["'s", "'LL", "'", "_", "(", ".", "!?"]
    for _ in range(3000):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 12)))
        assert pattern.findall(text) == [word for word, _ in pretokenizer.pre_tokenize_str(text)], repr(text)


def test_only_named_splits_have_a_pattern_for_ascii_text() -> None:
    backend = make_backend("gpt4")
    assert ascii_pattern(json.loads(backend.to_str())) is not None
    for step in (
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\p{Lu}"), "isolated"),
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERNS["gpt2"]), "removed"),
        tokenizers.pre_tokenizers.BertPreTokenizer(),
    ):
        backend.pre_tokenizer = step
        assert ascii_pattern(json.loads(backend.to_str())) is None
