"""lm-evaluation-harness computes the same scores through the server as with tinylm's own adapter."""

from __future__ import annotations

import string
from typing import Any

import pytest
import torch
from tiny import model

from tinylm.interchange.harness import adapter
from tinylm.model.decoder import Decoder
from tinylm.tokenizer import Tokenizer

pytest.importorskip("httpx")
pytest.importorskip("tinylm.serving.server")
harness = pytest.importorskip("lm_eval.models.openai_completions", reason="lm-eval is not installed")
pytest.importorskip("tenacity", reason="lm-eval[api] is not installed")

PAIRS = [("the cat", " sat"), ("", "hello"), ("a longer context, with héllo", " end"), ("x", "\n\n"), ("2 + 2 =", " 4")]


def test_loglikelihoods_through_the_server_equal_those_from_the_adapter(tokenizer: Tokenizer) -> None:
    from lm_eval.api.instance import Instance
    from running_server import NAME, RunningServer

    from tinylm.serving.server import Limits

    network = model("modern", vocab_size=tokenizer.vocab_size, context_length=64)
    most_likely = {
        letter: int(network(torch.tensor([tokenizer.encode(letter)]))[0, -1].argmax()) for letter in string.ascii_letters
    }
    greedy = next((letter, tokenizer.decode([id])) for letter, id in most_likely.items() if tokenizer.token_bytes[id].isalnum())
    pairs = [*PAIRS, greedy]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    rolling = [Instance("loglikelihood_rolling", {}, ("a whole text of one window",), 0)]
    running = RunningServer(Decoder(network), tokenizer, Limits())
    try:
        url = f"{running.address}/v1/completions"
        client: Any = harness.LocalCompletionsAPI(base_url=url, model=NAME, max_length=64, num_concurrent=2)
        assert client.tokenizer_backend == "remote"
        through_server, rolled = client.loglikelihood(requests), client.loglikelihood_rolling(rolling)
    finally:
        running.stop()
    local = adapter(network, tokenizer)
    for (value, is_greedy), (expected, expected_greedy) in zip(through_server, local.loglikelihood(requests), strict=True):
        assert value == pytest.approx(expected, abs=1e-4)
        assert is_greedy == expected_greedy
    assert rolled == pytest.approx(local.loglikelihood_rolling(rolling), abs=1e-4)
    assert through_server[-1][1], "the last pair is a greedy continuation"
