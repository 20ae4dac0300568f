"""Steps captured in graphs return the same logits as plain steps. A backend that records operations replaces CUDA."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from model.parts import CASES, case_network
from recorded_graphs import NoGraphs, RecordedGraphs
from tiny import PRESETS, ids, model

from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.decoder import SUPPORTS, Decoder
from tinylm.model.functions import attention_without_cudnn
from tinylm.model.graphs import GraphedSteps, rows_in_graph, span_in_graph
from tinylm.model.packed import pack, to_bfloat16
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import ByteTokenizer
from tinylm.recipe.support import unsupported_parts
from tinylm.text.sources import Piece
from tinylm.tokenizer import training


def _graphed(network: Transformer, graphs: RecordedGraphs | None = None) -> Decoder:
    return Decoder(network, compiled=True, backend="graphs", graphs=graphs or RecordedGraphs())


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
    network, graphs = model("modern", context_length=300), RecordedGraphs()
    decoder, plain = _graphed(network, graphs), Decoder(network)
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
        captures.append(graphs.captures)
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


def test_the_engine_generates_the_same_text_with_graphs() -> None:
    tokenizer = training.train(ByteTokenizer(kind="byte"), iter([Piece("text", True)]), print)
    network = model("modern", vocab_size=tokenizer.vocab_size)
    options = SamplingOptions(max_new_tokens=30)  # more than the context length, so that rows are evicted
    texts = [
        [sample.text for sample in generate(decoder, tokenizer, "the", options, count=3, seed=4)]
        for decoder in (_graphed(network), Decoder(network))
    ]
    assert texts[0] == texts[1]


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
    graphs = RecordedGraphs()
    steps = GraphedSteps(decoder.decode_one_token, cache, network.vocab_size, graphs)
    logits = [steps(tokens[:, position].clone(), [position]) for position in range(6)]
    assert graphs.captures == 1
    assert steps.shapes == {(1, 16)}
    torch.testing.assert_close(torch.cat(logits), network(tokens[:, :6])[0], atol=3e-5, rtol=1e-5)
