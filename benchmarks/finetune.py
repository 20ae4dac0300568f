"""Compare full fine-tuning, LoRA and training from scratch on a second text, in bits per byte on the first and second texts.

    python benchmarks/finetune.py RUN TEXT --steps 120

RUN is a run folder (such as runs/quickstart), and TEXT is the second text. The first text is the one that RUN was trained on. All
measurements are on held-out text. All variants use the same tokenizer, batches and number of steps, and are evaluated at their
last checkpoint.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tinylm.data.shards import Shard
from tinylm.device import resolve
from tinylm.evaluation.perplexity import evaluate
from tinylm.pipeline import train
from tinylm.recipe import loads
from tinylm.run import Run

RECIPE = """\
data: {{train: "{text}", heldout: {{share: 0.1, by: tail}}}}
model: {{init_from: "{run}", dropout: 0.1}}
training: {{steps: {steps}, global_batch_size: 8, precision: fp32, compile: off, schedule: {{name: linear, warmup: 0.1}}}}
evaluation: {{every: {steps}}}
checkpoint: {{every: {steps}, keep: 1}}
"""
VARIANTS = {
    "full, lower learning rates": ("training.optimizer={name: muon, lr: 5e-3, adamw_lr: 1e-3}",),
    "LoRA, rank 8": ("training.lora={rank: 8}", "training.optimizer={name: adamw, lr: 2e-3}"),
    "from scratch": ("model.init_from=null", "training.optimizer={name: muon, lr: 0.02, adamw_lr: 6e-3}"),
    "full, original learning rates": ("training.optimizer={name: muon, lr: 0.02, adamw_lr: 6e-3}",),
    "LoRA, rank 32": ("training.lora={rank: 32, alpha: 64}", "training.optimizer={name: adamw, lr: 2e-3}"),
}


def bits_per_byte(run: Run, shard: Shard) -> float:
    device = resolve("cpu")
    network = run.network(run.checkpoint("last"), device)
    return evaluate(network, shard, run.tokenizer.token_byte_lengths).bits_per_byte


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=120)
    arguments = parser.parse_args()
    base = Run.open(arguments.run)
    text = RECIPE.format(run=arguments.run, text=arguments.text, steps=arguments.steps)
    first, second = base.heldout(), None
    print("| variant | first text (bits/byte) | second text (bits/byte) | training time (s) |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, settings) in enumerate(VARIANTS.items()):
            recipe = loads(text, settings)
            if recipe.model.init_from is None:  # from scratch, but with RUN's architecture and tokenizer
                model = base.recipe.model.model_copy(update={"dropout": 0.1, "init_from": None})
                recipe = recipe.model_copy(update={"tokenizer": loads(text).tokenizer, "model": model})
            result = train(recipe, Path(folder) / str(number), device="cpu")
            tuned = Run.open(Path(folder) / str(number))
            if second is None:
                second = tuned.heldout()
                print(f"| before | {bits_per_byte(base, first):.4f} | {bits_per_byte(base, second):.4f} | |", flush=True)
            losses = f"{bits_per_byte(tuned, first):.4f} | {bits_per_byte(tuned, second):.4f}"
            print(f"| {name} | {losses} | {result.train_seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
