"""Check the model size that `tinylm new` chooses against a grid of other sizes, with the same time budget.

    python benchmarks/sizes.py SOURCE... [--minutes 2] [--sizes 2x128 3x192 4x256 5x320 6x384 8x512] [--set K=V ...]

The script trains the recipe that `tinylm new SOURCE --minutes M` proposes and, for each size in the grid, the recipe that
`tinylm new` would write for that size, including regularization, evaluation interval and schedule. It prints the held-out bits per
byte of each best checkpoint, and the ratio of the proposed size's bits per byte to the best size's.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

from tinylm import pipeline
from tinylm.recipe import Recipe, loads
from tinylm.recipe.schema import DataSection
from tinylm.suggest import Budget, suggest_recipe

NO_SAMPLES_OR_CHECKPOINTS = ["sampling.every=null", "checkpoint.every=1000000", "checkpoint.keep=0"]


def train(text: str, settings: list[str]) -> tuple[Recipe, pipeline.TrainResult]:
    recipe = loads(text, [*NO_SAMPLES_OR_CHECKPOINTS, *settings])
    with tempfile.TemporaryDirectory() as folder:
        return recipe, pipeline.train(recipe, Path(folder, "run"), device="cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="+")
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--sizes", nargs="+", default=["2x128", "3x192", "4x256", "5x320", "6x384", "8x512"])
    parser.add_argument("--set", action="append", default=[], dest="settings")
    arguments = parser.parse_args()
    data, budget = DataSection(train=tuple(arguments.source)), Budget(arguments.minutes)
    model = suggest_recipe(data, budget).recipe.model
    chosen = f"{model.n_layer}x{model.n_embd}"
    results: dict[str, float] = {}
    for size in dict.fromkeys([chosen, *arguments.sizes]):
        layers, width = map(int, size.split("x"))
        recipe, result = train(suggest_recipe(data, budget, sizes=[(layers, width)]).yaml, arguments.settings)
        losses = result.metrics["bits_per_byte"], result.metrics["loss"], result.best_value
        bits_per_byte, last, best = (loss or math.nan for loss in losses)
        results[size] = bits_per_byte * best / last  # bits per byte is proportional to the loss
        details = f"{result.step:,} steps, {result.seconds / 60:.1f} minutes, dropout {recipe.model.dropout:g}"
        proposed = ", proposed" if size == chosen else ""
        print(f"{size:>7}: {results[size]:.4f} bits per byte ({details}{proposed})", flush=True)
    best_size = min(results, key=lambda size: results[size])
    print(f"bits per byte, proposed ({chosen}) / best ({best_size}): {results[chosen] / results[best_size]:.3f}")


if __name__ == "__main__":
    main()
