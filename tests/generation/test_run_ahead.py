"""A model that chooses several tokens in a single call generates the same samples as one step at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tinylm.generation.engine import Engine, Request, Sample
from tinylm.generation.sampling import SamplingOptions
from tinylm.model import registry
from tinylm.model.compiled_recurrent import CompiledRecurrent
from tinylm.model.recurrent import Recurrent
from tinylm.recipe.recurrent import GruSection, LstmSection, RecurrentSection
from tinylm.recipe.schema import ByteTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training

OPTIONS = SamplingOptions(max_new_tokens=40, temperature=1.0, top_k=30)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return training.train(ByteTokenizer(kind="byte"), iter([Piece("text", True)]), print)


def network(tokenizer: Tokenizer, section: type[RecurrentSection] = GruSection) -> Recurrent:
    built = registry.build(section(n_layer=2, n_embd=24, context_length=16, burn_in=4), tokenizer.vocab_size, 3)
    assert isinstance(built, Recurrent)
    with torch.no_grad():
        built.head.weight.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
    return built.eval()


class Stepwise:
    """A decoder without `run`, and otherwise like another one."""

    def __init__(self, decoder: CompiledRecurrent) -> None:
        self.__dict__.update({name: getattr(decoder, name) for name in ("vocab_size", "uses_numba", "device", "capacity")})
        self.new_state, self.prefill, self.step = decoder.new_state, decoder.prefill, decoder.step


def samples(decoder: Any, tokenizer: Tokenizer, requests: list[Request]) -> tuple[list[Sample], int]:
    """Return the samples and the number of engine steps. The second half of the requests starts two steps after the first half."""
    engine, half, steps = Engine(decoder, tokenizer, len(requests)), len(requests) // 2, 0
    started = [engine.add([request])[0] for request in requests[:half]]
    while engine.busy or len(started) < len(requests):
        if steps == 2:
            started += [engine.add([request])[0] for request in requests[half:]]
        engine.step()
        steps += 1
    for sequence in started:
        sequence.sample.tokens_per_second = 0.0
    return [sequence.sample for sequence in started], steps


@pytest.mark.parametrize("section", [GruSection, LstmSection])
def test_samples_equal_those_of_single_steps(section: type[RecurrentSection], tokenizer: Tokenizer) -> None:
    decoder = CompiledRecurrent(network(tokenizer, section))
    kinds = (OPTIONS, SamplingOptions(max_new_tokens=33, temperature=1.0, top_k=30, stop=("e",)), OPTIONS)
    requests = [Request(prompt, options, seed) for seed, (prompt, options) in enumerate(zip("abc", kinds, strict=True))]
    ahead, calls = samples(decoder, tokenizer, requests)
    expected, steps = samples(Stepwise(decoder), tokenizer, requests)
    assert ahead == expected
    assert calls < steps / 3
    assert {len(sample.token_ids) for sample in expected} != {40}, "one sample must end in the middle of a run"


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(max_new_tokens=12, temperature=0.0),
        SamplingOptions(max_new_tokens=12, top_k=None),
        SamplingOptions(max_new_tokens=12, top_p=0.9),
        SamplingOptions(max_new_tokens=12, repetition_penalty=1.3),
        SamplingOptions(max_new_tokens=12, logprobs=2),
        SamplingOptions(max_new_tokens=12, logit_bias=((65, 3.0),)),
    ],
    ids=["greedy", "all tokens", "top-p", "penalty", "log-probabilities", "bias"],
)
def test_other_options_use_single_steps(options: SamplingOptions, tokenizer: Tokenizer) -> None:
    decoder = CompiledRecurrent(network(tokenizer))
    requests = [Request("a", options, 1), Request("b", options, 2)]
    ahead, calls = samples(decoder, tokenizer, requests)
    expected, steps = samples(Stepwise(decoder), tokenizer, requests)
    assert (ahead, calls) == (expected, steps)


def test_forced_tokens_precede_the_first_run(tokenizer: Tokenizer) -> None:
    options = SamplingOptions(max_new_tokens=20, forced=(70, 71))
    [first, second], _ = samples(
        CompiledRecurrent(network(tokenizer)), tokenizer, [Request("a", options, 1), Request("b", options, 2)]
    )
    assert first.token_ids[:2] == second.token_ids[:2] == [70, 71]


def test_a_run_ends_before_logits_that_are_not_finite(tokenizer: Tokenizer) -> None:
    model = network(tokenizer)
    with torch.no_grad():
        model.embedding.weight[ord("z")] = float("nan")
    engine = Engine(CompiledRecurrent(model), tokenizer, 1)
    [sequence] = engine.add([Request("a", SamplingOptions(max_new_tokens=400, temperature=5.0, top_k=300), 3)])
    while engine.busy:
        engine.step()
    assert "not finite" in str(sequence.error)
    assert sequence.sample.token_ids[-1] == ord("z")
