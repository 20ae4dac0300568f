"""The metrics in a vocabulary size sweep match those of tokenizers that are trained separately at each size."""

from __future__ import annotations

import pytest
from tokenizer.samples import BPE
from toy import ToySection

from tinylm.cost.parameters import parameter_counts
from tinylm.errors import InputError
from tinylm.recipe import loads
from tinylm.recipe.schema import BpeTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import training
from tinylm.tokenizer.vocab_sweep import sweep_vocab_sizes


def test_the_metrics_of_a_sweep_match_training_at_each_size(english: str) -> None:
    train, heldout = [Piece(english[:60_000], True)], [Piece(english[60_000:70_000], True)]
    model = loads("data: {train: a}\ntraining: {steps: 1}\nmodel: {n_layer: 2, n_embd: 48}\n", check_files=False).model
    sweep = sweep_vocab_sizes(BPE, [300, 600, 900], lambda: train, lambda: heldout, model, 1000, pytest.fail)
    for result in sweep.sizes:
        tokenizer = training.train(BpeTokenizer(kind="bpe", vocab_size=result.vocab_size), train, pytest.fail)
        tokens = len(tokenizer.encode(heldout[0].text))
        assert result.bytes_per_token == pytest.approx(len(heldout[0].text.encode()) / tokens)
        assert result.bytes_per_step == pytest.approx(1000 * result.bytes_per_token)
        assert result.embedding_parameters == 2 * result.vocab_size * 48
        assert result.embedding_share == pytest.approx(
            result.embedding_parameters / sum(parameter_counts(model, result.vocab_size).values())
        )
    assert sweep.suggested in {300, 600, 900}
    assert "MFLOP" in sweep.reason or "more text" in sweep.reason


def test_an_architecture_without_estimates_is_rejected() -> None:
    with pytest.raises(InputError, match="the cost of the toy architecture cannot be estimated"):
        sweep_vocab_sizes(BPE, [300], lambda: [], lambda: [], ToySection(), 1000, pytest.fail)
