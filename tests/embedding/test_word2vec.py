"""Test that skip-gram and CBOW apply the published updates, and that the result does not depend on the number of threads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tinylm.embedding import kernels
from tinylm.embedding.encoded_text import EncodedText, Vocabulary
from tinylm.embedding.word2vec import SEGMENT_LENGTHS, SEGMENTS, Word2Vec, Workspaces, alias_table
from tinylm.recipe.embeddings import CbowMethod, SkipGramMethod

V, D = 5, 6


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))


def constants(window: int) -> kernels.TrainingConstants:
    """Return constants that keep every word and draw word 4 as every negative sample."""
    bound = kernels.SIGMOID_RANGE * kernels.SIGMOID_STEPS
    log_sigmoid = -np.logaddexp(0, -np.arange(-bound, bound + 1) / kernels.SIGMOID_STEPS)
    never, always_four = np.zeros(V, np.float32), np.full(V, 4, np.int32)
    table = np.exp(log_sigmoid).astype(np.float32)
    return kernels.TrainingConstants(np.ones(V, np.float32), never, always_four, table, log_sigmoid.astype(np.float32), window, 2)


def reference_update(
    ids: list[int], inputs: np.ndarray, outputs: np.ndarray, lr: float, cbow: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Apply the update from Mikolov et al. 2013 with window 1 and two negatives (both word 4), in plain Python."""
    inputs, outputs = inputs.astype(np.float64), outputs.astype(np.float64)
    for position, word in enumerate(ids):
        around = [ids[other] for other in (position - 1, position + 1) if 0 <= other < len(ids) and ids[other] >= 0]
        if word < 0 or not around:
            continue
        targets = [(word, 1.0)] + [(4, 0.0)] * (2 if word != 4 else 0)
        if cbow:
            mean, change = inputs[around].mean(axis=0), np.zeros(D)
            for target, label in targets:
                step = lr * (label - sigmoid(mean @ outputs[target]))
                change += step * outputs[target]
                outputs[target] += step * mean
            for other in around:
                inputs[other] += change
        else:
            changes = np.zeros_like(outputs)
            for other in around:
                x = inputs[other].copy()
                for target, label in targets:
                    step = lr * (label - sigmoid(x @ outputs[target]))
                    inputs[other] += step * outputs[target]
                    changes[target] += step * x
            outputs += changes
    return inputs, outputs


@pytest.mark.parametrize("cbow", [False, True])
def test_training_on_a_segment_applies_the_published_update(cbow: bool) -> None:
    generator = np.random.default_rng(0)
    inputs, outputs = generator.standard_normal((2, V, D)).astype(np.float32)
    ids = np.array([0, 1, 2, -1, 3, 1, 4, -1, 2], np.int32)
    memory = Workspaces(V, D, 2, 16)
    train = kernels.cbow if cbow else kernels.skip_gram
    workspace = kernels.Workspace(*(array[0] for array in memory.arrays()))
    loss, terms, used_inputs, used_outputs = train(ids, np.uint64(1), inputs, outputs, constants(1), workspace, np.float32(0.1))
    expected_inputs, expected_outputs = reference_update(ids.tolist(), inputs, outputs, 0.1, cbow)
    for table, expected, rows, changes, used in (
        (inputs, expected_inputs, memory.input_rows[0], memory.inputs[0], used_inputs),
        (outputs, expected_outputs, memory.output_rows[0], memory.outputs[0], used_outputs),
    ):
        updated = table.copy()
        updated[rows[:used]] += changes[:used]
        np.testing.assert_allclose(updated, expected, atol=5e-3)  # the kernels tabulate the sigmoid in steps of 1/64
        assert np.abs(updated - table).max() > 0.05
    assert terms == (6 if cbow else 8)
    assert loss > 0
    assert (memory.input_slots == -1).all()
    assert (memory.output_slots == -1).all()


@pytest.mark.parametrize(("cbow", "sharing"), [(True, kernels.CBOW_SHARING), (False, 1)])
def test_consecutive_positions_share_negatives_only_in_cbow(cbow: bool, sharing: int) -> None:
    inputs, outputs = np.zeros((2, 40, D), np.float32)
    memory = Workspaces(40, D, 3, 16)
    uniform = constants(2)._replace(
        keep=np.ones(40, np.float32), accept=np.ones(40, np.float32), alias=np.arange(40, dtype=np.int32), negatives=3
    )
    train = kernels.cbow if cbow else kernels.skip_gram
    workspace = kernels.Workspace(*(array[0] for array in memory.arrays()))
    train(np.arange(16, dtype=np.int32), np.uint64(1), inputs, outputs, uniform, workspace, np.float32(0))
    drawn = memory.output_rows[0][memory.negatives[0]]  # a negative that equals the position's own word is marked by -1
    equal = (drawn[1:] == drawn[:-1]) | (memory.negatives[0][1:] < 0) | (memory.negatives[0][:-1] < 0)
    assert [bool(row.all()) for row in equal] == [position % sharing != 0 for position in range(1, 16)]


def test_merged_changes_are_between_their_mean_and_their_sum() -> None:
    rows = np.array([[0, 1], [0, 2]], np.int32)
    changes = np.ones((2, 2, 3), np.float32)
    for uses, expected in ((1, 2.0), (100_000, 1.0)):
        table = np.zeros((3, 3), np.float32)
        counts = np.full((2, 2), uses, np.int32)
        scratch = np.zeros((2, 3), np.int32)
        for part in range(2):
            kernels.merge_changes(
                table, rows, changes, counts, np.array([2, 2]), np.float32(0.025), scratch[0], scratch[1], part, 2
            )
        np.testing.assert_allclose(table[0], expected, rtol=0.02)
        assert (table[1:] == 1).all(), "if only one segment changes a row, its full change is applied"
        assert not scratch.any()


def test_the_alias_table_samples_in_proportion_to_the_weights() -> None:
    weights = np.array([5.0, 1.0, 0.5, 3.0, 0.0])
    accept, alias = alias_table(weights)
    probabilities = np.zeros(5)
    for row in range(5):
        probabilities[row] += accept[row] / 5
        probabilities[alias[row]] += (1 - accept[row]) / 5
    np.testing.assert_allclose(probabilities, weights / weights.sum(), atol=1e-6)


@pytest.fixture(scope="module")
def paired_ids(tmp_path_factory: pytest.TempPathFactory) -> EncodedText:
    """A text that is long enough for more than three steps, in which ids 2i and 2i + 1 always occur together."""
    generator = np.random.default_rng(0)
    pairs = generator.integers(0, 30, 10_000)
    ids = np.stack([2 * pairs, 2 * pairs + 1, np.full_like(pairs, -1)], axis=1).ravel().astype("<i4")
    path = tmp_path_factory.mktemp("ids") / "ids"
    ids.tofile(path)
    counts = np.bincount(ids[ids >= 0], minlength=60)
    return EncodedText(Vocabulary([f"w{row}" for row in range(60)], counts, False), path, len(ids), "")


def trained(text: EncodedText, cbow: bool, threads: int, seed: int = 1, epochs: int = 2, **options: float) -> Word2Vec:
    method = CbowMethod if cbow else SkipGramMethod
    name = "cbow" if cbow else "skipgram"
    section = method.model_validate({"name": name, "dimensions": 16, "epochs": epochs, "subsample": 0.0, **options})
    learner = Word2Vec(text, section, seed, threads)
    for step in range(learner.steps):
        learner.step(step)
    learner.close()
    return learner


@pytest.mark.parametrize("cbow", [False, True])
def test_the_result_depends_on_the_seed_but_not_on_the_number_of_threads(paired_ids: EncodedText, cbow: bool) -> None:
    assert paired_ids.length > 3 * SEGMENTS * max(SEGMENT_LENGTHS.values())
    one, three, eleven = (trained(paired_ids, cbow, threads) for threads in (1, 3, 11))
    for other in (three, eleven):
        assert one.inputs.tobytes() == other.inputs.tobytes()
        assert one.outputs.tobytes() == other.outputs.tobytes()
    assert trained(paired_ids, cbow, 1, seed=2).inputs.tobytes() != one.inputs.tobytes()


@pytest.mark.parametrize("cbow", [False, True])
def test_words_that_occur_together_predict_each_other(paired_ids: EncodedText, cbow: bool) -> None:
    learner = trained(paired_ids, cbow, 1, epochs=10, lr=0.1)
    scores = learner.inputs @ learner.outputs.T
    scores[np.arange(60), np.arange(60)] = -np.inf
    partner = np.arange(60) ^ 1
    assert (scores.argmax(axis=1) == partner).mean() > 0.9


def test_the_learning_rate_decays_to_its_final_value(paired_ids: EncodedText, tmp_path: Path) -> None:
    learner = Word2Vec(paired_ids, SkipGramMethod(name="skipgram", dimensions=4, epochs=2), 1, 1)
    rates = [learner.step(step).lr for step in range(learner.steps)]
    assert rates[0] == 0.025
    assert rates == sorted(rates, reverse=True)
    assert 1e-4 < rates[-1] < 0.007
    learner.close()
