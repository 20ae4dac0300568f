"""Unigram training matches the definition of the model, and its tokenizers compress text as well as those of sentencepiece."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from tokenizer.test_merges import word_counts

from tinylm.recipe.schema import UnigramTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import training, unigram


def test_expected_counts_match_enumerating_all_segmentations() -> None:
    """Compare one EM step with a sum over all segmentations of each word."""
    counted = word_counts(abab=3, aba=2, b=4)
    nodes = unigram.lay_out(counted, ["a", "b"])
    pieces, edges, counts = unigram.seed_pieces(nodes, ["a", "b"], 100, 16)
    scores = np.log(counts / counts.sum())
    lattice = unigram.Lattice(edges, nodes.levels, nodes.firsts, nodes.lasts)
    expected, log_likelihood = lattice.expected_counts(scores, nodes)

    def segmentations(word: str) -> list[list[str]]:
        if not word:
            return [[]]
        return [[piece, *rest] for piece in pieces if word.startswith(piece) for rest in segmentations(word[len(piece) :])]

    probability_of = dict(zip(pieces, np.exp(scores), strict=True))
    by_hand, total = dict.fromkeys(pieces, 0.0), 0.0
    for word, count in zip(counted.words, counted.counts, strict=True):
        paths = [(math.prod(probability_of[piece] for piece in path), path) for path in segmentations(word)]
        probability_of_word = sum(probability for probability, _ in paths)
        total += count * math.log(probability_of_word)
        for probability, path in paths:
            for piece in path:
                by_hand[piece] += count * probability / probability_of_word
    assert dict(zip(pieces, expected, strict=True)) == pytest.approx(by_hand)
    assert log_likelihood == pytest.approx(total)


def test_digamma_is_the_derivative_of_log_gamma() -> None:
    for x in (0.001, 0.5, 1.0, 3.3, 7.0, 1e4):
        step = x * 1e-5
        slope = (math.lgamma(x + step) - math.lgamma(x - step)) / (2 * step)
        assert unigram.digamma(np.array([x]))[0] == pytest.approx(slope, rel=1e-5)


def test_unigram_compresses_as_well_as_sentencepiece(english: str) -> None:
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
