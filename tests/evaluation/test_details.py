"""Tables are sums of the same losses, comparisons find what is there, and the page shows all of it."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import model

from tinylm.data.shards import Counts, Shard
from tinylm.errors import InputError
from tinylm.evaluation import details, paired
from tinylm.evaluation.details import TokenLosses
from tinylm.evaluation.measure import Details, compare, measure, text_of
from tinylm.evaluation.perplexity import evaluate
from tinylm.run import Run

END, VOCABULARY = 0, 61
LENGTHS = np.array([0, *(1 + id % 4 for id in range(1, VOCABULARY))])


def _shard(*sizes: int, seed: int = 3) -> Shard:
    generator = np.random.default_rng(seed)
    documents = [generator.integers(1, VOCABULARY, size) for size in sizes]
    tokens = np.concatenate([[END], *(part for document in documents for part in (document, [END]))]).astype(np.uint16)
    total = int(LENGTHS[tokens].sum())
    return Shard(tokens, Counts(len(sizes), total, total, sum(sizes), 0), END)


def _losses(shard: Shard, *, seed: int = 0, **options: object) -> TokenLosses:
    losses = TokenLosses(shard, alternatives=len(shard))
    network = model("gpt2")
    if seed:
        torch.nn.init.normal_(network.head.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    evaluate(network, shard, LENGTHS, device=torch.device("cpu"), observe=losses, **{"context": 16, "stride": 8, **options})
    return losses


def test_the_losses_token_by_token_are_those_of_the_whole() -> None:
    shard = _shard(40, 1, 16, 33)
    losses = _losses(shard)
    whole = evaluate(model("gpt2"), shard, LENGTHS, context=16, stride=8, device=torch.device("cpu"))
    assert float(np.nansum(losses.nats)) == pytest.approx(whole.nats)
    assert len(losses.places) == whole.tokens == 90
    assert losses.contexts[losses.places].min() == 1
    assert losses.contexts[losses.places].max() == 16
    for rows in (
        details.by_document(losses, LENGTHS),
        details.by_position(losses, LENGTHS),
        details.by_frequency(losses, LENGTHS, shard),
    ):
        assert sum(row.tokens for row in rows) == 90
        assert sum(row.loss * row.tokens for row in rows) == pytest.approx(whole.nats)
        assert sum(row.share for row in rows) == pytest.approx(1)
    first = details.by_document(losses, LENGTHS)[0]
    assert first.loss == pytest.approx(losses.nats[1:41].mean())
    assert first.bits_per_byte == pytest.approx(losses.nats[1:41].sum() / math.log(2) / LENGTHS[shard.tokens[1:41]].sum())


def test_every_token_has_as_much_context_as_the_stride_allows() -> None:
    losses = _losses(_shard(100), context=16, stride=4)
    assert (losses.contexts[2:101] >= np.minimum(np.arange(2, 101), 12 + 1)).all()


def test_across_documents_nothing_is_scored_twice_and_no_end_of_text() -> None:
    shard = _shard(10, 1, 20)
    losses = _losses(shard, across_documents=True, context=16, stride=16)
    assert len(losses.places) == 31
    network, tokens = model("gpt2"), torch.from_numpy(shard.tokens.astype(np.int64))
    nats = 0.0
    for begin in range(0, len(tokens) - 2, 16):
        read = tokens[begin : min(begin + 17, len(tokens) - 1)]
        with torch.no_grad():
            logprobs = network(read[None, :-1])[0].log_softmax(-1)
        nats -= sum(float(logprobs[at, id]) for at, id in enumerate(read[1:].tolist()) if id != END)
    assert float(np.nansum(losses.nats)) == pytest.approx(nats, rel=1e-5)
    assert float(np.nansum(losses.nats)) != pytest.approx(float(np.nansum(_losses(shard, context=16, stride=16).nats)))


def test_frequencies_are_those_of_the_training_text() -> None:
    shard = Shard(np.array([END, 5, 6, 7, 7, END], dtype=np.uint16), Counts(1, 9, 9, 4, 0), END)
    train = Shard(np.array([END, *[5] * 9, *[7] * 10, END], dtype=np.uint16), Counts(1, 1, 1, 19, 0), END)
    rows = details.by_frequency(_losses(shard), LENGTHS, train)
    assert [(row.name, row.tokens) for row in rows] == [("never", 1), ("1-9", 1), ("10-99", 2)]


def test_overlap_is_the_share_of_tokens_in_runs_of_thirteen() -> None:
    train = _shard(100)
    half = np.concatenate([[END], train.tokens[20:45], np.full(75, 9), [END]]).astype(np.uint16)
    assert details.overlap(Shard(half, Counts(1, 1, 1, 100, 0), END), train) == pytest.approx(0.25)
    short = np.concatenate([[END], train.tokens[20:32], [END]]).astype(np.uint16)
    assert details.overlap(Shard(short, Counts(1, 1, 1, 12, 0), END), train) == 0
    assert details.overlap(train, train) == 1


def test_a_difference_that_is_there_is_found_and_one_that_is_not_is_not() -> None:
    shard = _shard(*[30] * 60)
    a, b = _losses(shard), _losses(shard, seed=5)
    found = paired.compare(a, LENGTHS, b, LENGTHS)
    total = LENGTHS[shard.tokens].sum() * math.log(2)
    assert found.a == pytest.approx(np.nansum(a.nats) / total)
    assert found.difference == pytest.approx((np.nansum(a.nats) - np.nansum(b.nats)) / total)
    assert found.ci95[0] <= found.difference <= found.ci95[1]
    assert (found.pieces, found.kind) == (60, "documents")
    assert found.p_value < 0.01
    noisy = TokenLosses(shard)
    noisy.nats = a.nats + np.random.default_rng(0).normal(0, 0.5, len(a.nats))
    unsure = paired.compare(a, LENGTHS, noisy, LENGTHS)
    assert unsure.ci95[0] < 0 < unsure.ci95[1]
    assert unsure.p_value > 0.05
    same = paired.compare(a, LENGTHS, a, LENGTHS)
    assert (same.difference, same.p_value) == (0, 1)


def test_one_long_document_is_compared_by_stretches_and_other_texts_not_at_all() -> None:
    shard = _shard(2000)
    found = paired.compare(_losses(shard), LENGTHS, _losses(shard, seed=5), LENGTHS)
    assert found.kind == "stretches of text"
    assert found.pieces > 20
    with pytest.raises(InputError, match="different texts"):
        paired.compare(_losses(shard), LENGTHS, _losses(_shard(1999)), LENGTHS)
    with pytest.raises(InputError, match="too short"):
        paired.compare(_losses(_shard(30)), LENGTHS, _losses(_shard(30)), LENGTHS)


def test_a_run_compared_with_itself_is_the_same(tiny_run: Run, tmp_path: Path) -> None:
    found = compare(tiny_run, tiny_run, device="cpu")
    assert found.difference == 0
    assert found.a == pytest.approx(measure(tiny_run, device="cpu").perplexity.bits_per_byte)


def test_everything_at_once_for_a_run_and_the_page_that_shows_it(tiny_run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    wanted = Details(baselines=True, by_frequency=True, by_position=True, by_document=True, hardest=4, html=page)
    found = measure(tiny_run, device="cpu", wanted=wanted)
    document = json.loads(json.dumps(found.as_dict()))
    assert document["bits_per_byte"] == measure(tiny_run, device="cpu").perplexity.bits_per_byte
    assert {name.split(",")[0] for name in document["baselines"]} >= {"1-gram Kneser-Ney", "5-gram Kneser-Ney", "xz"}
    assert 0 <= document["overlap"] <= 1
    assert len(document["hardest"]) == 4
    assert document["hardest"][0]["nats"] >= document["hardest"][-1]["nats"]
    told = page.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', told, re.DOTALL)[1])
    assert len(data) == document["tokens"]
    assert sum(bits for _, bits, _, _ in data) == pytest.approx(document["loss"] * document["tokens"] / math.log(2), rel=1e-2)
    shown = re.search(r'<div id="text">(.*?)</div>', told, re.DOTALL)[1]
    text = unescape(re.sub("<[^>]*>", "", re.sub("<i>[\u21b5\u00b7]</i>", "", shown)))
    assert text == text_of(tiny_run.heldout(), tiny_run.tokenizer).decode()
    assert not re.search(r"(src|href)=|@import|url\(", told.replace(shown, "")), "the page needs nothing else"


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_other_weights_are_measured_as_they_are(tiny_run: Run, weights: str) -> None:
    plain = measure(tiny_run, device="cpu").perplexity.bits_per_byte
    found = measure(tiny_run, weights=weights, device="cpu")
    assert found.as_dict()["weights"] == weights
    assert found.perplexity.bits_per_byte != plain
    assert found.perplexity.bits_per_byte == pytest.approx(plain, abs=0.01)
