"""Whether `tinylm new` chooses the right size: its recipe against a grid of other sizes with the same budget of minutes.

    python benchmarks/sizes.py SOURCE... [--minutes 2] [--sizes 2x128 3x192 4x256 5x320 6x384 8x512] [--set K=V ...]

The recipe that `tinylm new SOURCE --minutes M` proposes is trained as it is, and once for each size of the grid with nothing else
changed. Held-out bits per byte, and the proposal's over the best of all.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tinylm import pipeline
from tinylm.proposal import Budget, propose
from tinylm.recipe import Recipe, loads
from tinylm.recipe.schema import DataSection

QUIET = ["sampling.every=null", "checkpoint.every=1000000", "checkpoint.keep=0"]


def trained(text: str, settings: list[str]) -> tuple[Recipe, float, int]:
    """The recipe, held-out bits per byte, steps."""
    recipe = loads(text, [*QUIET, *settings])
    with tempfile.TemporaryDirectory() as folder:
        result = pipeline.train(recipe, Path(folder, "run"), device="cpu")
    assert result.val_bits_per_byte is not None
    return recipe, result.val_bits_per_byte, result.step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="+")
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--sizes", nargs="+", default=["2x128", "3x192", "4x256", "5x320", "6x384", "8x512"])
    parser.add_argument("--set", action="append", default=[], dest="settings")
    arguments = parser.parse_args()
    proposal = propose(DataSection(train=tuple(arguments.source)), Budget(arguments.minutes))
    found: dict[str, float] = {}
    chosen = f"{proposal.recipe.model.n_layer}x{proposal.recipe.model.n_embd}"
    for size in dict.fromkeys([chosen, *arguments.sizes]):
        layers, width = map(int, size.split("x"))
        shape = [f"model.n_layer={layers}", f"model.n_head={max(1, width // 64)}", f"model.n_embd={width}"]
        recipe, found[size], steps = trained(proposal.yaml, [*shape, *arguments.settings])
        about = f"dropout {recipe.model.dropout:g}" + (", proposed" if size == chosen else "")
        print(f"{size:>7}: {found[size]:.4f} bits per byte after {steps:,} steps ({about})", flush=True)
    best = min(found, key=lambda size: found[size])
    print(f"proposed {chosen} over best {best}: {found[chosen] / found[best]:.3f}")


if __name__ == "__main__":
    main()
