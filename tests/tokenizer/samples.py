"""Tokenizer sections and texts for the tests in this folder."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tinylm.recipe.schema import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    LearnedTokenizer,
    UnigramTokenizer,
    WordPieceTokenizer,
    WordTokenizer,
)
from tinylm.text.sources import Piece
from tinylm.tokenizer import END_OF_TEXT, Tokenizer, training
from tinylm.tokenizer.tokenizer import UNKNOWN

BPE = BpeTokenizer(kind="bpe", vocab_size=800)
UNIGRAM = UnigramTokenizer(kind="unigram", vocab_size=900)
CHAR = CharTokenizer(kind="char")
BYTE = ByteTokenizer(kind="byte")
SECTIONS: tuple[LearnedTokenizer, ...] = (
    BPE,
    BpeTokenizer(kind="bpe", vocab_size=900, alphabet=60),
    UNIGRAM,
    WordPieceTokenizer(kind="wordpiece", vocab_size=700),
    WordTokenizer(kind="word", vocab_size=500),
    CHAR,
    BYTE,
)
"""One section for each kind of tokenizer, and a second one for BPE."""

_SPECIAL = [END_OF_TEXT, UNKNOWN, "<|end", "oftext|>", "</s>", "<s>", "[UNK]", "Ġ", "Ċ", "▁", "\ufffd"]
_CODE_POINTS = [(0x00, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000), (0x20000, 0x110000)]


def train_on(text: str, section: LearnedTokenizer) -> Tokenizer:
    """Train on a single document and ignore warnings."""
    return training.train(section, [Piece(text, True)], lambda warning: None)


def random_texts(count: int, english: str) -> Iterator[str]:
    """Yield random mixtures of Unicode characters, white space, English text and special tokens."""
    rng = random.Random(7)
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 12)):
            match rng.randint(0, 5):
                case 0:
                    parts.append(rng.choice(_SPECIAL))
                case 1:
                    start = rng.randrange(90_000)
                    parts.append(english[start : start + rng.randint(1, 30)])
                case 2:
                    parts.append(rng.choice(" \t\n\r\v\f\x00\x1b\x7f\x85\xa0\u200d\u2028\u3000\ufeff") * rng.randint(1, 4))
                case _:
                    parts += [chr(rng.randrange(*rng.choice(_CODE_POINTS))) for _ in range(rng.randint(1, 6))]
        yield "".join(parts)


def odd_texts(count: int) -> Iterator[str]:
    """Yield texts of characters that tokenizers often treat differently: marks, spaces, emoji, ligatures, wide forms and words."""
    generator = random.Random(7)
    words = (
        "the",
        "ing",
        "'s",
        "'LL",
        "é",
        "ß",
        "\u212b",
        "日本語",
        "🙂",
        "👩\u200d👧",
        "ﬁ",
        "①",
        "½",
        "１２３",
        "▁",
        "def ",
        "    ",
    )
    marks = " \n\t\r\u00a0\u2028\u3000\u200b\u0301\u0300\u20e3\ufe0f"
    ranges = (
        (0x20, 0x7F),
        (0xA0, 0x2000),
        (0x2000, 0x3100),
        (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A3),
        (0xE000, 0xFFFF),
        (0x1F300, 0x1FAFF),
    )
    for _ in range(count):
        parts = []
        for _ in range(60):
            kind = generator.random()
            if kind < 0.5:
                parts.append(chr(generator.randrange(*generator.choice(ranges))))
            else:
                parts.append(generator.choice(words if kind < 0.75 else marks))
        yield "".join(parts)
