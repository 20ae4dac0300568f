"""Test that sentence vectors are pooled hidden states."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoders import masked_recipe

from tinylm.data.framing import Framing
from tinylm.embedding.sentences import sentence_vectors
from tinylm.pipeline import train
from tinylm.run import Run

LINES = ["the apple is red", "a saw", "the apple is green", "no"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("sentences")
    train(masked_recipe(folder), folder / "run", device="cpu")
    return Run.open(folder / "run")


def test_sentence_vectors_match_pooled_hidden_states(run: Run) -> None:
    network, framing = run.model(device="cpu"), Framing.of(run.tokenizer, run.recipe.model)
    pools = {"cls": lambda hidden: hidden[0], "mean": lambda hidden: hidden.mean(0), "last": lambda hidden: hidden[-1]}
    for name, pool in pools.items():
        vectors = sentence_vectors(run, LINES, name)
        for line, vector in zip(LINES, vectors, strict=True):
            with torch.no_grad():
                hidden = network.hidden(torch.from_numpy(framing.frame(run.tokenizer.encode(line)))[None])[0]
            np.testing.assert_allclose(vector, pool(hidden).numpy(), atol=1e-5)
