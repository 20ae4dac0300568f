"""Merges are those of `tokenizers`, pieces are those of the model's own definition."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from tinylm.recipe.schema import BpeTokenizer, UnigramTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import merges, training, unigram
from tinylm.tokenizer.counting import Words
from tinylm.tokenizer.splits import pattern_of


@pytest.mark.parametrize("split", ["gpt4", "gpt2"])
def test_merges_are_those_of_tokenizers_in_the_same_order(split: str, english: str) -> None:
    text = english[:150_000] + "aaaa aaaaa aaaaaaa " * 50 + "語言模型語言語言 " * 30
    ours = training.train(BpeTokenizer(kind="bpe", vocab_size=3000, split=split), [Piece(text, True)], pytest.fail)
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern_of(split, None)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2999, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    theirs.train_from_iterator([text], trainer)
    assert ours.described["model"]["merges"] == json.loads(theirs.to_str())["model"]["merges"]


def words(**counts: int) -> Words:
    return Words(list(counts), np.array(list(counts.values()), dtype=np.int64))


def test_a_small_vocabulary_by_hand() -> None:
    learned = merges.learn(words(low=5, lower=2, newest=6, widest=3), sorted("lowernstid"), None, 14)
    assert learned.written() == [("e", "s"), ("es", "t"), ("l", "o"), ("lo", "w")]


def test_counts_have_64_bits() -> None:
    huge = 3_000_000_000
    learned = merges.learn(words(ab=huge, cd=huge + 1, ce=2), list("abcde"), None, 7)
    assert learned.written() == [("c", "d"), ("a", "b")]


def test_repeated_symbols_are_merged_from_the_left() -> None:
    learned = merges.learn(words(aaaaa=1), ["a"], None, 4)
    assert learned.written() == [("a", "a"), ("aa", "a"), ("aa", "aaa")]


def test_a_unigram_model_gives_each_piece_its_share_of_all_segmentations() -> None:
    """One step of expectation maximisation against the sum over every segmentation of every word, written out."""
    counted = words(abab=3, aba=2, b=4)
    codes, levels, owners, ends, weights = unigram._laid_out(counted, ["a", "b"])
    strings, edges, counts = unigram._seeds(codes, levels, ends, weights[owners], ["a", "b"], 100, 16)
    scores = np.log(counts / counts.sum())
    lattice = unigram._Lattice(edges, levels, np.flatnonzero(levels == 0), np.unique(ends))
    expected, likelihood = lattice.expected(scores, weights, owners)

    def ways(word: str) -> list[list[str]]:
        return [[]] if not word else [[s, *rest] for s in strings if word.startswith(s) for rest in ways(word[len(s) :])]

    share = dict(zip(strings, np.exp(scores), strict=True))
    wanted, total = dict.fromkeys(strings, 0.0), 0.0
    for word, count in zip(counted.texts, counted.counts, strict=True):
        found = [(math.prod(share[piece] for piece in way), way) for way in ways(word)]
        mass = sum(probability for probability, _ in found)
        total += count * math.log(mass)
        for probability, way in found:
            for piece in way:
                wanted[piece] += count * probability / mass
    assert dict(zip(strings, expected, strict=True)) == pytest.approx(wanted)
    assert likelihood == pytest.approx(total)


def test_digamma_is_the_derivative_of_the_log_of_gamma() -> None:
    for x in (0.001, 0.5, 1.0, 3.3, 7.0, 1e4):
        step = x * 1e-5
        slope = (math.lgamma(x + step) - math.lgamma(x - step)) / (2 * step)
        assert unigram._digamma(np.array([x]))[0] == pytest.approx(slope, rel=1e-5)


def test_pieces_compress_as_well_as_those_of_sentencepiece(english: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    text, heldout = english[:150_000], english[150_000:200_000]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        vocab_size=1500,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        byte_fallback=True,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = training.train(UnigramTokenizer(kind="unigram", vocab_size=1500), [Piece(text, True)], pytest.fail)
    lines = [line for line in heldout.splitlines() if line]
    assert sum(len(ours.encode(line)) for line in lines) <= 1.02 * sum(map(len, theirs.encode(lines)))
