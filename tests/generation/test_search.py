"""Search: beams against trying every text, and the best of several samples against scoring them by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import model

from tinylm.errors import InputError
from tinylm.generation.constraint import Constraint
from tinylm.generation.sampling import SamplingOptions
from tinylm.generation.search import beam_search, best_of, score
from tinylm.model.decoder import Decoder
from tinylm.recipe.schema import CharTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    return training.train(CharTokenizer(kind="char"), iter([Piece("abcd", True)]), print)


@pytest.fixture(scope="module")
def decoder(letters: Tokenizer) -> Decoder:
    return Decoder(model("modern", vocabulary=letters.vocab_size))


def _every_text(decoder: Decoder, tokenizer: Tokenizer, length: int) -> dict[tuple[int, ...], float]:
    """Log-probability of everything that can follow "a": up to `length` tokens, those that end sooner with the end of text."""
    end, found = tokenizer.end_of_text, {}
    others = [id for id in range(tokenizer.vocab_size) if id != end]
    for size in range(1, length + 1):
        for ids in itertools.product(others, repeat=size - 1):
            for last in range(tokenizer.vocab_size) if size == length else [end]:
                read = [*tokenizer.encode("a"), *ids, last]
                logprobs = decoder.network(torch.tensor([read[:-1]]))[0].log_softmax(-1)
                found[(*ids, last)] = float(logprobs.gather(1, torch.tensor(read[1:])[:, None]).sum())
    return found


@torch.inference_mode()
def test_enough_beams_find_the_likeliest_of_all_texts(decoder: Decoder, letters: Tokenizer) -> None:
    every = _every_text(decoder, letters, 3)
    for penalty in (0.0, 1.0):
        expected = sorted(every.items(), key=lambda one: -one[1] / len(one[0]) ** penalty)[:3]
        found = beam_search(decoder, letters, "a", beams=60, max_new_tokens=3, length_penalty=penalty)[:3]
        assert [one.score for one in found] == pytest.approx([nats / len(ids) ** penalty for ids, nats in expected], abs=1e-4)
        ended = [tuple(id for id in ids if id != letters.end_of_text) for ids, _ in expected]
        assert [tuple(one.sample.token_ids) for one in found] == ended


@torch.inference_mode()
def test_one_beam_is_greedy_and_more_are_never_worse_here(decoder: Decoder, letters: Tokenizer) -> None:
    scores = [beam_search(decoder, letters, "a", beams=beams, max_new_tokens=6)[0].score for beams in (1, 4, 16)]
    read = letters.encode("a")
    for _ in range(6):
        read.append(int(decoder.network(torch.tensor([read]))[0, -1].argmax()))
        if read[-1] == letters.end_of_text:
            read.pop()
            break
    assert beam_search(decoder, letters, "a", beams=1, max_new_tokens=6)[0].sample.token_ids == read[1:]
    assert scores == sorted(scores)


def test_beams_obey_a_constraint(decoder: Decoder, letters: Tokenizer) -> None:
    found = beam_search(decoder, letters, "a", beams=5, max_new_tokens=8, constraint=Constraint("(ab|cd){1,3}", letters))
    assert found
    for one in found:
        assert one.sample.text.replace("ab", "").replace("cd", "") == ""
        assert one.sample.text


def test_what_cannot_be_searched_is_refused(decoder: Decoder, letters: Tokenizer) -> None:
    with pytest.raises(InputError, match="context of 16"):
        beam_search(decoder, letters, "a", beams=2, max_new_tokens=16)
    with pytest.raises(InputError, match="1 or more"):
        beam_search(decoder, letters, "a", beams=0, max_new_tokens=2)
    options = SamplingOptions(max_new_tokens=4)
    with pytest.raises(InputError, match="2 or more"):
        best_of(decoder, letters, "a", options, count=2, among=1)
    with pytest.raises(InputError, match="likelihood, contrast"):
        best_of(decoder, letters, "a", options, count=1, among=2, ranking="beauty")


@torch.inference_mode()
def test_the_best_samples_are_those_with_the_best_scores(decoder: Decoder, letters: Tokenizer) -> None:
    options = SamplingOptions(max_new_tokens=6, temperature=2.0)
    for ranking in ("likelihood", "contrast"):
        every = best_of(decoder, letters, "ab", options, count=12, among=12, ranking=ranking, seed=3)
        assert [one.score for one in every] == sorted((one.score for one in every), reverse=True)
        two = best_of(decoder, letters, "ab", options, count=2, among=12, ranking=ranking, seed=3)
        assert [(one.sample.token_ids, one.score) for one in two] == [(one.sample.token_ids, one.score) for one in every[:2]]
        for one in every[:4]:
            ids = one.sample.token_ids
            read = [*letters.encode("ab"), *ids]
            logprobs = decoder.network(torch.tensor([read]))[0, :-1].log_softmax(-1)
            expected = float(logprobs.gather(1, torch.tensor(read[1:])[:, None])[-len(ids) :].mean()) if ids else 0.0
            if ranking == "contrast":
                expected -= score(decoder, letters, "", ids)
            assert one.score == pytest.approx(expected, abs=1e-4)
