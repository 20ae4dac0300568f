"""Test that batches can be split and moved, and that their targets and tokens are counted."""

from __future__ import annotations

import subprocess
import sys

import torch
from tiny import causal_batch, ids

from tinylm.data.batch import IGNORE_INDEX, Batch


def _batch() -> Batch:
    targets = ids(5, 6, seed=1)
    targets[1, 2:] = IGNORE_INDEX
    targets[2, 0] = -1
    segments = torch.tensor([[0, 0, 1, 1, -1, -1]] * 5)
    return Batch(ids(5, 6), targets, segments, source=ids(5, 3), source_segments=torch.tensor([[0, 0, -1]] * 5))


def test_splitting_keeps_every_row_of_every_tensor() -> None:
    batch = _batch()
    parts = list(batch.split(2))
    assert [len(part) for part in parts] == [2, 2, 1]
    for name in ("inputs", "targets", "segments", "source", "source_segments"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)), name
    assert torch.equal(batch.rows(slice(1, 3)).targets, batch.targets[1:3])


def test_targets_and_tokens_are_counted_without_padding() -> None:
    batch = _batch()
    assert batch.target_count == 5 * 6 - 4 - 1
    assert batch.token_count == 5 * 4 + 5 * 2
    assert sum(part.target_count for part in batch.split(2)) == batch.target_count
    plain = causal_batch(ids(3, 9))
    assert plain.target_count == plain.token_count == 3 * 8
    assert plain.segments is None


def test_moving_a_batch_moves_all_its_tensors() -> None:
    moved = _batch().to(torch.device("meta"))
    assert all(tensor.device.type == "meta" for tensor in vars(moved).values())
    assert causal_batch(ids(3, 9)).to(torch.device("meta")).segments is None


def test_the_data_modules_do_not_import_torch() -> None:
    code = "import sys, tinylm.data.batch, tinylm.data.datasets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
