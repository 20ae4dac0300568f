"""Test that perplexity matches a slow reference that scores one token at a time, and does not depend on batches or order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny import model
from torch.utils._python_dispatch import TorchDispatchMode

from tinylm.data.shards import Counts, Shard
from tinylm.errors import InputError
from tinylm.evaluation import perplexity
from tinylm.evaluation.perplexity import BatchLimits, EvaluationOptions, Perplexity, evaluate, sliding_windows
from tinylm.model.transformer import Transformer

END = 0
VOCAB_SIZE = 61
BYTES = np.arange(VOCAB_SIZE) % 4 + 1
BYTES[END] = 0
LENGTHS = (40, 1, 16, 17, 5, 33, 2)


def _documents(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    generator = np.random.default_rng(7)
    return [generator.integers(1, VOCAB_SIZE, length) for length in lengths]


def _shard(documents: list[np.ndarray]) -> Shard:
    tokens = np.concatenate([[END], *(part for document in documents for part in (document, [END]))]).astype(np.uint16)
    all_tokens = np.concatenate(documents)
    size = int(BYTES[all_tokens].sum())
    return Shard(tokens, Counts(len(documents), size, size, len(all_tokens), 0), END)


def _evaluate(network: Transformer, documents: list[np.ndarray], **options: Any) -> Perplexity:
    return evaluate(network, _shard(documents), BYTES, EvaluationOptions(**{"context": 16, **options}))


@torch.no_grad()
def _reference_nats(network: Transformer, documents: list[np.ndarray], context: int, stride: int) -> float:
    """Return the total loss in nats. Windows start at multiples of the stride, and each token is scored in its first window."""
    nats = 0.0
    for document in documents:
        tokens = torch.tensor([END, *document.tolist()])
        for i in range(len(document)):
            begin = 0
            while begin + context <= i:
                begin += stride
            logits = network(tokens[None, begin : i + 1])[0, -1].double()
            nats -= float(logits.log_softmax(dim=-1)[tokens[i + 1]])
    return nats


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 1), (16, 5), (8, 8), (8, 3), (1, 1)])
@pytest.mark.parametrize("preset", ["modern", "gpt2"])
def test_the_loss_matches_scoring_one_token_at_a_time(preset: str, context: int, stride: int) -> None:
    network, documents = model(preset), _documents()
    result = _evaluate(network, documents, context=context, stride=stride)
    assert result.nats == pytest.approx(_reference_nats(network, documents, context, stride), rel=1e-6)
    assert result.tokens == sum(LENGTHS)
    assert (result.context, result.stride, result.documents) == (context, stride, len(LENGTHS))


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 1), (16, 7), (3, 2), (1, 1), (100, 100)])
def test_every_token_is_scored_exactly_once_by_a_window_within_its_document(context: int, stride: int) -> None:
    spans = _shard(_documents()).documents()
    scored: list[int] = []
    for window in sliding_windows(spans, context, stride):
        start, end = spans[window.document]
        assert start - 1 <= window.start
        assert window.start + window.length < end
        assert window.length <= context
        scored += range(window.start + 1 + window.length - window.scored, window.start + 1 + window.length)
    assert scored == [position for start, end in spans for position in range(start, end)]


def test_stride_defaults_to_the_context_and_a_shorter_stride_changes_the_loss() -> None:
    network, documents = model(), _documents()
    assert _evaluate(network, documents) == _evaluate(network, documents, stride=16)
    assert _evaluate(network, documents, stride=1).nats != _evaluate(network, documents).nats


def test_documents_are_scored_independently() -> None:
    network, documents = model(), _documents()
    together = _evaluate(network, documents).nats
    separate = sum(_evaluate(network, [document]).nats for document in documents)
    reversed_order = _evaluate(network, documents[::-1]).nats
    assert together == pytest.approx(separate, rel=1e-6)
    assert together == pytest.approx(reversed_order, rel=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_batching_and_padding_do_not_change_the_loss(batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, documents = model(), _documents()
    expected = _evaluate(network, documents, stride=5).nats
    monkeypatch.setattr(perplexity, "EVALUATION_BATCH_TOKENS", batch_tokens)
    assert _evaluate(network, documents, stride=5).nats == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("max_tokens", [1, 40, 41, 45, 90])
def test_max_tokens_limits_scoring_to_the_beginning_of_the_text(max_tokens: int) -> None:
    network, documents = model(), _documents()
    first, remaining = [], max_tokens
    for document in documents:
        first.append(document[:remaining])
        remaining -= len(first[-1])
    first = [document for document in first if len(document)]
    result = _evaluate(network, documents, max_tokens=max_tokens, stride=4)
    assert result.tokens == max_tokens
    assert result.documents == len(first)
    assert result.nats == pytest.approx(_reference_nats(network, first, 16, 4), rel=1e-6)
    assert result.bytes == int(BYTES[np.concatenate(first)].sum())
    assert result.characters is None


@pytest.mark.parametrize("max_tokens", [sum(LENGTHS), 10_000])
def test_the_whole_text_is_scored_if_max_tokens_exceeds_its_length(max_tokens: int) -> None:
    network, documents = model(), _documents()
    assert _evaluate(network, documents, max_tokens=max_tokens) == _evaluate(network, documents)


def test_the_perplexity_of_a_uniform_model_is_the_vocabulary_size() -> None:
    network = model()
    with torch.no_grad():
        network.head.weight.zero_()
    result = _evaluate(network, _documents())
    assert result.perplexity == pytest.approx(VOCAB_SIZE, rel=1e-6)
    assert result.loss == pytest.approx(math.log(VOCAB_SIZE), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(math.log2(VOCAB_SIZE) * result.tokens / result.bytes, rel=1e-6)


@pytest.mark.parametrize("lengths", [LENGTHS, (300,), (9,) * 60], ids=["few", "one", "many"])
def test_the_interval_contains_the_estimate_and_is_deterministic(lengths: tuple[int, ...]) -> None:
    network, documents = model(), _documents(lengths)
    result = _evaluate(network, documents)
    low, high = result.bits_per_byte_ci95
    assert low - 1e-9 <= result.bits_per_byte <= high + 1e-9
    assert _evaluate(network, documents).bits_per_byte_ci95 == (low, high)


def test_a_text_with_few_windows_has_no_interval() -> None:
    assert all(math.isnan(bound) for bound in _evaluate(model(), _documents((3,))).bits_per_byte_ci95)


def test_the_width_of_the_interval_shrinks_with_the_square_root_of_the_text_length() -> None:
    network = model()
    widths = []
    for count in (60, 960):
        low, high = _evaluate(network, _documents((9,) * count)).bits_per_byte_ci95
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.35)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_restored_even_after_an_interruption(training: bool) -> None:
    network, documents = model(dropout=0.5).train(training), _documents()
    result = _evaluate(network, documents)
    assert network.training is training
    assert result.nats == pytest.approx(_reference_nats(network.eval(), documents, 16, 16), rel=1e-6)
    network.train(training)

    def interrupt(tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(network, _shard(documents), BYTES, on_progress=interrupt)
    assert network.training is training


@pytest.mark.parametrize("limits", [BatchLimits(10**6), BatchLimits(10**6, 7 * VOCAB_SIZE), BatchLimits(40, 1)], ids=str)
def test_large_batches_and_chunked_logits_do_not_change_the_loss(limits: BatchLimits) -> None:
    network, shard, options = model("modern"), _shard(_documents()), EvaluationOptions(16, 5)
    expected, parts = evaluate(network, shard, BYTES, options), []
    result = evaluate(network, shard, BYTES, options, limits=limits, on_batch=parts.append)
    assert result.nats == pytest.approx(expected.nats, rel=1e-6)
    assert (result.tokens, result.bytes) == (expected.tokens, expected.bytes)
    assert result.bits_per_byte_ci95 == pytest.approx(expected.bits_per_byte_ci95, rel=1e-6)
    assert sum(part.nats.sum() for part in parts) == pytest.approx(expected.nats, rel=1e-6)
    if limits.logits is not None:
        assert all(part.logits.numel() <= max(limits.logits, VOCAB_SIZE) for part in parts)


class _CopiesToHost(TorchDispatchMode):
    """Counts the copies to the host. Losses are converted to float64 there, which happens once per copy even on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.count += kwargs.get("dtype") == torch.float64 and func is torch.ops.aten._to_copy.default
        self.count += func is torch.ops.aten._local_scalar_dense.default  # `item` and `tolist`
        return func(*args, **kwargs)


def test_the_losses_of_all_batches_are_copied_to_the_host_together() -> None:
    batches = 0

    def count_batches(_: int) -> None:
        nonlocal batches
        batches += 1

    with _CopiesToHost() as copies:
        evaluate(model("gpt2"), _shard(_documents()), BYTES, limits=BatchLimits(20), on_progress=count_batches)
    assert batches > 4
    assert copies.count == 1


def test_progress_increases_up_to_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "EVALUATION_BATCH_TOKENS", 20)
    progress: list[int] = []
    evaluate(model(), _shard(_documents()), BYTES, on_progress=progress.append)
    assert progress == sorted(progress)
    assert len(progress) > 3
    assert progress[-1] == sum(LENGTHS)


@pytest.mark.parametrize("stride", [0, -1, 17])
def test_a_stride_out_of_range_is_rejected(stride: int) -> None:
    with pytest.raises(InputError, match="1 to 16") as caught:
        _evaluate(model(), _documents(), stride=stride)
    assert caught.value.where == "--stride"


def test_an_empty_text_is_rejected() -> None:
    empty = Shard(np.array([END], dtype=np.uint16), Counts(0, 0, 0, 0, 0), END)
    with pytest.raises(InputError, match="empty"):
        evaluate(model(), empty, BYTES)
