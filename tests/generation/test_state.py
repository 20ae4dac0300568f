"""Generate text with a model that is not a transformer: a GRU with one hidden vector per row and unlimited capacity.

The reference is a plain loop over the same cell, one sequence and one token at a time. All values are float64 so that rounding
differences between batch sizes do not change the chosen tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import model
from torch import Tensor, nn

from tinylm.errors import InputError
from tinylm.generation.engine import Engine, Request, generate, generate_batch, sample_seed
from tinylm.generation.sampling import SamplingOptions
from tinylm.generation.search import beam_search, best_of, mean_logprob
from tinylm.model.decoder import Decoder, as_decoder, make_decoder
from tinylm.model.state import DecodingModel
from tinylm.recipe.schema import ByteTokenizer, CharTokenizer
from tinylm.reporting import Reporter
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training

WIDTH = 12


class GRUState:
    """The hidden vectors (B, C) of the active rows and the number of tokens processed in each row."""

    capacity = None

    def __init__(self, rows: int) -> None:
        self.hidden = torch.zeros(rows, WIDTH, dtype=torch.float64)
        self.lengths = [0] * rows

    def resize(self, rows: int) -> None:
        added = max(0, rows - len(self.lengths))
        self.hidden = torch.cat((self.hidden[:rows], self.hidden.new_zeros(added, WIDTH)))
        self.lengths = self.lengths[:rows] + [0] * added

    def fork(self, source: int, rows: Sequence[int]) -> None:
        self.reorder([source] * len(rows), rows)

    def reorder(self, sources: Sequence[int], rows: Sequence[int]) -> None:
        self.hidden[list(rows)] = self.hidden[list(sources)]
        lengths = [self.lengths[source] for source in sources]
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length

    def evict(self, row: int, keep: int) -> int:
        raise AssertionError("a state of unlimited capacity is never full")


class GRULanguageModel(nn.Module):
    """A language model with one GRU cell between the token embedding and the output head."""

    uses_numba = False
    capacity = None
    device = torch.device("cpu")

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.embedding = nn.Embedding(vocab_size, WIDTH)
            self.cell, self.head = nn.GRUCell(WIDTH, WIDTH), nn.Linear(WIDTH, vocab_size)
        self.double().requires_grad_(False)
        self.cell.weight_hh.mul_(3)  # makes distant tokens affect the output

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.new_state(len(tokens))
        return torch.stack([self.step(state, column) for column in tokens.unbind(1)], dim=1)

    def new_state(self, rows: int, max_tokens: int | None = None) -> GRUState:
        return GRUState(rows)

    def prefill(self, state: GRUState, row: int, ids: Sequence[int] | Tensor) -> Tensor:
        hidden = torch.zeros(1, WIDTH, dtype=torch.float64)
        for id in torch.as_tensor(ids):
            hidden = self.cell(self.embedding(id[None]), hidden)
        state.hidden[row], state.lengths[row] = hidden[0], len(ids)
        return self.head(hidden)[0]

    def step(self, state: GRUState, tokens: Tensor) -> Tensor:
        state.hidden = self.cell(self.embedding(tokens), state.hidden)
        state.lengths = [length + 1 for length in state.lengths]
        return self.head(state.hidden)


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    return training.train(ByteTokenizer(kind="byte"), iter([Piece("text", True)]), print)


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    return training.train(CharTokenizer(kind="char"), iter([Piece("abcd", True)]), print)


def _logits_after_each(network: GRULanguageModel, ids: Sequence[int]) -> Tensor:
    """Compute the logits (T, V) after each token of `ids` (T,) with a plain loop over the cell."""
    hidden, logits = torch.zeros(WIDTH, dtype=torch.float64), []
    for id in ids:
        hidden = network.cell(network.embedding.weight[id], hidden)
        logits.append(network.head(hidden))
    return torch.stack(logits)


def _sample_with_a_loop(network: GRULanguageModel, tokenizer: Tokenizer, request: Request) -> list[int]:
    """Sample from the softmax by inverting its cumulative distribution, token by token. Temperature 0 is greedy."""
    generator, options = torch.Generator().manual_seed(request.seed), request.options
    blocks = [torch.rand(256, generator=generator, dtype=torch.float64) for _ in range(options.max_new_tokens // 256 + 1)]
    hidden, generated = torch.zeros(WIDTH, dtype=torch.float64), []
    for id in tokenizer.encode(request.prompt) or [tokenizer.end_of_text]:
        hidden = network.cell(network.embedding.weight[id], hidden)
    for uniform in torch.cat(blocks)[: options.max_new_tokens]:
        logits = network.head(hidden)
        if options.temperature == 0:
            id = int(logits.argmax())
        else:
            cumulative = (logits / options.temperature).softmax(-1).cumsum(-1)
            id = int((cumulative <= uniform * cumulative[-1]).sum())
        if id == tokenizer.end_of_text:
            break
        generated.append(id)
        hidden = network.cell(network.embedding.weight[id], hidden)
    return generated


def _options(tokens: int, temperature: float = 1.0) -> SamplingOptions:
    return SamplingOptions(max_new_tokens=tokens, temperature=temperature, top_k=None)


def test_a_model_with_its_own_state_is_its_own_decoder(byte_tokenizer: Tokenizer) -> None:
    network = GRULanguageModel(byte_tokenizer.vocab_size)
    assert isinstance(network, DecodingModel)
    assert as_decoder(network) is network
    assert isinstance(as_decoder(model()), Decoder)
    assert isinstance(Decoder(model()), DecodingModel)


def test_each_sample_from_a_shared_prompt_matches_a_plain_loop(byte_tokenizer: Tokenizer) -> None:
    network, options = GRULanguageModel(byte_tokenizer.vocab_size), _options(60)
    samples = generate(network, byte_tokenizer, "the cat", options, count=6, seed=3)
    requests = [Request("the cat", options, sample_seed(3, index)) for index in range(6)]
    assert [sample.token_ids for sample in samples] == [
        _sample_with_a_loop(network, byte_tokenizer, request) for request in requests
    ]
    assert len({tuple(sample.token_ids) for sample in samples}) == 6


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_each_sequence_that_joins_and_leaves_a_batch_matches_a_plain_loop(rows: int, byte_tokenizer: Tokenizer) -> None:
    network = GRULanguageModel(byte_tokenizer.vocab_size)
    prompts = ["", "a", "the cat", "the cat", "a prompt that is longer than the others", "b"]
    requests = [
        Request(prompt, _options(5 + 17 * (index % 4), temperature=(index % 3) * 0.7), index)
        for index, prompt in enumerate(prompts * 2)
    ]
    samples = list(generate_batch(network, byte_tokenizer, requests, rows=rows))
    assert [sample.token_ids for sample in samples] == [
        _sample_with_a_loop(network, byte_tokenizer, request) for request in requests
    ]


def test_removing_a_sequence_does_not_affect_the_others(byte_tokenizer: Tokenizer) -> None:
    network = GRULanguageModel(byte_tokenizer.vocab_size)
    requests = [Request(prompt, _options(30), 7) for prompt in ("x", "yy", "zzz", "new")]
    engine = Engine(network, byte_tokenizer, 4)
    [removed], *others = [engine.add([request]) for request in requests[:3]]
    for _ in range(4):
        engine.step()
    engine.evict(removed)
    others.append(engine.add([requests[3]]))
    while engine.busy:
        engine.step()
    generated = [sequence.sample.token_ids for [sequence] in others]
    assert generated == [_sample_with_a_loop(network, byte_tokenizer, request) for request in requests[1:]]


def test_a_long_stream_never_evicts_tokens(byte_tokenizer: Tokenizer) -> None:
    network = GRULanguageModel(byte_tokenizer.vocab_size)
    network.head.bias[byte_tokenizer.end_of_text] = float("-inf")
    request, pieces = Request("x" * 300, _options(3000), 1), []
    [sample] = generate_batch(network, byte_tokenizer, [Request(request.prompt, request.options, 1, on_text=pieces.append)])
    assert len(sample.token_ids) == 3000
    assert sample.token_ids == _sample_with_a_loop(network, byte_tokenizer, request)
    assert "".join(pieces) == sample.text == byte_tokenizer.decode(sample.token_ids)


def test_recorded_log_probabilities_match_the_loop(byte_tokenizer: Tokenizer) -> None:
    network = GRULanguageModel(byte_tokenizer.vocab_size)
    options = SamplingOptions(max_new_tokens=12, temperature=2.0, top_k=40, logprobs=3, repetition_penalty=1.5)
    [sample] = generate(network, byte_tokenizer, "ab", options)
    prompt = byte_tokenizer.encode("ab")
    logprobs = _logits_after_each(network, [*prompt, *sample.token_ids[:-1]])[len(prompt) - 1 :].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(sample.token_ids)[:, None]).squeeze(1)
    assert [choice.logprob for choice in sample.choices] == pytest.approx(expected.tolist(), abs=1e-5)


def _logprob(network: GRULanguageModel, prompt: list[int], ids: Sequence[int]) -> float:
    logprobs = _logits_after_each(network, [*prompt, *ids[:-1]])[len(prompt) - 1 :].log_softmax(-1)
    return float(logprobs.gather(1, torch.tensor(ids)[:, None]).sum())


def test_with_enough_beams_beam_search_is_exhaustive(letters: Tokenizer) -> None:
    network, prompt, end = GRULanguageModel(letters.vocab_size), letters.encode("a"), letters.end_of_text
    others = [id for id in range(letters.vocab_size) if id != end]
    continuations = [
        (*ids, last)
        for size in (1, 2, 3)
        for ids in itertools.product(others, repeat=size - 1)
        for last in (range(letters.vocab_size) if size == 3 else [end])
    ]
    scores = {ids: _logprob(network, prompt, ids) / len(ids) for ids in continuations}
    expected = sorted(scores, key=lambda ids: -scores[ids])[:5]
    results = beam_search(network, letters, "a", beams=60, max_new_tokens=3)[:5]
    assert [result.score for result in results] == pytest.approx([scores[ids] for ids in expected], abs=1e-5)
    assert [tuple(result.sample.token_ids) for result in results] == [tuple(id for id in ids if id != end) for ids in expected]


@pytest.mark.parametrize("beams", [1, 3, 7])
def test_a_beam_keeps_the_state_of_its_own_tokens(beams: int, letters: Tokenizer) -> None:
    """The reference recomputes every beam from its tokens at each step, so it never copies a state."""
    network, prompt = GRULanguageModel(letters.vocab_size), letters.encode("ab")
    network.head.bias[letters.end_of_text] = float("-inf")
    kept: list[list[int]] = [[]]
    for _ in range(14):
        extended = [[*ids, id] for ids in kept for id in range(letters.vocab_size) if id != letters.end_of_text]
        kept = sorted(extended, key=lambda ids: -_logprob(network, prompt, ids))[:beams]
    results = beam_search(network, letters, "ab", beams=beams, max_new_tokens=14)
    assert [result.sample.token_ids for result in results] == kept
    assert [result.score for result in results] == pytest.approx([_logprob(network, prompt, ids) / 14 for ids in kept], abs=1e-5)


def test_best_of_scores_a_sequence_of_any_length(letters: Tokenizer) -> None:
    network = GRULanguageModel(letters.vocab_size)
    network.head.bias[letters.end_of_text] = float("-inf")
    ranked = best_of(network, letters, Request("ab", _options(50), 2), count=2, candidates=6)
    for result in ranked:
        ids = result.sample.token_ids
        assert result.score == pytest.approx(_logprob(network, letters.encode("ab"), ids) / 50, abs=1e-5)
        assert mean_logprob(network, letters, "ab" * 500, ids) == pytest.approx(
            _logprob(network, letters.encode("ab" * 500), ids) / 50, abs=1e-5
        )


def test_only_transformers_can_be_packed_or_compiled(byte_tokenizer: Tokenizer) -> None:
    network = GRULanguageModel(byte_tokenizer.vocab_size)
    arguments: dict[str, Any] = {"steps": None, "reporter": Reporter()}
    assert make_decoder(network, weights="fp32", compiled=None, **arguments) is network
    with pytest.raises(InputError, match="--weights: int8 is not supported by this architecture"):
        make_decoder(network, weights="int8", compiled=None, **arguments)
    with pytest.raises(InputError, match="--compile: this architecture is not supported"):
        make_decoder(network, weights="fp32", compiled=True, **arguments)
    with pytest.raises(InputError, match="a model of class Linear cannot generate text"):
        generate(nn.Linear(2, 2), byte_tokenizer, "x", _options(1))
