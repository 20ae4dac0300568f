"""Every tokenizer encodes control tokens in a text as ordinary text, and lossless tokenizers decode them exactly."""

from __future__ import annotations

import json

import pytest

from tinylm.errors import InputError
from tinylm.recipe import loads
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training

LINES = "One line <|endoftext|> of text. <|user|> <|unknown|> <0xFF> <0x41>\n" * 40
SPLITS = {"bpe": ("gpt4", "whitespace", "none"), "unigram": ("gpt4", "whitespace", "none"), "wordpiece": ("bert", "whitespace")}
CASES = [(kind, split) for kind in ("bpe", "unigram", "wordpiece", "word") for split in SPLITS.get(kind, ("bert", "whitespace"))]


def _train(options: dict[str, object], text: str) -> Tokenizer:
    recipe = {"data": {"train": "x"}, "training": {"steps": 1}, "tokenizer": options}
    return training.train(loads(json.dumps(recipe), check_files=False).tokenizer, [Piece(text, True)], lambda warning: None)


@pytest.mark.parametrize(
    "text", [LINES, LINES.replace("\n", " "), "plain words " * 50], ids=["lines", "one line", "without tokens"]
)
@pytest.mark.parametrize(("kind", "split"), CASES)
def test_control_tokens_in_text_are_encoded_as_text(kind: str, split: str, text: str) -> None:
    tokenizer = _train({"kind": kind, "split": split, "vocab_size": 600, "special_tokens": ["<|user|>"]}, text)
    control = {tokenizer.end_of_text, tokenizer.backend.token_to_id("<|user|>")}
    for written in ("<|endoftext|>", "a <|endoftext|> b", "<|user|><|endoftext|>", "<0xFF>", "x<0x41>y", text[:200]):
        ids = tokenizer.encode(written)
        assert not control & {*ids}
        assert kind not in ("bpe", "unigram") or tokenizer.decode(ids) == written


@pytest.mark.parametrize("options", [{"kind": "char"}, {"kind": "byte"}, {"kind": "bpe", "vocab_size": 300}])
def test_a_control_token_that_is_also_a_text_token_is_rejected(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="'a' was also learned from the text"):
        _train({**options, "special_tokens": ["a"]}, "a b a c")
