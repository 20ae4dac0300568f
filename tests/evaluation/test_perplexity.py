"""Perplexity against a slow reference that reads one token at a time, and what comparable numbers need."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import model

from tinylm.data.shards import Counts, Shard
from tinylm.errors import InputError
from tinylm.evaluation import perplexity
from tinylm.evaluation.perplexity import Perplexity, evaluate, windows_of
from tinylm.model.transformer import Transformer

END = 0
VOCABULARY = 61
BYTES = np.arange(VOCABULARY) % 4 + 1
BYTES[END] = 0
LENGTHS = (40, 1, 16, 17, 5, 33, 2)
CPU = torch.device("cpu")


def _documents(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    generator = np.random.default_rng(7)
    return [generator.integers(1, VOCABULARY, length) for length in lengths]


def _shard(documents: list[np.ndarray]) -> Shard:
    tokens = np.concatenate([[END], *(part for document in documents for part in (document, [END]))]).astype(np.uint16)
    everything = np.concatenate(documents)
    size = int(BYTES[everything].sum())
    return Shard(tokens, Counts(len(documents), size, size, len(everything), 0), END)


def _measure(network: Transformer, documents: list[np.ndarray], **options: object) -> Perplexity:
    return evaluate(network, _shard(documents), BYTES, device=CPU, **{"context": 16, **options})


@torch.no_grad()
def _one_at_a_time(network: Transformer, documents: list[np.ndarray], context: int, stride: int) -> float:
    """Nats. Target i is told by the first window that reaches it: windows begin at multiples of the stride."""
    nats = 0.0
    for document in documents:
        read = torch.tensor([END, *document.tolist()])
        for i in range(len(document)):
            begin = 0
            while begin + context <= i:
                begin += stride
            logits = network(read[None, begin : i + 1])[0, -1].double()
            nats -= float(logits.log_softmax(dim=-1)[read[i + 1]])
    return nats


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 1), (16, 5), (8, 8), (8, 3), (1, 1)])
@pytest.mark.parametrize("preset", ["modern", "gpt2"])
def test_the_loss_is_that_of_reading_one_token_at_a_time(preset: str, context: int, stride: int) -> None:
    network, documents = model(preset), _documents()
    measured = _measure(network, documents, context=context, stride=stride)
    assert measured.nats == pytest.approx(_one_at_a_time(network, documents, context, stride), rel=1e-6)
    assert measured.tokens == sum(LENGTHS)
    assert (measured.context, measured.stride, measured.documents) == (context, stride, len(LENGTHS))


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 1), (16, 7), (3, 2), (1, 1), (100, 100)])
def test_every_token_is_scored_exactly_once_by_a_window_inside_its_document(context: int, stride: int) -> None:
    spans = _shard(_documents()).documents()
    scored: list[int] = []
    for window in windows_of(spans, context, stride):
        start, end = spans[window.document]
        assert start - 1 <= window.start
        assert window.start + window.length < end
        assert window.length <= context
        scored += range(window.start + 1 + window.length - window.scored, window.start + 1 + window.length)
    assert scored == [position for start, end in spans for position in range(start, end)]


def test_a_stride_of_the_context_is_the_default_and_a_shorter_one_reads_more() -> None:
    network, documents = model(), _documents()
    assert _measure(network, documents) == _measure(network, documents, stride=16)
    assert _measure(network, documents, stride=1).nats != _measure(network, documents).nats


def test_documents_never_see_each_other() -> None:
    network, documents = model(), _documents()
    together = _measure(network, documents).nats
    apart = sum(_measure(network, [document]).nats for document in documents)
    turned = _measure(network, documents[::-1]).nats
    assert together == pytest.approx(apart, rel=1e-6)
    assert together == pytest.approx(turned, rel=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_how_windows_are_batched_and_padded_changes_nothing(batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, documents = model(), _documents()
    usual = _measure(network, documents, stride=5).nats
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", batch_tokens)
    assert _measure(network, documents, stride=5).nats == pytest.approx(usual, rel=1e-6)


@pytest.mark.parametrize("most", [1, 40, 41, 45, 90])
def test_max_tokens_scores_the_first_so_many(most: int) -> None:
    network, documents = model(), _documents()
    first, left = [], most
    for document in documents:
        first.append(document[:left])
        left -= len(first[-1])
    first = [document for document in first if len(document)]
    measured = _measure(network, documents, max_tokens=most, stride=4)
    assert measured.tokens == most
    assert measured.documents == len(first)
    assert measured.nats == pytest.approx(_one_at_a_time(network, first, 16, 4), rel=1e-6)
    assert measured.bytes == int(BYTES[np.concatenate(first)].sum())
    assert measured.characters is None


@pytest.mark.parametrize("most", [sum(LENGTHS), 10_000])
def test_max_tokens_beyond_the_text_is_the_whole_text(most: int) -> None:
    network, documents = model(), _documents()
    assert _measure(network, documents, max_tokens=most) == _measure(network, documents)


def test_a_model_that_knows_nothing_has_the_vocabularys_perplexity() -> None:
    network = model()
    with torch.no_grad():
        network.head.weight.zero_()
    measured = _measure(network, _documents())
    assert measured.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert measured.loss == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert measured.bits_per_byte == pytest.approx(math.log2(VOCABULARY) * measured.tokens / measured.bytes, rel=1e-6)


@pytest.mark.parametrize("lengths", [LENGTHS, (300,), (9,) * 60], ids=["few", "one", "many"])
def test_the_interval_holds_the_estimate_and_is_the_same_each_time(lengths: tuple[int, ...]) -> None:
    network, documents = model(), _documents(lengths)
    measured = _measure(network, documents)
    low, high = measured.bits_per_byte_ci95
    assert low - 1e-9 <= measured.bits_per_byte <= high + 1e-9
    assert _measure(network, documents).bits_per_byte_ci95 == (low, high)


def test_a_text_of_a_few_windows_has_no_interval() -> None:
    assert all(math.isnan(bound) for bound in _measure(model(), _documents((3,))).bits_per_byte_ci95)


def test_the_interval_narrows_with_the_root_of_the_text() -> None:
    network = model()
    widths = []
    for count in (60, 960):
        low, high = _measure(network, _documents((9,) * count)).bits_per_byte_ci95
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.35)


@pytest.mark.parametrize("training", [True, False])
def test_the_networks_mode_is_put_back_also_after_an_interruption(training: bool) -> None:
    network, documents = model(dropout=0.5).train(training), _documents()
    measured = _measure(network, documents)
    assert network.training is training
    assert measured.nats == pytest.approx(_one_at_a_time(network.eval(), documents, 16, 16), rel=1e-6)
    network.train(training)

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _measure(network, documents, advance=interrupt)
    assert network.training is training


def test_progress_ends_at_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 20)
    told: list[int] = []
    _measure(model(), _documents(), advance=told.append)
    assert told == sorted(told)
    assert len(told) > 3
    assert told[-1] == sum(LENGTHS)


@pytest.mark.parametrize("stride", [0, -1, 17])
def test_a_stride_out_of_range_is_refused(stride: int) -> None:
    with pytest.raises(InputError, match="1 to 16") as caught:
        _measure(model(), _documents(), stride=stride)
    assert caught.value.where == "--stride"


def test_an_empty_text_is_refused() -> None:
    empty = Shard(np.array([END], dtype=np.uint16), Counts(0, 0, 0, 0, 0), END)
    with pytest.raises(InputError, match="empty"):
        evaluate(model(), empty, BYTES, context=16, device=CPU)
