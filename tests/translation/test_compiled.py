"""Compiled decoding finds the same translations as PyTorch, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pairs import END, VOCAB_SIZE, network, recurrent_network

from tinylm.errors import InputError
from tinylm.model import compiled_translation
from tinylm.model.compiled_translation import CompiledTranslation
from tinylm.model.translation_records import TRANSLATION_STEP
from tinylm.translation.search import SearchOptions, translate_ids

SETTINGS: list[dict[str, Any]] = [
    {"preset": "transformer"},
    {"preset": "transformer", "feed_forward": "silu", "head_bias": True, "n_kv_head": 2, "head_dim": 64, "vocab_size": 150},
    {"preset": "modern"},
    {"preset": "modern", "feed_forward": "swiglu", "logit_softcap": 2.0, "learned_start": False, "scale_embeddings": True},
    {"preset": "modern", "position": "learned", "norm": "layernorm", "norm_gain": True, "bias": True, "qk_norm": False},
]


@pytest.fixture(scope="module", autouse=True)
def _compiled_code() -> None:
    """Compile the code once, so that it is on disk."""
    TRANSLATION_STEP.compile()


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use three threads even for tiny models."""
    monkeypatch.setattr(compiled_translation, "MIN_PRODUCTS_PER_THREAD", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def _sources(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [np.append(generator.integers(1, VOCAB_SIZE, generator.integers(1, 22)), END) for _ in range(count)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_beam_search_is_that_of_pytorch(settings: dict[str, Any]) -> None:
    model, sources = network(**settings), _sources(7)
    for options in (SearchOptions(beams=3, n_best=3, max_length=15), SearchOptions(beams=2, no_repeat_ngram=2, max_length=9)):
        expected = translate_ids(model, sources, END, options)
        found = translate_ids(model, sources, END, options, compiled=CompiledTranslation(model))
        assert [[each.ids for each in best] for best in found] == [[each.ids for each in best] for best in expected]
        logprobs = [[each.logprob for best in results for each in best] for results in (found, expected)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)


def test_samples_are_those_of_pytorch() -> None:
    model, sources = network("modern"), _sources(4)
    options = SearchOptions(temperature=1.0, top_k=10, n_best=2, max_length=8)
    found = [translate_ids(model, sources, END, options, compiled=compiled) for compiled in (CompiledTranslation(model), None)]
    assert [[each.ids for each in best] for best in found[0]] == [[each.ids for each in best] for best in found[1]]


def test_a_translation_does_not_depend_on_the_batch_or_the_threads(three_threads: None) -> None:
    model, sources = network(), _sources(9)
    compiled, options = CompiledTranslation(model), SearchOptions(beams=4, n_best=4)
    together = translate_ids(model, sources, END, options, compiled=compiled)
    torch.set_num_threads(1)
    assert translate_ids(model, sources, END, options, batch_size=4, compiled=compiled) == together
    assert [translate_ids(model, [source], END, options, compiled=compiled)[0] for source in sources] == together


def test_more_beams_than_tokens_are_possible() -> None:
    model = network(vocab_size=3)
    sources, options = [np.array([1, 2, END])], SearchOptions(beams=8, n_best=8, max_length=4)
    found = [translate_ids(model, sources, END, options, compiled=compiled)[0] for compiled in (CompiledTranslation(model), None)]
    assert [each.ids for each in found[0]] == [each.ids for each in found[1]]


def test_networks_that_are_not_supported_are_rejected() -> None:
    for model in (recurrent_network(), network("modern", norm_position="both"), network("modern", feed_forward="geglu")):
        assert not compiled_translation.is_supported(model)
        with pytest.raises(InputError, match="not supported by compiled translation"):
            CompiledTranslation(model)
