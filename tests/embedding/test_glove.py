"""GloVe counts what stands together and factorizes it as published, on any number of threads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tinylm.embedding import glove, kernels
from tinylm.embedding.glove import STRIPES, Cooccurrences, Glove, count
from tinylm.embedding.text import Text, Units
from tinylm.recipe.embeddings import GloveMethod
from tinylm.reporting import SILENT

V = 40


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Text:
    ids = np.random.default_rng(0).zipf(1.3, 20_000) % V
    ids[::97] = -1
    path = tmp_path_factory.mktemp("ids") / "ids"
    ids.astype("<i4").tofile(path)
    return Text(Units([str(row) for row in range(V)], np.bincount(ids[ids >= 0], minlength=V), False), path, len(ids), "zipf")


def by_hand(ids: list[int], window: int) -> Counter[tuple[int, int]]:
    found: Counter[tuple[int, int]] = Counter()
    for position, id in enumerate(ids):
        for distance in range(1, window + 1):
            before = position - distance
            if id < 0 or before < 0 or ids[before] < 0:
                break
            found[id, ids[before]] += 1 / distance  # type: ignore[assignment]
            found[ids[before], id] += 1 / distance  # type: ignore[assignment]
    return found


def all_cells(cells: Cooccurrences) -> dict[tuple[int, int], float]:
    found = {}
    for row in range(STRIPES):
        for column in range(STRIPES):
            for cell in cells.block(row, column):
                key = int(cell["row"]), int(cell["column"])
                assert (key[0] % STRIPES, key[1] % STRIPES) == (row, column)
                assert key not in found
                found[key] = float(cell["count"])
    return found


@pytest.mark.parametrize("dense", [0, 7, V])
def test_counts_in_memory_and_on_disk_are_those_by_hand(numbers: Text, dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With buffers so small that there are dozens of runs and of ranges."""
    monkeypatch.setattr(glove, "_MOST_DENSE", dense)
    monkeypatch.setattr(glove, "_PAIR_BYTES", (1 << 20) // 2000)
    text = Text(numbers.units, numbers.path, numbers.length, f"zipf-{dense}")
    method = GloveMethod(name="glove", window=4, buffer_megabytes=1)
    wanted = by_hand(np.fromfile(numbers.path, "<i4").tolist(), 4)
    found = all_cells(count(text, method, 1, SILENT))
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[key] for key in wanted], list(wanted.values()), rtol=1e-6)


def test_a_cell_is_the_published_update() -> None:
    """Equation 8 and AdaGrad, with x below and above x_max."""
    generator = np.random.default_rng(0)
    words, contexts = generator.standard_normal((2, 3, 5)).astype(np.float32)
    squares, context_squares = np.ones((2, 3, 5), np.float32)
    w, c = words.astype(np.float64), contexts.astype(np.float64)
    ws, cs = np.ones((2, 3, 5))
    cells = [(0, 1, 20.0), (2, 1, 300.0), (0, 0, 1.0)]
    wanted_loss = 0.0
    for row, column, x in cells:
        error = w[row, :4] @ c[column, :4] + w[row, 4] + c[column, 4] - np.log(x)
        weight = min(1.0, x / 100) ** 0.75
        wanted_loss += weight * error**2 / 2
        to_word = weight * error * 0.05 * np.append(c[column, :4], 1)
        to_context = weight * error * 0.05 * np.append(w[row, :4], 1)
        w[row] -= to_word / np.sqrt(ws[row])
        c[column] -= to_context / np.sqrt(cs[column])
        ws[row] += to_word**2
        cs[column] += to_context**2
    rows, columns = (np.array([cell[side] for cell in cells], np.int32) for side in (0, 1))
    counts = np.array([cell[2] for cell in cells], np.float32)
    rate, x_max, alpha = (np.float32(number) for number in (0.05, 100, 0.75))
    loss = kernels.glove(rows, columns, counts, words, contexts, squares, context_squares, rate, x_max, alpha)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    np.testing.assert_allclose(words, w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(contexts, c, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(squares, ws, rtol=1e-4)


def test_threads_change_no_bit_and_every_cell_is_met_once_an_epoch(numbers: Text) -> None:
    method = GloveMethod(name="glove", dimensions=8, window=4, epochs=3)
    tables, losses = [], []
    for threads in (1, 3):
        learner = Glove(numbers, method, 1, threads, SILENT)
        steps = [learner.step(number) for number in range(learner.steps)]
        assert sum(step.tokens for step in steps) == 3 * len(learner.cells)
        losses.append([sum(step.loss for step in steps[start : start + STRIPES]) for start in range(0, len(steps), STRIPES)])
        tables.append({name: table.tobytes() for name, table in learner.tables().items()})
        learner.close()
    assert tables[0] == tables[1]
    assert losses[0][0] > losses[0][1] > losses[0][2]


def test_counting_leaves_nothing_but_the_cells(numbers: Text) -> None:
    found = count(numbers, GloveMethod(name="glove", window=3), 5, SILENT)
    assert sorted(path.name for path in Path(found.path).parent.iterdir()) == ["cells", "ends.json"]
