"""Compare beam search with exhaustive search, and best-of sampling with scores computed by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import model

from tinylm.errors import InputError
from tinylm.generation.constraint import Constraint
from tinylm.generation.engine import Request
from tinylm.generation.sampling import SamplingOptions
from tinylm.generation.search import beam_search, best_of, mean_logprob
from tinylm.model.decoder import Decoder
from tinylm.recipe.schema import CharTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    return training.train(CharTokenizer(kind="char"), iter([Piece("abcd", True)]), print)


@pytest.fixture(scope="module")
def decoder(letters: Tokenizer) -> Decoder:
    return Decoder(model("modern", vocab_size=letters.vocab_size))


def _all_continuations(decoder: Decoder, tokenizer: Tokenizer, length: int) -> dict[tuple[int, ...], float]:
    """Return the log-probability of every continuation of "a" that has `length` tokens or ends earlier with end-of-text."""
    end_of_text, total_logprobs = tokenizer.end_of_text, {}
    others = [id for id in range(tokenizer.vocab_size) if id != end_of_text]
    for size in range(1, length + 1):
        for ids in itertools.product(others, repeat=size - 1):
            for last in range(tokenizer.vocab_size) if size == length else [end_of_text]:
                sequence = [*tokenizer.encode("a"), *ids, last]
                logprobs = decoder.network(torch.tensor([sequence[:-1]]))[0].log_softmax(-1)
                total_logprobs[(*ids, last)] = float(logprobs.gather(1, torch.tensor(sequence[1:])[:, None]).sum())
    return total_logprobs


@torch.inference_mode()
def test_with_enough_beams_beam_search_is_exhaustive(decoder: Decoder, letters: Tokenizer) -> None:
    continuations = _all_continuations(decoder, letters, 3)
    for penalty in (0.0, 1.0):
        scores = {ids: logprob / len(ids) ** penalty for ids, logprob in continuations.items()}
        expected = sorted(scores, key=lambda ids: -scores[ids])[:3]
        results = beam_search(decoder, letters, "a", beams=60, max_new_tokens=3, length_penalty=penalty)[:3]
        assert [result.score for result in results] == pytest.approx([scores[ids] for ids in expected], abs=1e-4)
        expected_ids = [tuple(id for id in ids if id != letters.end_of_text) for ids in expected]
        assert [tuple(result.sample.token_ids) for result in results] == expected_ids


@torch.inference_mode()
def test_one_beam_is_greedy_decoding_and_more_beams_score_at_least_as_well(decoder: Decoder, letters: Tokenizer) -> None:
    scores = [beam_search(decoder, letters, "a", beams=beams, max_new_tokens=6)[0].score for beams in (1, 4, 16)]
    ids = letters.encode("a")
    for _ in range(6):
        ids.append(int(decoder.network(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == letters.end_of_text:
            ids.pop()
            break
    assert beam_search(decoder, letters, "a", beams=1, max_new_tokens=6)[0].sample.token_ids == ids[1:]
    assert scores == sorted(scores)


def test_beam_search_respects_a_constraint(decoder: Decoder, letters: Tokenizer) -> None:
    results = beam_search(decoder, letters, "a", beams=5, max_new_tokens=8, constraint=Constraint("(ab|cd){1,3}", letters))
    assert results
    for result in results:
        assert result.sample.text.replace("ab", "").replace("cd", "") == ""
        assert result.sample.text


def test_search_rejects_invalid_options(decoder: Decoder, letters: Tokenizer) -> None:
    with pytest.raises(InputError, match="context of 16"):
        beam_search(decoder, letters, "a", beams=2, max_new_tokens=16)
    with pytest.raises(InputError, match="1 or more"):
        beam_search(decoder, letters, "a", beams=0, max_new_tokens=2)
    with pytest.raises(InputError, match="--length-penalty: must be between -10 and 10"):
        beam_search(decoder, letters, "a", beams=2, max_new_tokens=2, length_penalty=1e308)
    options = SamplingOptions(max_new_tokens=4)
    with pytest.raises(InputError, match="at least -n \\(2\\)"):
        best_of(decoder, letters, Request("a", options), count=2, candidates=1)
    with pytest.raises(InputError, match="likelihood, contrast"):
        best_of(decoder, letters, Request("a", options), count=1, candidates=2, ranking="beauty")


@torch.inference_mode()
def test_best_of_returns_the_samples_with_the_highest_scores(decoder: Decoder, letters: Tokenizer) -> None:
    options = SamplingOptions(max_new_tokens=6, temperature=2.0)
    request = Request("ab", options, seed=3)
    for ranking in ("likelihood", "contrast"):
        ranked = best_of(decoder, letters, request, count=12, candidates=12, ranking=ranking)
        scores = [result.score for result in ranked]
        assert scores == sorted(scores, reverse=True)
        best_two = best_of(decoder, letters, request, count=2, candidates=12, ranking=ranking)
        assert [result.score for result in best_two] == scores[:2]
        assert [result.sample.token_ids for result in best_two] == [result.sample.token_ids for result in ranked[:2]]
        for result in ranked[:4]:
            ids = result.sample.token_ids
            sequence = [*letters.encode("ab"), *ids]
            logprobs = decoder.network(torch.tensor([sequence]))[0, :-1].log_softmax(-1)
            expected = float(logprobs.gather(1, torch.tensor(sequence[1:])[:, None])[-len(ids) :].mean()) if ids else 0.0
            if ranking == "contrast":
                expected -= mean_logprob(decoder, letters, "", ids)
            assert result.score == pytest.approx(expected, abs=1e-4)
