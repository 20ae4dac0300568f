"""Whether `tinylm new` chooses the right size: its recipe against a grid of other sizes with the same budget of minutes.

    python benchmarks/sizes.py SOURCE... [--minutes 2] [--sizes 2x128 3x192 4x256 5x320 6x384 8x512] [--set K=V ...]

The recipe that `tinylm new SOURCE --minutes M` proposes is trained as it is, and so is the one that it would write for each size of
the grid: regularization, evaluations and the end of training are those that suit the size. Held-out bits per byte of the best
checkpoint, and the proposal's over the best of all.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

from tinylm import pipeline
from tinylm.recipe import Recipe, loads
from tinylm.recipe.schema import DataSection
from tinylm.suggest import Budget, propose

QUIET = ["sampling.every=null", "checkpoint.every=1000000", "checkpoint.keep=0"]


def trained(text: str, settings: list[str]) -> tuple[Recipe, pipeline.TrainResult]:
    recipe = loads(text, [*QUIET, *settings])
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
    model = propose(data, budget).recipe.model
    chosen = f"{model.n_layer}x{model.n_embd}"
    found: dict[str, float] = {}
    for size in dict.fromkeys([chosen, *arguments.sizes]):
        layers, width = map(int, size.split("x"))
        recipe, result = trained(propose(data, budget, sizes=[(layers, width)]).yaml, arguments.settings)
        losses = result.val_bits_per_byte, result.val_loss, result.best_val_loss
        bits_per_byte, last, best = (loss or math.nan for loss in losses)
        found[size] = bits_per_byte * best / last
        about = f"{result.step:,} steps, {result.seconds / 60:.1f} minutes, dropout {recipe.model.dropout:g}"
        proposed = ", proposed" if size == chosen else ""
        print(f"{size:>7}: {found[size]:.4f} bits per byte ({about}{proposed})", flush=True)
    winner = min(found, key=lambda size: found[size])
    print(f"proposed {chosen} over best {winner}: {found[chosen] / found[winner]:.3f}")


if __name__ == "__main__":
    main()
