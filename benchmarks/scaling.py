"""How well does a scaling law predict a run with four times the compute of the largest run that it was fitted to?

    python benchmarks/scaling.py TEXT [TEXT...] [--minutes 60] [--set KEY=VALUE] [--out DIR]

For each text, this script runs `tinylm scale` for M minutes, trains the recipe that it writes, and prints the predicted and the
actual loss. Training the recipe takes about as long as all small runs. An interrupted benchmark continues where it stopped. A TEXT
is a file or, for example, `builtin:python-docs`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def tinylm(*arguments: str | Path) -> dict[str, Any]:
    """Run a tinylm command with `--json` and return its document."""
    command = [sys.executable, "-m", "tinylm", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def measure(text: str, minutes: str, settings: list[str], out: Path) -> None:
    folder = out / (re.sub(r"[^\w.-]+", "-", Path(text).stem if Path(text).exists() else text).strip("-") or "text")
    overrides = [part for setting in settings for part in ("--set", setting)]
    found = tinylm("scale", text, "--minutes", minutes, "--out", folder, *overrides)
    used = [row for row in found["rows"] if row["left_out"] is None]
    run = folder / "predicted"
    started = (run / "recipe.yaml").exists()
    tinylm("train", run if started else found["recipe"], *(["--resume"] if started else ["--out", run]))
    checked = tinylm("scale", "--check", run, "--out", folder)
    law, prediction = found["law"], found["prediction"]
    print(f"\n{text}: {minutes} minutes, {len(used)} of {len(found['rows'])} runs used, {found['unique_tokens']:,} training tokens")
    for name in ("E", "A", "alpha", "B", "beta"):
        low, high = law[f"{name}_ci95"]
        print(f"  {name:14} {law[name]:.4g}  ({low:.4g} to {high:.4g})")
    residuals = [abs(row["fitted_loss"] / row["val_loss"] - 1) for row in used]
    print(f"  fit            {max(residuals):.2%} largest error on the small runs")
    print(f"  model          {prediction['n_layer']} layers of width {prediction['n_embd']}, {prediction['tokens']:,} tokens")
    low, high = checked["predicted_loss_ci95"]
    inside = "inside" if checked["inside_interval"] else "outside"
    print(f"  predicted      {checked['predicted_loss']:.4f}  ({low:.4f} to {high:.4f})")
    print(f"  actual         {checked['val_loss']:.4f}, {inside} the interval")
    print(f"  relative error {checked['relative_error']:+.2%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--minutes", default="60", help="training time of the small runs for each text")
    parser.add_argument("--set", action="append", default=[], help="a recipe key to set for all runs; can be repeated")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    arguments = parser.parse_args()
    for text in arguments.texts:
        measure(text, arguments.minutes, arguments.set, arguments.out)


if __name__ == "__main__":
    main()
