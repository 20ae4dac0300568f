"""Test that an error in a row affects only that row's sample, and that a row's options do not affect the other rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import model

from tinylm.errors import InputError, WorkError
from tinylm.generation.constraint import Constraint
from tinylm.generation.engine import Engine, Request, generate, generate_batch
from tinylm.generation.sampling import SamplingOptions, chances
from tinylm.model.decoder import Decoder
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import ByteTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training

BANNED = float("-inf")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return training.train(ByteTokenizer(kind="byte"), iter([Piece("text", True)]), print)


@pytest.fixture(scope="module")
def network(tokenizer: Tokenizer) -> Transformer:
    return model("modern", vocab_size=tokenizer.vocab_size, context_length=32)


def _ban_all(tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    return tuple((id, BANNED) for id in range(tokenizer.vocab_size))


def test_a_row_without_allowed_tokens_does_not_change_the_other_rows(network: Transformer, tokenizer: Tokenizer) -> None:
    normal = Request("x", SamplingOptions(max_new_tokens=8, temperature=1.0), seed=3)
    constrained = Request("x", SamplingOptions(logit_bias=_ban_all(tokenizer)), constraint=Constraint("a", tokenizer))
    engine = Engine(Decoder(network), tokenizer, 3)
    sequences = [engine.add([request])[0] for request in (normal, constrained, normal)]
    while engine.busy:
        engine.step()
    expected = generate(network, tokenizer, "x", normal.options, seed=0)[0]
    assert isinstance(sequences[1].error, InputError)
    assert sequences[0].error is sequences[2].error is None
    assert sequences[0].sample.token_ids == sequences[2].sample.token_ids
    assert len(expected.token_ids) == len(sequences[0].sample.token_ids) == 8


def test_an_error_in_a_callback_affects_only_its_row(network: Transformer, tokenizer: Tokenizer) -> None:
    def fail(text: str) -> None:
        raise RuntimeError("cannot write")

    options = SamplingOptions(max_new_tokens=40, logit_bias=((tokenizer.end_of_text or 0, BANNED),))
    engine = Engine(Decoder(network), tokenizer, 2)
    failed, other = engine.add([Request("x", options, 1, on_text=fail), Request("x", options, 1)])
    while engine.busy:
        engine.step()
    assert isinstance(failed.error, RuntimeError)
    assert len(other.sample.token_ids) == 40


def test_banning_every_token_is_an_error(network: Transformer, tokenizer: Tokenizer) -> None:
    options = SamplingOptions(logit_bias=_ban_all(tokenizer))
    with pytest.raises(InputError, match="--ban: every token is banned"):
        generate(network, tokenizer, "x", options)


@pytest.mark.parametrize("constrained", [False, True])
def test_non_finite_logits_are_an_error(tokenizer: Tokenizer, constrained: bool) -> None:
    broken = model("modern", vocab_size=tokenizer.vocab_size, context_length=32)
    with torch.no_grad():
        next(iter(broken.parameters())).fill_(float("nan"))
    constraint = Constraint("[0-9]{3}", tokenizer) if constrained else None
    with pytest.raises(WorkError, match="logits are not finite"):
        generate(broken, tokenizer, "x", SamplingOptions(), constraint=constraint)


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 0.8])
@pytest.mark.parametrize("options", [{"logit_bias": ((70, 1e10),)}, {"logit_bias": ((70, 1e10),), "top_k": None, "top_p": 0.9}])
def test_a_very_large_bias_selects_its_token(
    network: Transformer, tokenizer: Tokenizer, temperature: float, options: dict[str, Any]
) -> None:
    sample = generate(network, tokenizer, "x", SamplingOptions(8, temperature, **options), seed=1)[0]
    assert sample.token_ids == [70] * 8


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": ((70, 3e38),)},
        {"logit_bias": ((70, float("inf")),)},
        {"logit_bias": ((70, float("nan")),)},
        {"frequency_penalty": 1e39},
        {"presence_penalty": -1e11},
        {"repetition_penalty": 1e-40},
        {"max_new_tokens": 10**29},
    ],
)
def test_values_that_could_overflow_are_rejected(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be"):
        SamplingOptions(**options)


def test_rows_with_different_biases_penalties_and_temperatures_match_single_samples(
    network: Transformer, tokenizer: Tokenizer
) -> None:
    variants = [
        SamplingOptions(12, 1.0, logit_bias=((65, 4.0), (66, -3.0))),
        SamplingOptions(12, 1.0, logit_bias=((65, 4.0), (66, -3.0), (65, 1.0))),
        SamplingOptions(12, 1.0),
        SamplingOptions(12, 0.7, frequency_penalty=1.5, logit_bias=((67, 5.0),)),
        SamplingOptions(12, 0.7, frequency_penalty=0.5, repetition_penalty=1.3),
        SamplingOptions(12, 0.0, presence_penalty=1.0),
    ]
    requests = [Request("x", options, seed) for seed, options in enumerate(variants * 2)]
    batched = [sample.token_ids for sample in generate_batch(network, tokenizer, requests, rows=5)]
    alone = [next(generate_batch(network, tokenizer, [request])).token_ids for request in requests]
    assert batched == alone


def test_chances_match_the_frequencies_of_sampled_tokens(network: Transformer, tokenizer: Tokenizer) -> None:
    options = SamplingOptions(1, 1.5, top_k=5, logprobs=5, logit_bias=((65, 2.0),))
    requests = [Request("x", options, seed) for seed in range(2000)]
    samples = list(generate_batch(network, tokenizer, requests, rows=200))
    choice = samples[0].choices[0]
    ids = [id for id, _ in choice.alternatives]
    for id, chance in zip(ids, choice.alternative_chances, strict=True):
        frequency = sum(sample.token_ids == [id] for sample in samples) / len(samples)
        assert frequency == pytest.approx(chance, abs=0.05)
    assert choice.chance is not None


def test_the_chance_of_a_greedy_token_is_one() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert chances(logits, SamplingOptions(temperature=0), torch.tensor([[0, 1, 2]])).tolist() == [[0.0, 1.0, 0.0]]
