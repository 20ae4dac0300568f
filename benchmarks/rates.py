"""Check that learning rates transfer between model sizes by training models of several widths with several batch sizes.

    python benchmarks/rates.py SOURCE [--widths 64 128 256] [--batches 12 48] [--layers 4] [--steps 400] [--seed 1337]

Muon's `lr` and its `adamw_lr` (for the embeddings, the head and the norm gains) are varied separately, by factors of two around
their defaults. Each row of the output shows the held-out loss (nats per character) for each factor, and the best factor. Models of
every width are trained with the first batch size, and models of the middle width also with the other batch sizes. If learning rates
transfer, the best factor is about the same in all rows. The models are character-level with a context length of 64. They have no
n-gram embeddings, because the learning rate of the n-gram tables is not tested.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tinylm import pipeline
from tinylm.recipe import loads
from tinylm.recipe.schema import MuonOptimizer

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
DEFAULTS = {key: getattr(MuonOptimizer(name="muon"), key) for key in ("lr", "adamw_lr")}
RECIPE = """
data: {{train: {source}, heldout: {{share: 0.1, by: tail}}}}
tokenizer: {{kind: char}}
model: {{preset: modern, n_layer: {layers}, n_head: {heads}, n_embd: {width}, context_length: 64}}
training:
  steps: {steps}
  global_batch_size: {batch}
  compile: off
  optimizer: {{name: muon, lr: {lr}, adamw_lr: {adamw_lr}}}
evaluation: {{every: 1000000}}
checkpoint: {{every: 1000000, keep: 0}}
seed: {seed}
"""


def heldout_loss(arguments: argparse.Namespace, width: int, batch: int, rates: dict[str, float]) -> float:
    """Train once and return the held-out loss in nats per character."""
    settings = {"source": arguments.source, "layers": arguments.layers, "steps": arguments.steps, "seed": arguments.seed}
    recipe = loads(RECIPE.format(width=width, heads=max(1, width // 32), batch=batch, **settings, **rates))
    with tempfile.TemporaryDirectory() as folder:
        loss = pipeline.train(recipe, Path(folder, "run"), device="cpu").metrics["loss"]
    assert loss is not None
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--batches", type=int, nargs="+", default=[12, 48], help="batch sizes, in sequences per step")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1337)
    arguments = parser.parse_args()
    middle, first = arguments.widths[len(arguments.widths) // 2], arguments.batches[0]
    cases = [(width, first) for width in arguments.widths] + [(middle, batch) for batch in arguments.batches[1:]]
    cache: dict[tuple[int, int, float, float], float] = {}
    for varied, default in DEFAULTS.items():
        print(f"{f'{varied} / {default}':<27}" + "  ".join(f"{factor:>6g}" for factor in FACTORS) + "   best")
        for width, batch in cases:
            losses = []
            for factor in FACTORS:
                rates = {**DEFAULTS, varied: default * factor}
                key = (width, batch, rates["lr"], rates["adamw_lr"])
                if key not in cache:
                    cache[key] = heldout_loss(arguments, width, batch, rates)
                losses.append(cache[key])
            best = FACTORS[losses.index(min(losses))]
            row = "  ".join(f"{loss:6.3f}" for loss in losses)
            print(f"width {width:>4}, {batch:>3} sequences  {row}   {best:g}", flush=True)


if __name__ == "__main__":
    main()
