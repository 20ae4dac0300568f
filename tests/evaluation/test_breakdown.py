"""Test tables of token losses, significance tests between models, and the HTML report."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import model

from tinylm.data.shards import Counts, Shard
from tinylm.errors import InputError
from tinylm.evaluation import breakdown, significance
from tinylm.evaluation.breakdown import TokenLosses
from tinylm.evaluation.evaluate_run import BreakdownOptions, evaluate_run, text_bytes
from tinylm.evaluation.perplexity import EvaluationOptions, evaluate
from tinylm.run import Run

END, VOCAB_SIZE = 0, 61
LENGTHS = np.array([0, *(1 + id % 4 for id in range(1, VOCAB_SIZE))])


def _shard(*sizes: int, seed: int = 3) -> Shard:
    generator = np.random.default_rng(seed)
    documents = [generator.integers(1, VOCAB_SIZE, size) for size in sizes]
    tokens = np.concatenate([[END], *(part for document in documents for part in (document, [END]))]).astype(np.uint16)
    total = int(LENGTHS[tokens].sum())
    return Shard(tokens, Counts(len(sizes), total, total, sum(sizes), 0), END)


def _losses(shard: Shard, *, seed: int = 0, **options: Any) -> TokenLosses:
    losses = TokenLosses(shard, detailed=len(shard))
    network = model("gpt2")
    if seed:
        torch.nn.init.normal_(network.head.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    evaluate(network, shard, LENGTHS, EvaluationOptions(**{"context": 16, "stride": 8, **options}), on_batch=losses)
    return losses


def test_the_token_losses_in_every_table_sum_to_the_total() -> None:
    shard = _shard(40, 1, 16, 33)
    losses = _losses(shard)
    total = evaluate(model("gpt2"), shard, LENGTHS, EvaluationOptions(context=16, stride=8))
    assert float(np.nansum(losses.nats)) == pytest.approx(total.nats)
    assert len(losses.positions) == total.tokens == 90
    assert losses.context_lengths[losses.positions].min() == 1
    assert losses.context_lengths[losses.positions].max() == 16
    for rows in (
        breakdown.by_document(losses, LENGTHS),
        breakdown.by_position(losses, LENGTHS),
        breakdown.by_frequency(losses, LENGTHS, shard),
    ):
        assert sum(row.tokens for row in rows) == 90
        assert sum(row.loss * row.tokens for row in rows) == pytest.approx(total.nats)
        assert sum(row.share for row in rows) == pytest.approx(1)
    first = breakdown.by_document(losses, LENGTHS)[0]
    assert first.loss == pytest.approx(losses.nats[1:41].mean())
    assert first.bits_per_byte == pytest.approx(losses.nats[1:41].sum() / math.log(2) / LENGTHS[shard.tokens[1:41]].sum())


def test_every_token_has_the_context_that_the_stride_guarantees() -> None:
    losses = _losses(_shard(100), context=16, stride=4)
    assert (losses.context_lengths[2:101] >= np.minimum(np.arange(2, 101), 12 + 1)).all()


def test_evaluation_across_documents_scores_every_token_except_end_of_text_once() -> None:
    shard = _shard(10, 1, 20)
    losses = _losses(shard, across_documents=True, context=16, stride=16)
    assert len(losses.positions) == 31
    network, tokens = model("gpt2"), torch.from_numpy(shard.tokens.astype(np.int64))
    nats = 0.0
    for begin in range(0, len(tokens) - 2, 16):
        window = tokens[begin : min(begin + 17, len(tokens) - 1)]
        with torch.no_grad():
            logprobs = network(window[None, :-1])[0].log_softmax(-1)
        nats -= sum(float(logprobs[i, id]) for i, id in enumerate(window[1:].tolist()) if id != END)
    assert float(np.nansum(losses.nats)) == pytest.approx(nats, rel=1e-5)
    assert float(np.nansum(losses.nats)) != pytest.approx(float(np.nansum(_losses(shard, context=16, stride=16).nats)))


def test_frequencies_are_counted_in_the_training_text() -> None:
    shard = Shard(np.array([END, 5, 6, 7, 7, END], dtype=np.uint16), Counts(1, 9, 9, 4, 0), END)
    train = Shard(np.array([END, *[5] * 9, *[7] * 10, END], dtype=np.uint16), Counts(1, 1, 1, 19, 0), END)
    rows = breakdown.by_frequency(_losses(shard), LENGTHS, train)
    assert [(row.name, row.tokens) for row in rows] == [("never", 1), ("1-9", 1), ("10-99", 2)]


def test_a_real_difference_is_significant_and_noise_is_not() -> None:
    shard = _shard(*[30] * 60)
    a, b = _losses(shard), _losses(shard, seed=5)
    result = significance.compare_losses(a, LENGTHS, b, LENGTHS)
    total = LENGTHS[shard.tokens].sum() * math.log(2)
    assert result.a == pytest.approx(np.nansum(a.nats) / total)
    assert result.difference == pytest.approx((np.nansum(a.nats) - np.nansum(b.nats)) / total)
    assert result.ci95[0] <= result.difference <= result.ci95[1]
    assert (result.pieces, result.kind) == (60, "documents")
    assert result.p_value < 0.01
    noisy = TokenLosses(shard)
    noisy.nats = a.nats + np.random.default_rng(0).normal(0, 0.5, len(a.nats))
    insignificant = significance.compare_losses(a, LENGTHS, noisy, LENGTHS)
    assert insignificant.ci95[0] < 0 < insignificant.ci95[1]
    assert insignificant.p_value > 0.05
    same = significance.compare_losses(a, LENGTHS, a, LENGTHS)
    assert (same.difference, same.p_value) == (0, 1)


def test_one_long_document_is_split_into_pieces_and_different_texts_are_rejected() -> None:
    shard = _shard(2000)
    result = significance.compare_losses(_losses(shard), LENGTHS, _losses(shard, seed=5), LENGTHS)
    assert result.kind == "stretches of text"
    assert result.pieces > 20
    with pytest.raises(InputError, match="the texts differ"):
        significance.compare_losses(_losses(shard), LENGTHS, _losses(_shard(1999)), LENGTHS)
    with pytest.raises(InputError, match="too short"):
        significance.compare_losses(_losses(_shard(30)), LENGTHS, _losses(_shard(30)), LENGTHS)


def test_a_run_is_evaluated_with_all_tables_and_an_html_page(tiny_run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    details = BreakdownOptions(baselines=True, by_frequency=True, by_position=True, by_document=True, hardest=4, html=page)
    result = evaluate_run(tiny_run, device="cpu", details=details)
    document = json.loads(json.dumps(result.as_dict()))
    assert document["bits_per_byte"] == evaluate_run(tiny_run, device="cpu").perplexity.bits_per_byte
    assert {name.partition(" with ")[0] for name in document["baselines"]} >= {"1-gram Kneser-Ney", "5-gram Kneser-Ney", "xz"}
    assert 0 <= document["overlap"] <= 1
    assert len(document["hardest"]) == 4
    assert document["hardest"][0]["nats"] >= document["hardest"][-1]["nats"]
    content = page.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', content, re.DOTALL)[1])
    assert len(data) == document["tokens"]
    assert sum(bits for _, bits, _, _ in data) == pytest.approx(document["loss"] * document["tokens"] / math.log(2), rel=1e-2)
    shown = re.search(r'<div id="text">(.*?)</div>', content, re.DOTALL)[1]
    text = unescape(re.sub("<[^>]*>", "", re.sub("<i>[\u21b5\u00b7]</i>", "", shown)))
    assert text == text_bytes(tiny_run.heldout(), tiny_run.tokenizer).decode()
    assert not re.search(r"(src|href)=|@import|url\(", content.replace(shown, "")), "the page must not load anything"


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_packed_weights_are_evaluated(tiny_run: Run, weights: str) -> None:
    fp32 = evaluate_run(tiny_run, device="cpu").perplexity.bits_per_byte
    result = evaluate_run(tiny_run, weights=weights, device="cpu")
    assert result.as_dict()["weights"] == weights
    assert result.perplexity.bits_per_byte != fp32
    assert result.perplexity.bits_per_byte == pytest.approx(fp32, abs=0.01)
