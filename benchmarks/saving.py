"""What a checkpoint costs the loop: the pause to copy its tensors, against waiting until it is on the disk.

python benchmarks/saving.py [N_LAYER N_EMBD]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from tinylm.model.transformer import Transformer
from tinylm.optim import groups
from tinylm.recipe.schema import ModelSection, MuonOptimizer
from tinylm.training.checkpoint import CheckpointWriter, Snapshot
from tinylm.training.parallel import Parallel


def main() -> None:
    layers, width = (int(value) for value in sys.argv[1:3] or ("6", "384"))
    model = ModelSection.model_validate({"n_layer": layers, "n_head": 6, "n_embd": width})
    network = Transformer(model, 4096)
    optimizers = groups.build(MuonOptimizer(name="muon"), network, network.stacked_matrices())
    tokens = torch.randint(4096, (1, 33), generator=torch.Generator().manual_seed(0))
    network(tokens[:, :-1], targets=tokens[:, 1:]).backward()
    optimizers.step()
    parallel = Parallel(network)
    pauses, waits = [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder), keep=1)
        writer.prepare()
        for step in range(6):
            began = time.perf_counter()
            writer.begin(Snapshot(parallel.weights(), parallel.host_copies(optimizers.state()), {"step": step}))
            pauses.append(time.perf_counter() - began)
            checkpoint = writer.finish()
            waits.append(time.perf_counter() - began)
            writer.prune()
        assert checkpoint is not None
        size = sum(file.stat().st_size for file in checkpoint.path.iterdir())
    pause, wait = min(pauses[1:]), min(waits[1:])
    what = f"{network.parameter_count() / 1e6:.1f} M parameters, {size / 2**20:.0f} MiB"
    print(f"{what}: the loop pauses {1000 * pause:.0f} ms, the disk has it after {1000 * wait:.0f} ms (ratio {wait / pause:.1f})")


if __name__ == "__main__":
    main()
