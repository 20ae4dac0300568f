"""BPE learns the same merges in the same order as `tokenizers`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from tinylm.recipe.schema import BpeTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import merges, training
from tinylm.tokenizer.pretokenizer import split_pattern
from tinylm.tokenizer.word_counts import WordCounts


@pytest.mark.parametrize("split", ["gpt4", "gpt2"])
def test_the_learned_merges_equal_those_of_tokenizers(split: str, english: str) -> None:
    text = english[:150_000] + "aaaa aaaaa aaaaaaa " * 50 + "語言模型語言語言 " * 30
    ours = training.train(BpeTokenizer(kind="bpe", vocab_size=3000, split=split), [Piece(text, True)], pytest.fail)
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(split_pattern(split, None)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2999, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    theirs.train_from_iterator([text], trainer)
    assert ours.tokenizer_json["model"]["merges"] == json.loads(theirs.to_str())["model"]["merges"]


def word_counts(**counts: int) -> WordCounts:
    return WordCounts(list(counts), np.array(list(counts.values()), dtype=np.int64))


def test_the_documented_example_is_correct() -> None:
    learned = merges.learn(word_counts(low=5, lower=2, newest=6, widest=3), sorted("lowernstid"), 14)
    assert learned.as_text() == [("e", "s"), ("es", "t"), ("l", "o"), ("lo", "w")]


def test_counts_are_64_bit_integers() -> None:
    huge = 3_000_000_000
    learned = merges.learn(word_counts(ab=huge, cd=huge + 1, ce=2), list("abcde"), 7)
    assert learned.as_text() == [("c", "d"), ("a", "b")]


def test_repeated_symbols_are_merged_from_left_to_right() -> None:
    learned = merges.learn(word_counts(aaaaa=1), ["a"], 4)
    assert learned.as_text() == [("a", "a"), ("aa", "a"), ("aa", "aaa")]
