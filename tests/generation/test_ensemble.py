"""Test that text generated with an ensemble comes from the mean of the members' probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import add_noise_, section

from tinylm.generation.engine import generate
from tinylm.generation.ensemble import EnsembleDecoder, make_ensemble_decoder
from tinylm.generation.sampling import SamplingOptions
from tinylm.generation.search import beam_search
from tinylm.model import registry
from tinylm.model.base import Model
from tinylm.model.decoder import as_decoder
from tinylm.model.transformer import Transformer
from tinylm.recipe.recurrent import GruSection
from tinylm.recipe.schema import ByteTokenizer
from tinylm.reporting import SILENT, CollectingReporter
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return training.train(ByteTokenizer(kind="byte"), iter([Piece("text", True)]), print)


def _transformer(tokenizer: Tokenizer, seed: int, **parts: Any) -> Model:
    return add_noise_(Transformer(section("modern", **parts), tokenizer.vocab_size, seed=seed), seed).eval()


def _gru(tokenizer: Tokenizer, seed: int) -> Model:
    torch.manual_seed(seed)
    network = registry.build(GruSection(n_layer=1, n_embd=24, context_length=16, burn_in=0), tokenizer.vocab_size, seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return network.eval()


def _ensemble(networks: list[Model]) -> EnsembleDecoder:
    return EnsembleDecoder([as_decoder(network) for network in networks])


def _greedy(tokens: int) -> SamplingOptions:
    return SamplingOptions(max_new_tokens=tokens, temperature=0.0, logprobs=0)


def _mean_probabilities(networks: list[Model], window: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([network(torch.tensor([window]))[0, -1].double().softmax(-1) for network in networks]).mean(0)


def _generate_without_state(networks: list[Model], tokenizer: Tokenizer, prompt: str, tokens: int, capacity: int) -> list[int]:
    """Decode greedily with full forward passes. Keep the newer half of the context when it is full."""
    window = (tokenizer.encode(prompt) or [tokenizer.end_of_text or 0])[-capacity:]
    generated: list[int] = []
    while len(generated) < tokens:
        token = int(_mean_probabilities(networks, window).argmax())
        if token == tokenizer.end_of_text:
            break
        generated.append(token)
        window = [*window, token]
        if len(window) > capacity:
            window = window[-max(1, capacity // 2) :]
    return generated


@pytest.mark.parametrize("prompt", ["", "the cat", "a prompt that is longer than the smallest context"])
@pytest.mark.parametrize("others", ["transformer", "gru", "both"])
def test_greedy_text_maximizes_the_mean_probability(others: str, prompt: str, tokenizer: Tokenizer) -> None:
    networks = [_transformer(tokenizer, 1, context_length=16)]
    networks += [_transformer(tokenizer, 2, context_length=24)] if others != "gru" else []
    networks += [_gru(tokenizer, 3)] if others != "transformer" else []
    decoder = _ensemble(networks)
    assert decoder.capacity == 16
    [sample] = generate(decoder, tokenizer, prompt, _greedy(40))
    assert sample.token_ids == _generate_without_state(networks, tokenizer, prompt, 40, 16)
    assert len(set(sample.token_ids)) > 1


def test_members_with_unlimited_memory_never_forget(tokenizer: Tokenizer) -> None:
    networks = [_gru(tokenizer, 1), _gru(tokenizer, 2)]
    decoder = _ensemble(networks)
    assert decoder.capacity is None
    [sample] = generate(decoder, tokenizer, "the", _greedy(40))
    assert sample.token_ids == _generate_without_state(networks, tokenizer, "the", 40, 1000)


def test_sampling_probabilities_are_the_mean_of_the_members(tokenizer: Tokenizer) -> None:
    networks = [_transformer(tokenizer, 1), _transformer(tokenizer, 2)]
    options = SamplingOptions(max_new_tokens=6, temperature=1.0, top_k=None, logprobs=3)
    for sample in generate(_ensemble(networks), tokenizer, "the cat", options, count=3, seed=5):
        window = tokenizer.encode("the cat")
        for choice in sample.choices:
            expected = _mean_probabilities(networks, window)
            assert choice.logprob == pytest.approx(float(expected[choice.id].log()), abs=1e-4)
            assert [id for id, _ in choice.alternatives] == expected.topk(3).indices.tolist()
            window.append(choice.id)


def test_top_k_applies_to_the_mean_distribution(tokenizer: Tokenizer) -> None:
    networks = [_transformer(tokenizer, 1), _transformer(tokenizer, 2)]
    likely = set(_mean_probabilities(networks, tokenizer.encode("the")).topk(4).indices.tolist())
    options = SamplingOptions(max_new_tokens=1, temperature=3.0, top_k=4)
    samples = generate(_ensemble(networks), tokenizer, "the", options, count=40)
    assert {sample.token_ids[0] for sample in samples} == likely


def test_beam_search_scores_the_mean_distribution(tokenizer: Tokenizer) -> None:
    networks = [_transformer(tokenizer, 1), _transformer(tokenizer, 2)]
    best = beam_search(_ensemble(networks), tokenizer, "the", beams=3, max_new_tokens=5, length_penalty=0.0)[0]
    window, total = tokenizer.encode("the"), 0.0
    for id in best.sample.token_ids:
        total += float(_mean_probabilities(networks, window)[id].log())
        window.append(id)
    assert best.score == pytest.approx(total, abs=1e-4)


def test_compiled_members_generate_the_same_text(tokenizer: Tokenizer) -> None:
    pytest.importorskip("numba")
    networks = [_transformer(tokenizer, 1), _transformer(tokenizer, 2)]
    compiled = make_ensemble_decoder(networks, weights="fp32", compiled=True, steps=None, reporter=SILENT)
    assert compiled.uses_numba
    [expected] = generate(_ensemble(networks), tokenizer, "the", _greedy(30))
    assert generate(compiled, tokenizer, "the", _greedy(30))[0].token_ids == expected.token_ids


def test_a_single_network_is_decoded_without_averaging(tokenizer: Tokenizer) -> None:
    network = _transformer(tokenizer, 1)
    decoder = make_ensemble_decoder([network], weights="fp32", compiled=False, steps=10, reporter=SILENT)
    assert type(decoder) is type(as_decoder(network))
    options = SamplingOptions(max_new_tokens=20, temperature=1.0)
    assert generate(decoder, tokenizer, "the", options)[0].text == generate(network, tokenizer, "the", options)[0].text


def test_a_note_about_several_members_is_reported_once(tokenizer: Tokenizer) -> None:
    reporter = CollectingReporter()
    networks = [_transformer(tokenizer, seed, embedding_norm=True) for seed in (1, 2)]
    unsupported = [_transformer(tokenizer, seed, attention_softcap=5.0) for seed in (1, 2)]
    make_ensemble_decoder([*networks, *unsupported], weights=None, compiled=False, steps=10, reporter=reporter)
    assert len(reporter.notes) == len(set(reporter.notes)) == 1
