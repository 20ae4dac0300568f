"""Decoding with one full forward pass per token generates the same text as decoding with a KV cache."""

from __future__ import annotations

import pytest
import torch
from tiny import PRESETS, ids, model, section
from torch import Tensor, nn

from tinylm.generation.engine import Request, generate, generate_batch
from tinylm.generation.sampling import SamplingOptions
from tinylm.generation.search import beam_search
from tinylm.model.base import Model
from tinylm.model.decoder import Decoder, as_decoder
from tinylm.model.full_pass import FullPassDecoder
from tinylm.recipe.schema import ByteTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    return training.train(ByteTokenizer(kind="byte"), iter([Piece("text", True)]), print)


@pytest.mark.parametrize("preset", PRESETS)
def test_full_passes_generate_the_same_text_as_a_kv_cache_even_when_rows_are_full(preset: str, byte_tokenizer: Tokenizer) -> None:
    """When a row is full, the KV-cache decoder prefills it again, whereas the full-pass decoder only drops the oldest tokens."""
    network = model(preset, vocab_size=byte_tokenizer.vocab_size)
    prompts = ["", "a", "the cat", "the cat", "exactly sixteen!", "a prompt that is longer than the context"]
    requests = [Request(prompt, SamplingOptions(max_new_tokens=45, temperature=1.0), seed) for seed, prompt in enumerate(prompts)]
    cached, uncached = (
        [sample.token_ids for sample in generate_batch(decoder, byte_tokenizer, requests, rows=4)]
        for decoder in (Decoder(network), FullPassDecoder(network))
    )
    assert uncached == cached
    cached_beams, beams = (
        beam_search(decoder, byte_tokenizer, "the", beams=3, max_new_tokens=9)
        for decoder in (Decoder(network), FullPassDecoder(network))
    )
    assert [result.sample.token_ids for result in beams] == [result.sample.token_ids for result in cached_beams]
    assert [result.score for result in beams] == pytest.approx([result.score for result in cached_beams], abs=1e-5)


@torch.inference_mode()
def test_rows_can_be_forked_reordered_and_dropped() -> None:
    network, tokens = model("modern"), ids(3, 16)
    decoder = FullPassDecoder(network)
    state = decoder.new_state(3)
    decoder.prefill(state, 0, tokens[0, :6])
    state.fork(0, [1, 2])
    decoder.step(state, tokens[:, 6])
    state.reorder([2, 0], [0, 1])
    state.resize(2)
    logits = decoder.step(state, tokens[[1, 0], 7])
    sequences = [[*tokens[0, :6], tokens[2, 6], tokens[1, 7]], [*tokens[0, :6], tokens[0, 6], tokens[0, 7]]]
    torch.testing.assert_close(logits, network(torch.tensor(sequences))[:, -1], atol=3e-5, rtol=1e-5)
    assert state.lengths == [8, 8]


class Bigram(Model):
    """A minimal model that looks up the logits for the next token in a table."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(section(context_length=8), vocab_size)
        self.table = nn.Embedding(vocab_size, vocab_size)

    def hidden(self, tokens: Tensor, *, n_last: int | None = None, segments: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.table(tokens)
        return hidden if n_last is None else hidden[:, -n_last:]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def test_a_model_with_only_hidden_and_logits_methods_generates_text(byte_tokenizer: Tokenizer) -> None:
    network = Bigram(byte_tokenizer.vocab_size)
    with torch.no_grad():
        network.table.weight[:, byte_tokenizer.end_of_text] = float("-inf")
    assert isinstance(as_decoder(network), FullPassDecoder)
    [sample] = generate(network, byte_tokenizer, "ab", SamplingOptions(max_new_tokens=30, temperature=0.0))
    expected = byte_tokenizer.encode("ab")[-1:]
    while len(expected) < 31:
        expected.append(int(network.table.weight[expected[-1]].argmax()))
    assert sample.token_ids == expected[1:]
