"""Test that GloVe counts co-occurrences and applies the published updates, with the same result for any number of threads."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tinylm.embedding import glove, kernels
from tinylm.embedding.encoded_text import EncodedText, Vocabulary
from tinylm.embedding.glove import BLOCKS_PER_SIDE, Cooccurrences, Glove, count_cooccurrences
from tinylm.recipe.embeddings import GloveMethod
from tinylm.reporting import SILENT

V = 40


@pytest.fixture(scope="module")
def zipf_ids(tmp_path_factory: pytest.TempPathFactory) -> EncodedText:
    ids = np.random.default_rng(0).zipf(1.3, 20_000) % V
    ids[::97] = -1
    path = tmp_path_factory.mktemp("ids") / "ids"
    ids.astype("<i4").tofile(path)
    return EncodedText(
        Vocabulary([str(row) for row in range(V)], np.bincount(ids[ids >= 0], minlength=V), False), path, len(ids), "zipf"
    )


def reference_counts(ids: list[int], window: int) -> Counter[tuple[int, int]]:
    counts: Counter[tuple[int, int]] = Counter()
    for position, id in enumerate(ids):
        for distance in range(1, window + 1):
            before = position - distance
            if id < 0 or before < 0 or ids[before] < 0:
                break
            counts[id, ids[before]] += 1 / distance  # type: ignore[assignment]
            counts[ids[before], id] += 1 / distance  # type: ignore[assignment]
    return counts


def all_cells(cells: Cooccurrences) -> dict[tuple[int, int], float]:
    counts = {}
    for row in range(BLOCKS_PER_SIDE):
        for column in range(BLOCKS_PER_SIDE):
            for cell in cells.block(row, column):
                key = int(cell["row"]), int(cell["column"])
                assert (key[0] % BLOCKS_PER_SIDE, key[1] % BLOCKS_PER_SIDE) == (row, column)
                assert key not in counts
                counts[key] = float(cell["count"])
    return counts


@pytest.mark.parametrize("dense", [0, 7, V])
def test_counts_in_memory_and_on_disk_match_the_reference(
    zipf_ids: EncodedText, dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffers are so small that counting writes dozens of sorted runs and key ranges."""
    monkeypatch.setattr(glove, "MAX_DENSE_NAMES", dense)
    monkeypatch.setattr(glove, "BYTES_PER_PAIR", (1 << 20) // 2000)
    text = EncodedText(zipf_ids.vocabulary, zipf_ids.path, zipf_ids.length, f"zipf-{dense}")
    method = GloveMethod(name="glove", window=4, buffer_megabytes=1)
    expected = reference_counts(np.fromfile(zipf_ids.path, "<i4").tolist(), 4)
    counts = all_cells(count_cooccurrences(text, method, 1, SILENT))
    assert counts.keys() == expected.keys()
    np.testing.assert_allclose([counts[key] for key in expected], list(expected.values()), rtol=1e-6)


def test_a_cell_is_fitted_with_the_published_update() -> None:
    """The reference is equation 8 of the paper with AdaGrad, for counts below and above x_max."""
    generator = np.random.default_rng(0)
    words, contexts = generator.standard_normal((2, 3, 5)).astype(np.float32)
    squares, context_squares = np.ones((2, 3, 5), np.float32)
    w, c = words.astype(np.float64), contexts.astype(np.float64)
    ws, cs = np.ones((2, 3, 5))
    cells = [(0, 1, 20.0), (2, 1, 300.0), (0, 0, 1.0)]
    expected_loss = 0.0
    for row, column, x in cells:
        error = w[row, :4] @ c[column, :4] + w[row, 4] + c[column, 4] - np.log(x)
        weight = min(1.0, x / 100) ** 0.75
        expected_loss += weight * error**2 / 2
        to_word = weight * error * 0.05 * np.append(c[column, :4], 1)
        to_context = weight * error * 0.05 * np.append(w[row, :4], 1)
        w[row] -= to_word / np.sqrt(ws[row])
        c[column] -= to_context / np.sqrt(cs[column])
        ws[row] += to_word**2
        cs[column] += to_context**2
    rows, columns = (np.array([cell[index] for cell in cells], np.int32) for index in (0, 1))
    counts = np.array([cell[2] for cell in cells], np.float32)
    lr, x_max, alpha = (np.float32(number) for number in (0.05, 100, 0.75))
    loss = kernels.glove(rows, columns, counts, words, contexts, squares, context_squares, lr, x_max, alpha)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    np.testing.assert_allclose(words, w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(contexts, c, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(squares, ws, rtol=1e-4)


def test_the_result_is_the_same_for_any_number_of_threads_and_an_epoch_visits_every_cell_once(zipf_ids: EncodedText) -> None:
    method = GloveMethod(name="glove", dimensions=8, window=4, epochs=3)
    tables, losses = [], []
    for threads in (1, 3):
        learner = Glove(zipf_ids, method, 1, threads, SILENT)
        steps = [learner.step(number) for number in range(learner.steps)]
        assert sum(step.tokens for step in steps) == 3 * len(learner.cells)
        losses.append(
            [sum(step.loss for step in steps[start : start + BLOCKS_PER_SIDE]) for start in range(0, len(steps), BLOCKS_PER_SIDE)]
        )
        tables.append({name: table.tobytes() for name, table in learner.tables().items()})
        learner.close()
    assert tables[0] == tables[1]
    assert losses[0][0] > losses[0][1] > losses[0][2]


def test_counting_removes_its_temporary_files(zipf_ids: EncodedText) -> None:
    cells = count_cooccurrences(zipf_ids, GloveMethod(name="glove", window=3), 5, SILENT)
    written = {path.name for path in cells.path.parent.iterdir()}
    assert {cells.path.name, f"{cells.path.name}.sha256"} <= written
    assert all(name.removesuffix(".sha256").endswith(".cells") for name in written)
