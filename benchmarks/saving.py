"""Measure how long saving a checkpoint blocks the training loop, compared with the time until the file is complete.

    python benchmarks/saving.py [N_LAYER N_EMBD]

The loop is blocked only while the tensors are copied. A background thread writes the file.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from tinylm.model.transformer import Transformer
from tinylm.optim import groups
from tinylm.recipe.schema import DecoderSection, MuonOptimizer
from tinylm.training.checkpoint import CheckpointWriter, Snapshot
from tinylm.training.parallel import Parallel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n_layer", type=int, nargs="?", default=6)
    parser.add_argument("n_embd", type=int, nargs="?", default=384)
    arguments = parser.parse_args()
    model = DecoderSection.model_validate({"n_layer": arguments.n_layer, "n_head": 6, "n_embd": arguments.n_embd})
    network = Transformer(model, 4096)
    optimizers = groups.build(MuonOptimizer(name="muon"), network)
    tokens = torch.randint(4096, (1, 33), generator=torch.Generator().manual_seed(0))
    network(tokens[:, :-1], targets=tokens[:, 1:]).backward()
    optimizers.step()
    parallel = Parallel(network)
    pauses, totals = [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder), keep=1)
        writer.prepare()
        for step in range(6):
            start = time.perf_counter()
            writer.start_save(Snapshot(parallel.full_weights(), parallel.cpu_copies(optimizers.state()), {"step": step}))
            pauses.append(time.perf_counter() - start)
            checkpoint = writer.wait()
            totals.append(time.perf_counter() - start)
            writer.prune()
        assert checkpoint is not None
        size = sum(file.stat().st_size for file in checkpoint.path.iterdir())
    pause, total = min(pauses[1:]), min(totals[1:])
    model_size = f"{network.parameter_count() / 1e6:.1f}M parameters, {size / 2**20:.0f} MiB"
    blocked = f"the loop is blocked for {1000 * pause:.0f} ms"
    print(f"{model_size}: {blocked}, the file is complete after {1000 * total:.0f} ms ({total / pause:.1f} times as long)")


if __name__ == "__main__":
    main()
