"""Beam search matches transformers, and a translation does not depend on the other sentences in its batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from pairs import END, VOCAB_SIZE, network, translators

from tinylm.errors import InputError
from tinylm.interchange import marian
from tinylm.model.sequence_to_sequence import START
from tinylm.translation.search import SearchOptions, penalized, top_extensions, translate_ids, without_repeated_ngrams


def _sources(count: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [np.append(generator.integers(1, VOCAB_SIZE, generator.integers(1, 22)), END) for _ in range(count)]


def test_beam_search_matches_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    ours = network()
    theirs = transformers.MarianMTModel(transformers.MarianConfig(**marian._config(ours, END))).eval()
    theirs.load_state_dict(marian.export_state_dict(ours), strict=False)
    theirs.tie_weights()
    sources = _sources(6)
    found = translate_ids(ours, sources, END, SearchOptions(beams=4, n_best=4, length_penalty=0.0, max_length=15))
    for source, hypotheses in zip(sources, found, strict=True):
        expected = theirs.generate(
            input_ids=torch.from_numpy(source)[None],
            num_beams=4,
            num_return_sequences=4,
            length_penalty=0.0,
            max_new_tokens=15,
            output_scores=True,
            return_dict_in_generate=True,
        )
        for hypothesis, ids, score in zip(hypotheses, expected.sequences.tolist(), expected.sequences_scores.tolist(), strict=True):
            assert list(hypothesis.ids) == [id for id in ids[1:] if id not in (END, VOCAB_SIZE)]
            assert hypothesis.logprob == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        SearchOptions(beams=3, n_best=3, max_length=15),
        SearchOptions(beams=1, max_length=15),
        SearchOptions(temperature=1.3, top_k=20, n_best=2, seed=5, max_length=15),
    ],
    ids=["beams", "greedy", "sampling"],
)
@pytest.mark.parametrize("preset", ["transformer", "modern", "bahdanau", "sutskever"])
def test_a_translation_does_not_depend_on_the_batch(preset: str, options: SearchOptions) -> None:
    model, sources = translators()[preset], _sources(7, seed=1)
    together = translate_ids(model, sources, END, options, batch_size=32)
    assert translate_ids(model, sources, END, options, batch_size=4) == together
    assert [translate_ids(model, [source], END, options)[0] for source in sources] == together


@pytest.mark.parametrize("preset", ["transformer", "bahdanau", "sutskever"])
def test_a_wide_beam_finds_the_most_likely_translation(preset: str) -> None:
    """With 4 tokens and up to 3 steps, a beam of 64 contains every possible translation."""
    model = translators(vocab_size=4, seed=2)[preset]
    source = np.array([1, 2, 3, END])
    [[best]] = translate_ids(model, [source], END, SearchOptions(beams=64, max_length=3, length_penalty=0.7))
    scores = {}
    for length in range(3):
        for ids in itertools.product((1, 2, 3), repeat=length):
            inputs = torch.tensor([[START, *ids]])
            logprobs = model(inputs, source=torch.from_numpy(source)[None])[0].detach().log_softmax(-1)
            total = sum(float(logprobs[i, id]) for i, id in enumerate((*ids, END)))
            scores[ids] = penalized(total, length + 1, 0.7)
    finished = max(scores, key=lambda ids: scores[ids])
    assert best.score >= scores[finished] - 1e-5
    if best.finished:
        assert best.ids == finished


@pytest.mark.parametrize("vocab_size", [5, 160, 333])
def test_the_most_likely_extensions_are_found_without_sorting_the_whole_vocabulary(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(4 * 3, vocab_size, generator=generator).log_softmax(-1)
    totals = torch.randn(4, 3, generator=generator)
    expected = (logprobs.view(4, 3, vocab_size) + totals[..., None]).flatten(1).topk(6, dim=1)
    values, indexes = top_extensions(logprobs, totals, 6)
    assert torch.equal(values, expected.values)
    assert torch.equal(indexes, expected.indices)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_the_search_for_one_translation_ends_early_without_changing_it(length_penalty: float) -> None:
    """With `n_best` equal to `beams`, the search continues until no beam can change."""
    model, sources = network(seed=1), _sources(6, seed=2)
    one = SearchOptions(beams=4, n_best=1, length_penalty=length_penalty, max_length=20)
    every = SearchOptions(beams=4, n_best=4, length_penalty=length_penalty, max_length=20)
    [first, expected] = [[found[0] for found in translate_ids(model, sources, END, options)] for options in (one, every)]
    assert first == expected


def test_the_length_penalty_matches_gnmt() -> None:
    assert penalized(-6.0, 7, 1.0) == pytest.approx(-3.0)
    assert penalized(-6.0, 7, 0.0) == -6.0


def test_repeated_ngrams_are_forbidden() -> None:
    allowed = without_repeated_ngrams(torch.zeros(2, 6), [[1, 2, 3, 1, 2], [4, 4]], 3)
    assert allowed[0].tolist() == [0, 0, 0, float("-inf"), 0, 0]
    assert not allowed[1].isinf().any()
    [[best]] = translate_ids(network(), _sources(1), END, SearchOptions(beams=2, no_repeat_ngram=1, max_length=12))
    assert len(set(best.ids)) == len(best.ids)


def test_out_of_range_options_are_errors() -> None:
    for options, match in (
        (SearchOptions(beams=0), "--beams: must be at least 1"),
        (SearchOptions(beams=2, n_best=3), r"must be at least -n \(3\)"),
        (SearchOptions(temperature=0.0), "--temperature: must be above 0"),
        (SearchOptions(max_length=0), "--max-length"),
        (SearchOptions(length_penalty=1e308), "--length-penalty: must be between -10 and 10, not 1e.308"),
        (SearchOptions(length_penalty=float("nan")), "--length-penalty: must be between -10 and 10, not nan"),
    ):
        with pytest.raises(InputError, match=match):
            options.check()
