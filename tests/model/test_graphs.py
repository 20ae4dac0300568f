"""Steps captured in graphs return the same logits as plain steps. A backend that records operations replaces CUDA."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from model.parts import CASES, case_network
from recorded_graphs import NoGraphs, RecordedGraphs
from tiny import PRESETS, ids, model

from tinylm.generation.engine import Engine, Request, generate, generate_batch, sample_seed
from tinylm.generation.row_sampler import RowSampler
from tinylm.generation.sampling import SamplingOptions
from tinylm.model import graphs
from tinylm.model.decoder import SUPPORTS, Decoder
from tinylm.model.functions import attention_without_cudnn
from tinylm.model.graphs import GraphBackend, GraphedSteps, Work, rows_in_graph, span_in_graph
from tinylm.model.packed import pack, to_bfloat16
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import ByteTokenizer
from tinylm.recipe.support import unsupported_parts
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


def _graphed(network: Transformer, backend: GraphBackend | None = None) -> Decoder:
    return Decoder(network, compiled=True, backend="graphs", graphs=backend or RecordedGraphs())


def _assert_graphed_steps_match_plain_steps(network: Transformer, *, rows: tuple[int, ...] = (1, 3, 2), steps: int = 2) -> None:
    """Prefill rows of different lengths and decode a few tokens, with different numbers of active rows."""
    decoders = _graphed(network), Decoder(network)
    tokens, caches = ids(max(rows), 16), [decoder.new_state(max(rows)) for decoder in decoders]
    for count in rows:
        logits: list[list[torch.Tensor]] = [[], []]
        for decoder, cache, collected in zip(decoders, caches, logits, strict=True):
            cache.resize(count)
            for row in range(count):
                decoder.prefill(cache, row, tokens[row, : 4 + row])
            collected += [decoder.step(cache, tokens[:count, 9 + step]) for step in range(steps)]
        torch.testing.assert_close(logits[0], logits[1], atol=2e-5, rtol=1e-5)
        assert caches[0].lengths == caches[1].lengths


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.inference_mode()
def test_graphed_steps_match_plain_steps_for_every_model_key(case: dict[str, Any]) -> None:
    network = case_network(case, "modern")
    if unsupported_parts(network.model, SUPPORTS):
        pytest.skip("decoded by full passes")
    _assert_graphed_steps_match_plain_steps(network)


@torch.inference_mode()
def test_graphs_are_captured_once_for_each_power_of_two_of_rows_and_each_span_of_128() -> None:
    network, recorded = model("modern", context_length=300), RecordedGraphs()
    decoder, plain = _graphed(network, recorded), Decoder(network)
    tokens, caches = ids(5, 300), [decoder.new_state(5), plain.new_state(5)]
    captures = []
    for count, length in ((1, 4), (2, 4), (3, 4), (4, 126), (5, 126), (5, 255), (1, 298)):
        logits: list[list[torch.Tensor]] = [[], []]
        for each, cache, collected in zip((decoder, plain), caches, logits, strict=True):
            cache.resize(count)
            for row in range(count):
                each.prefill(cache, row, tokens[row, : length - row % 2])
            collected += [each.step(cache, tokens[:count, length]) for _ in range(2)]
        torch.testing.assert_close(logits[0], logits[1], atol=2e-5, rtol=1e-5)
        captures.append(recorded.captures)
    # (1, 128); (2, 128); (4, 128); no new graph; (5, 128); (5, 256) and (5, 300) for positions 256 and 257; (1, 300)
    assert captures == [1, 2, 3, 3, 4, 6, 7]


def test_the_buckets_cover_all_rows_and_positions_and_do_not_exceed_the_cache() -> None:
    assert [rows_in_graph(active, 64) for active in (1, 2, 3, 4, 5, 33, 64)] == [1, 2, 4, 4, 8, 64, 64]
    assert [rows_in_graph(active, 5) for active in (1, 3, 4, 5)] == [1, 4, 4, 5]
    assert [span_in_graph(length, 1000) for length in (1, 128, 129, 896, 897, 1000)] == [128, 128, 256, 896, 1000, 1000]
    assert span_in_graph(3, 16) == 16


@torch.inference_mode()
def test_rows_can_be_copied_reordered_dropped_and_evicted_between_graphed_steps() -> None:
    network, tokens = model("modern", ngram_embeddings=[2, 3], ngram_rows=97), ids(4, 16)
    decoder = _graphed(network)
    cache = decoder.new_state(4)
    decoder.prefill(cache, 0, tokens[0, :6])
    cache.fork(0, range(1, 4))
    for step in range(2):
        decoder.step(cache, tokens[:, 6 + step])
    cache.reorder([3], [1])
    cache.resize(2)
    logits = decoder.step(cache, tokens[[0, 3], 8])
    full = torch.cat((tokens[:1, :6].expand(4, -1), tokens[:, 6:9]), dim=1)
    torch.testing.assert_close(logits, network(full)[[0, 3], -1], atol=3e-5, rtol=1e-5)
    cache.evict(0, 4)
    decoder.prefill(cache, 0, tokens[2, :4])
    logits = decoder.step(cache, tokens[[2, 3], [4, 9]])
    torch.testing.assert_close(logits[0], network(tokens[2:3, :5])[0, -1], atol=3e-5, rtol=1e-5)


@torch.inference_mode()
def test_the_logits_of_a_step_are_not_overwritten_by_the_next_step() -> None:
    decoder, tokens = _graphed(model("gpt2")), ids(1, 16)
    cache = decoder.new_state(1)
    decoder.prefill(cache, 0, tokens[0, :4])
    first = decoder.step(cache, tokens[:, 4])
    copy = first.clone()
    decoder.step(cache, tokens[:, 5])
    assert torch.equal(first, copy)


@torch.inference_mode()
def test_the_graphs_of_a_cache_are_freed_with_the_cache() -> None:
    decoder, tokens = _graphed(model("gpt2")), ids(1, 16)
    cache = decoder.new_state(1)
    decoder.prefill(cache, 0, tokens[0, :4])
    decoder.step(cache, tokens[:, 4])
    keys = weakref.ref(cache.keys)
    del cache
    gc.collect()
    assert keys() is None


@torch.inference_mode()
def test_a_step_that_cannot_be_captured_is_decoded_without_graphs_after_a_warning() -> None:
    network, tokens = model("llama"), ids(1, 16)
    decoder = Decoder(network, compiled=True, backend="graphs", graphs=NoGraphs())
    cache = decoder.new_state(1)
    decoder.prefill(cache, 0, tokens[0, :4])
    with pytest.warns(UserWarning, match="without CUDA graphs.*not permitted"):
        logits = [decoder.step(cache, tokens[:, 4])]
    logits.append(decoder.step(cache, tokens[:, 5]))
    expected = network(tokens[:, :6])[0, 4:]
    torch.testing.assert_close(torch.cat(logits), expected, atol=3e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return training.train(ByteTokenizer(kind="byte"), iter([Piece("text", True)]), print)


def _texts(decoder: Decoder, tokenizer: Tokenizer, requests: Sequence[Request], *, rows: int) -> list[tuple[str, str]]:
    samples = generate_batch(decoder, tokenizer, requests, rows=rows)
    return [(sample.text, sample.finish_reason) for sample in samples]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.3, "top_k": None},
        {"top_k": 50, "stop": ("\x00", "e")},
        {"top_k": 20, "top_p": 0.7},
        {"top_k": None, "top_p": 0.9},
        {"top_k": None, "min_p": 0.1},
    ],
    ids=str,
)
def test_tokens_that_are_chosen_in_graphs_equal_tokens_that_are_chosen_on_the_host(
    options: dict[str, Any], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of different lengths start and end at different times. None of them fills its row, so the host chooses no token."""
    network = model("modern", vocab_size=tokenizer.vocab_size, context_length=32, n_layer=1)
    requests = [
        Request("the " * (1 + seed % 2), SamplingOptions(max_new_tokens=4 + 3 * seed, **options), seed) for seed in range(4)
    ]
    expected = _texts(Decoder(network), tokenizer, requests, rows=3)
    monkeypatch.setattr(RowSampler, "next_tokens", None)
    assert _texts(_graphed(network), tokenizer, requests, rows=3) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 30},  # more than the context length, so that rows are evicted
        {"max_new_tokens": 8, "repetition_penalty": 1.5},
        {"max_new_tokens": 8, "logit_bias": ((101, 5.0),)},
        {"max_new_tokens": 8, "forced": (65, 66)},
        {"max_new_tokens": 8, "logprobs": 2},
    ],
    ids=str,
)
def test_the_engine_generates_the_same_text_with_graphs_if_the_host_chooses_some_tokens(
    options: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """The second half of the requests does not need the host, so that the host chooses tokens only for some of the steps."""
    network = model("modern", vocab_size=tokenizer.vocab_size, n_layer=1)
    needs_host, plain = SamplingOptions(**options), SamplingOptions(max_new_tokens=12)
    requests = [Request("the", needs_host if seed < 2 else plain, seed) for seed in range(4)]
    texts = [_texts(decoder, tokenizer, requests, rows=2) for decoder in (_graphed(network), Decoder(network))]
    assert texts[0] == texts[1]


def test_the_host_reads_tokens_while_the_next_step_is_queued(tokenizer: Tokenizer) -> None:
    network = model("modern", vocab_size=tokenizer.vocab_size, context_length=64)
    expected = generate(Decoder(network), tokenizer, "the", SamplingOptions(max_new_tokens=5), count=2, seed=4)
    engine = Engine(_graphed(network), tokenizer, 3)
    first, removed = (engine.add([Request("the", SamplingOptions(max_new_tokens=5), sample_seed(4, index))])[0] for index in (0, 2))
    counts = []
    for step in range(6):
        engine.step()
        counts.append(len(first.sample.token_ids))
        if step == 1:
            engine.evict(removed)
            [second] = engine.add([Request("the", SamplingOptions(max_new_tokens=5), sample_seed(4, 1))])
    while engine.busy:
        engine.step()
    assert counts == [0, 1, 2, 3, 4, 5]
    assert [first.sample.token_ids, second.sample.token_ids] == [sample.token_ids for sample in expected]
    assert len(removed.sample.token_ids) == 1


def test_logits_that_are_not_finite_end_only_their_own_sequence(tokenizer: Tokenizer) -> None:
    """The embeddings of many tokens are NaN. The second sample is so short that it contains none of them."""
    network = model("gpt2", vocab_size=tokenizer.vocab_size, context_length=64, n_layer=1, tie_embeddings=False)
    with torch.no_grad():
        network.embedding.weight[128:160] = float("nan")
    ended = []
    for decoder in (_graphed(network), Decoder(network)):
        engine = Engine(decoder, tokenizer, 2)
        options = (SamplingOptions(max_new_tokens=length, temperature=5.0, top_k=None) for length in (40, 2))
        sequences = [engine.add([Request("a", each, 0)])[0] for each in options]
        while engine.busy:
            engine.step()
        ended.append([(sequence.sample.text, sequence.sample.token_ids, str(sequence.error)) for sequence in sequences])
    assert ended[0] == ended[1]
    assert ["not finite" in error for _, _, error in ended[0]] == [True, False]


class _GraphsUpTo(RecordedGraphs):
    """Captures a limited number of graphs."""

    def __init__(self, captures: int) -> None:
        super().__init__()
        self.left = captures

    def capture(self, work: Work) -> Work:
        if not self.left:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.left -= 1
        return super().capture(work)


@pytest.mark.parametrize(
    ("captures", "warning"),
    [
        (0, "choosing tokens without CUDA graphs"),
        (1, "decoding without CUDA graphs"),
        (2, "choosing"),
        (3, "decoding"),
        (6, "decoding"),
    ],
)
def test_samples_do_not_change_if_a_graph_for_other_rows_or_positions_cannot_be_captured(
    captures: int, warning: str, tokenizer: Tokenizer
) -> None:
    """A sampling graph and a step graph are captured for three rows, for two rows and for one row, then a step graph for more
    positions."""
    network = model("modern", vocab_size=tokenizer.vocab_size, context_length=140, n_layer=1)
    requests = [Request("t" * 122, SamplingOptions(max_new_tokens=length), seed) for seed, length in enumerate((2, 4, 12))]
    expected = _texts(Decoder(network), tokenizer, requests, rows=3)
    decoder = _graphed(network, _GraphsUpTo(captures))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert _texts(decoder, tokenizer, requests, rows=3) == expected
    messages = [str(each.message) for each in caught]
    assert warning in messages[0]
    assert len(messages) == len({message.split()[0] for message in messages}), "each warning must appear once"


def test_more_sampling_options_than_graphs_are_sampled_without_graphs(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MAX_SAMPLING_GRAPHS", 1)
    network, recorded = model("modern", vocab_size=tokenizer.vocab_size, context_length=64), RecordedGraphs()
    requests = [Request("the", SamplingOptions(max_new_tokens=6, temperature=0.5 + seed), seed) for seed in range(2)]
    expected = _texts(Decoder(network), tokenizer, requests, rows=1)
    assert _texts(_graphed(network, recorded), tokenizer, requests, rows=1) == expected
    assert recorded.captures == 2, "one step, and the sampling of one of the requests"


@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_a_bfloat16_copy_decodes_in_bfloat16_and_returns_float32_logits_close_to_the_original(preset: str) -> None:
    network, tokens = model(preset, position="sinusoidal" if preset == "llama" else "rope"), ids(2, 12)
    before = [parameter.clone() for parameter in network.parameters()]
    half = to_bfloat16(network)
    assert {tensor.dtype for tensor in (*half.parameters(), *half.buffers())} == {torch.bfloat16}
    assert all(torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True))
    expected = pack(network, "fp32")(tokens)[:, -1]
    for decoder in (_graphed(half), Decoder(half)):
        cache = decoder.new_state(2)
        assert cache.keys.dtype == torch.bfloat16
        prefilled = [decoder.prefill(cache, row, tokens[row, :11]) for row in range(2)]
        logits = decoder.step(cache, tokens[:, 11])
        assert logits.dtype == prefilled[0].dtype == torch.float32
        assert (logits - expected).abs().max() < 0.1 * expected.std()


def test_decoding_on_cuda_does_not_use_cudnn_for_attention_but_training_may() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with attention_without_cudnn(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_captured_work_that_waits_for_the_device_is_an_error() -> None:
    """The backend of these tests refuses what a CUDA graph refuses."""
    with pytest.raises(RuntimeError, match="reads a value on the host"):
        RecordedGraphs().capture(lambda: print(torch.ones(()).item()))


@torch.inference_mode()
def test_a_replay_reads_only_the_fixed_buffers() -> None:
    """The backend repeats operations on the recorded tensors, so steps that used the caller's tensors would repeat a token."""
    network, tokens = model("gpt2"), ids(1, 16)
    decoder = Decoder(network)
    cache = decoder.new_state(1)
    recorded = RecordedGraphs()
    steps = GraphedSteps(decoder.decode_one_token, cache, network.vocab_size, recorded)
    logits = [steps(tokens[:, position].clone(), [position]) for position in range(6)]
    assert recorded.captures == 1
    assert steps.shapes == {(1, 16)}
    torch.testing.assert_close(torch.cat(logits), network(tokens[:, :6])[0], atol=3e-5, rtol=1e-5)
