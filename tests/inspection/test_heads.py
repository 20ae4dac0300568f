"""Head scores match their definitions, and they identify an induction head in a trained model but none in a random one."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from bigram import Bigram, BigramSection
from tiny import ids, model, section

from tinylm.errors import InputError
from tinylm.inspection import head_scores, repeated_tokens
from tinylm.inspection.heads import CHARACTERISTIC
from tinylm.model.transformer import Transformer


class _Reference(NamedTuple):
    previous: float
    duplicate: float
    induction: float
    entropy: float


def _scores_by_definition(pattern: torch.Tensor, tokens: torch.Tensor) -> _Reference:
    """Compute the scores of one head from its attention pattern (batch, time, time) by looping over all weights."""
    rows, length = tokens.shape
    period = length // 2
    previous, duplicate, induction, entropy = [], [], [], []
    for row in range(rows):
        for i in range(length):
            weights = pattern[row, i].tolist()
            if i >= 1:
                previous.append(weights[i - 1])
            earlier = [j for j in range(i) if tokens[row, j] == tokens[row, i]]
            if earlier:
                duplicate.append(sum(weights[j] for j in earlier))
            if i >= period - 1:
                induction.append(weights[i - period + 1])
            entropy.append(-sum(w * math.log2(w) for w in weights if w > 0))
    return _Reference(*(sum(values) / len(values) for values in (previous, duplicate, induction, entropy)))


def test_scores_match_their_definitions() -> None:
    network = model("llama")
    tokens = repeated_tokens(network, rows=2)
    scores = head_scores(network, tokens)
    with torch.no_grad():
        _, cache = network.run_with_cache(tokens)
    for layer in range(2):
        for head in range(4):
            expected = _scores_by_definition(cache[f"blocks.{layer}.attn.pattern"][:, head], tokens)
            actual = [scores.previous_token, scores.duplicate_token, scores.induction, scores.entropy]
            assert [float(score[layer, head]) for score in actual] == pytest.approx(expected, abs=1e-5)


def test_repeated_tokens_are_two_copies_that_fit_the_context() -> None:
    tokens = repeated_tokens(model("gpt2", context_length=17), rows=3)
    assert tokens.shape == (3, 16)
    assert torch.equal(tokens[:, :8], tokens[:, 8:])
    assert repeated_tokens(model("gpt2", context_length=400)).shape[1] == 100
    with pytest.raises(InputError, match="a context of 3 tokens is too short"):
        repeated_tokens(model("gpt2", context_length=3))
    with pytest.raises(InputError, match="two copies of the same sequence"):
        head_scores(model("gpt2"), ids(1, 8))


def _repeated_text(text: str, rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """Return random excerpts of a text, each repeated once, as character ids (rows, 2 length), and the number of characters."""
    characters = {character: id for id, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([characters[character] for character in text])
    starts = torch.randint(len(ids) - length, (rows,), generator=generator)
    excerpts = ids[starts[:, None] + torch.arange(length)]
    return torch.cat((excerpts, excerpts), dim=1), len(characters)


def test_training_on_text_with_repeats_forms_an_induction_head_that_a_random_model_lacks(english: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, size = _repeated_text(english[1000:21_000].lower(), 100 * 16, 16, generator)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "context_length": 32}
    network = Transformer(section("llama", **shape), size, seed=0).eval()
    untrained = head_scores(network)
    assert all(untrained.kind(layer, head) is None for layer in range(2) for head in range(4))
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3, weight_decay=0.0)
    for batch in tokens.split(16):
        optimizer.zero_grad()
        (network(batch[:, :-1], targets=batch[:, 1:]) / batch[:, 1:].numel()).backward()
        optimizer.step()
    trained = head_scores(network)
    layer, head = trained.strongest()[0]
    assert trained.kind(layer, head) == "induction"
    assert trained.induction[layer, head] > 2 * CHARACTERISTIC


def test_a_model_without_attention_is_rejected() -> None:
    with pytest.raises(InputError, match="bigram architecture has no attention"):
        head_scores(Bigram(BigramSection(context_length=8), 20))
