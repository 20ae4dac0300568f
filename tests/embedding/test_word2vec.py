"""Skip-gram and CBOW are the published updates, and the number of threads changes no bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tinylm.embedding import kernels
from tinylm.embedding.text import Text, Units
from tinylm.embedding.word2vec import LANES, STRETCH, Word2Vec, _Memory, alias_table
from tinylm.recipe.embeddings import CbowMethod, SkipGramMethod

V, D = 5, 6


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))


def law(window: int) -> kernels.TrainingConstants:
    """No word is thinned out, and every negative is word 4."""
    bound = kernels.BOUND * kernels.STEPS
    log_sigmoid = -np.logaddexp(0, -np.arange(-bound, bound + 1) / kernels.STEPS)
    never, always_four = np.zeros(V, np.float32), np.full(V, 4, np.int32)
    table = np.exp(log_sigmoid).astype(np.float32)
    return kernels.TrainingConstants(np.ones(V, np.float32), never, always_four, table, log_sigmoid.astype(np.float32), window, 2)


def by_hand(ids: list[int], inputs: np.ndarray, outputs: np.ndarray, rate: float, cbow: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mikolov et al. 2013, window 1, two negatives (both word 4), in plain Python."""
    inputs, outputs = inputs.astype(np.float64), outputs.astype(np.float64)
    for position, word in enumerate(ids):
        around = [ids[other] for other in (position - 1, position + 1) if 0 <= other < len(ids) and ids[other] >= 0]
        if word < 0 or not around:
            continue
        targets = [(word, 1.0)] + [(4, 0.0)] * (2 if word != 4 else 0)
        if cbow:
            mean, change = inputs[around].mean(axis=0), np.zeros(D)
            for target, label in targets:
                step = rate * (label - sigmoid(mean @ outputs[target]))
                change += step * outputs[target]
                outputs[target] += step * mean
            for other in around:
                inputs[other] += change
        else:
            changes = np.zeros_like(outputs)
            for other in around:
                x = inputs[other].copy()
                for target, label in targets:
                    step = rate * (label - sigmoid(x @ outputs[target]))
                    inputs[other] += step * outputs[target]
                    changes[target] += step * x
            outputs += changes
    return inputs, outputs


@pytest.mark.parametrize("cbow", [False, True])
def test_a_lane_is_the_published_update(cbow: bool) -> None:
    generator = np.random.default_rng(0)
    inputs, outputs = generator.standard_normal((2, V, D)).astype(np.float32)
    ids = np.array([0, 1, 2, -1, 3, 1, 4, -1, 2], np.int32)
    memory = _Memory(V, D, 2)
    learn = kernels.cbow if cbow else kernels.skip_gram
    lane = kernels.Lane(*memory.lane(0))
    loss, terms, used_inputs, used_outputs = learn(ids, np.uint64(1), inputs, outputs, law(1), lane, np.float32(0.1))
    wanted_inputs, wanted_outputs = by_hand(ids.tolist(), inputs, outputs, 0.1, cbow)
    for table, wanted, rows, changes, used in (
        (inputs, wanted_inputs, memory.input_rows[0], memory.inputs[0], used_inputs),
        (outputs, wanted_outputs, memory.output_rows[0], memory.outputs[0], used_outputs),
    ):
        found = table.copy()
        found[rows[:used]] += changes[:used]
        np.testing.assert_allclose(found, wanted, atol=5e-3)  # the sigmoid is a table in steps of 1/64
        assert np.abs(found - table).max() > 0.05
    assert terms == (6 if cbow else 8)
    assert loss > 0
    assert (memory.input_slots == -1).all()
    assert (memory.output_slots == -1).all()


def test_lanes_are_joined_between_their_mean_and_their_sum() -> None:
    rows = np.array([[0, 1], [0, 2]], np.int32)
    changes = np.ones((2, 2, 3), np.float32)
    for uses, expected in ((1, 2.0), (100_000, 1.0)):
        table = np.zeros((3, 3), np.float32)
        counts = np.full((2, 2), uses, np.int32)
        scratch = np.zeros((2, 3), np.int32)
        for part in range(2):
            kernels.join(table, rows, changes, counts, np.array([2, 2]), np.float32(0.025), scratch[0], scratch[1], part, 2)
        np.testing.assert_allclose(table[0], expected, rtol=0.02)
        assert (table[1:] == 1).all(), "a row of one lane gets all that it learned"
        assert not scratch.any()


def test_the_alias_table_has_the_chances_it_was_made_of() -> None:
    weights = np.array([5.0, 1.0, 0.5, 3.0, 0.0])
    accept, alias = alias_table(weights)
    chances = np.zeros(5)
    for row in range(5):
        chances[row] += accept[row] / 5
        chances[alias[row]] += (1 - accept[row]) / 5
    np.testing.assert_allclose(chances, weights / weights.sum(), atol=1e-6)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """A text of three steps in which 2i and 2i + 1 always stand together."""
    generator = np.random.default_rng(0)
    pairs = generator.integers(0, 30, 10_000)
    ids = np.stack([2 * pairs, 2 * pairs + 1, np.full_like(pairs, -1)], axis=1).ravel().astype("<i4")
    path = tmp_path_factory.mktemp("ids") / "ids"
    ids.tofile(path)
    counts = np.bincount(ids[ids >= 0], minlength=60)
    return Text(Units([f"w{row}" for row in range(60)], counts, False), path, len(ids), "")


def trained(text: Text, cbow: bool, threads: int, seed: int = 1, epochs: int = 2, **parts: float) -> Word2Vec:
    method = CbowMethod if cbow else SkipGramMethod
    name = "cbow" if cbow else "skipgram"
    section = method.model_validate({"name": name, "dimensions": 16, "epochs": epochs, "subsample": 0.0, **parts})
    learner = Word2Vec(text, section, seed, threads)
    for step in range(learner.steps):
        learner.step(step)
    learner.close()
    return learner


@pytest.mark.parametrize("cbow", [False, True])
def test_threads_change_no_bit_and_the_seed_does(numbers: Text, cbow: bool) -> None:
    assert numbers.length > 3 * LANES * STRETCH
    one, three, eleven = (trained(numbers, cbow, threads) for threads in (1, 3, 11))
    for other in (three, eleven):
        assert one.inputs.tobytes() == other.inputs.tobytes()
        assert one.outputs.tobytes() == other.outputs.tobytes()
    assert trained(numbers, cbow, 1, seed=2).inputs.tobytes() != one.inputs.tobytes()


@pytest.mark.parametrize("cbow", [False, True])
def test_words_that_stand_together_find_each_other(numbers: Text, cbow: bool) -> None:
    learner = trained(numbers, cbow, 1, epochs=10, lr=0.1)
    scores = learner.inputs @ learner.outputs.T
    scores[np.arange(60), np.arange(60)] = -np.inf
    partner = np.arange(60) ^ 1
    assert (scores.argmax(axis=1) == partner).mean() > 0.9


def test_the_rate_falls_to_its_end(numbers: Text, tmp_path: Path) -> None:
    learner = Word2Vec(numbers, SkipGramMethod(name="skipgram", dimensions=4, epochs=2), 1, 1)
    rates = [learner.step(step).lr for step in range(learner.steps)]
    assert rates[0] == 0.025
    assert rates == sorted(rates, reverse=True)
    assert 1e-4 < rates[-1] < 0.007
    learner.close()
