"""The explained encoding steps lead to the tokens that the tokenizer returns."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from tokenizer.samples import UNIGRAM

from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training
from tinylm.tokenizer.explain import as_html, explain


def test_an_explanation_ends_with_the_encoded_tokens(tokenizer: Tokenizer) -> None:
    text = "The statement explained: naïve 🙂 语 don't x<y  \n end"
    explanation = explain(tokenizer, text)
    assert [token.id for token in explanation.tokens] == tokenizer.encode(text)
    for word in explanation.words:
        assert word.steps
        result = word.steps[-1].parts if explanation.kind != "unigram" else word.steps[0].parts
        assert result == [token.text for token in word.tokens]


def test_each_merge_step_joins_two_parts_of_the_word(bpe: Tokenizer) -> None:
    (word,) = explain(bpe, " statement").words
    assert word.steps[0].description == "bytes"
    for before, after in pairwise(word.steps):
        assert len(after.parts) == len(before.parts) - 1
        assert "".join(after.parts) == " statement"


def test_a_unigram_word_is_segmented_with_the_highest_possible_score(english: str) -> None:
    unigram = training.train(UNIGRAM, [Piece(english[:60_000], True)], pytest.fail)
    scores = dict(unigram.tokenizer_json["model"]["vocab"])
    for word in explain(unigram, "The statements are nested functions").words:

        def best(rest: str) -> float:
            candidates = [scores[rest[:n]] + best(rest[n:]) for n in range(1, len(rest) + 1) if rest[:n] in scores]
            return max(candidates, default=-np.inf) if rest else 0.0

        assert sum(token.score or 0 for token in word.tokens) == pytest.approx(best(word.text))
        shown = [float(step.description.rpartition(" ")[2]) for step in word.steps]
        assert shown == sorted(shown, reverse=True)


def test_the_html_page_escapes_the_text(bpe: Tokenizer) -> None:
    page = as_html(explain(bpe, "<script>alert('x')</script> & more"), "title <b>")
    assert "<script" not in page
    assert "&lt;" in page
    assert "title &lt;b&gt;" in page
    assert page.count("<details") == len(explain(bpe, "<script>alert('x')</script> & more").words)
