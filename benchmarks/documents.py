"""Measure how shuffling and masking documents affect the time per step and the held-out bits per byte.

    python benchmarks/documents.py [SOURCE] [--rounds 3] [--steps 600] [--context 256] [--batch 8] [--seed 1337]

Each round trains four models with the same seed: with the defaults, with `data.shuffle: documents`, with
`data.document_mask: on`, and with both. Whole documents are held out. For each variant, the script prints the median time ratio
and the median difference in bits per byte, both relative to the defaults in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from tinylm import pipeline
from tinylm.recipe import loads

OPTIONS = {
    "default": [],
    "shuffle": ["data.shuffle=documents"],
    "mask": ["data.document_mask=on"],
    "shuffle and mask": ["data.shuffle=documents", "data.document_mask=on"],
}
RECIPE = """
data: {{train: "{source}", heldout: {{share: 0.1, by: document}}}}
tokenizer: {{kind: bpe, vocab_size: 2048}}
model: {{preset: modern, n_layer: 4, n_head: 4, n_embd: 128, context_length: {context}}}
training: {{steps: {steps}, global_batch_size: {batch}, micro_batch_size: {batch}, precision: fp32, compile: off}}
evaluation: {{every: 1000000}}
checkpoint: {{every: 1000000, keep: 0}}
seed: {seed}
"""


def train(arguments: argparse.Namespace, seed: int, overrides: list[str]) -> tuple[float, float]:
    """Train once and return (seconds per step, held-out bits per byte)."""
    settings = {name: getattr(arguments, name) for name in ("source", "context", "steps", "batch")}
    recipe = loads(RECIPE.format(seed=seed, **settings), overrides)
    with tempfile.TemporaryDirectory() as folder:
        result = pipeline.train(recipe, Path(folder, "run"), device="cpu")
    bits_per_byte = result.metrics["bits_per_byte"]
    assert bits_per_byte is not None
    return result.train_seconds / result.step, bits_per_byte


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="builtin:python-docs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1337)
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in OPTIONS}
    differences: dict[str, list[float]] = {name: [] for name in OPTIONS}
    for round_number in range(arguments.rounds):
        results = {name: train(arguments, arguments.seed + round_number, overrides) for name, overrides in OPTIONS.items()}
        for name, (seconds, bits_per_byte) in results.items():
            measured = f"{1e3 * seconds:7.1f} ms per step  {bits_per_byte:.4f} bits per byte"
            print(f"round {round_number + 1}  {name:<16}  {measured}", flush=True)
            times[name].append(seconds / results["default"][0])
            differences[name].append(bits_per_byte - results["default"][1])
    print("\nrelative to the defaults: median time ratio, and median difference in bits per byte (range over rounds)")
    for name in OPTIONS:
        time, difference = statistics.median(times[name]), statistics.median(differences[name])
        spread = f"({min(differences[name]):+.4f} to {max(differences[name]):+.4f})"
        print(f"{name:<16}  time ratio {time:.3f}  bits per byte {difference:+.4f} {spread}")


if __name__ == "__main__":
    main()
