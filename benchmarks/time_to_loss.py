"""Seconds of stepping to nanoGPT's loss: our recipe for characters against nanoGPT's, in turn on the same cores.

    python benchmarks/time_to_loss.py SOURCE [--target 1.88] [--repeat 3] [--recipe shakespeare-char]

SOURCE is tinyshakespeare.txt, or any text of a megabyte, or builtin:python-docs. Held-out loss in nats per character over all
held-out characters (the last tenth), each scored once. Three things are measured for each seed:

1. the baseline, `nanogpt-char` as it ships (2000 steps), measured every 250 steps: its last loss, its seconds of stepping, and
   the first of them at which it was at most the target. Without --target, the target is the baseline's own last loss;
2. ours, for 200 steps at a constant rate, measured every 10: the ratio of the seconds to the target;
3. ours trained for the baseline's whole seconds of stepping: its last loss.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def train(recipe: str, folder: Path, *settings: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result of `tinylm train --json`, and the evaluations on the way."""
    command = [sys.executable, "-m", "tinylm", "train", recipe, "--out", str(folder), "--json", "--quiet"]
    for setting in ("checkpoint.every=100000", "checkpoint.keep=0", *settings):
        command += ["--set", setting]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return result, [line for line in lines if line["kind"] == "eval"]


def first_at_most(evaluations: list[dict[str, Any]], target: float) -> float | None:
    return next((line["train_seconds"] for line in evaluations if line["val_loss"] <= target), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--target", type=float)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=1337)
    parser.add_argument("--recipe", default="shakespeare-char")
    arguments = parser.parse_args()
    if not arguments.source.startswith("builtin:") and not Path(arguments.source).exists():
        sys.exit(f"skipped: {arguments.source} is not here; name a copy of tinyshakespeare")
    source = f"data.train={arguments.source}"
    ratios, same_time = [], []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.repeat):
        with tempfile.TemporaryDirectory() as folder:
            baseline, way = train("nanogpt-char", Path(folder, "baseline"), source, f"seed={seed}", "evaluation.every=250")
            target = arguments.target or baseline["val_loss"]
            theirs = first_at_most(way, target)
            minutes = baseline["train_seconds"] / 60
            short = (source, f"seed={seed}", "training.steps=200", "evaluation.every=10", "training.schedule=constant")
            _, way = train(arguments.recipe, Path(folder, "short"), *short)
            ours = first_at_most(way, target)
            whole = (source, f"seed={seed}", "training.steps=null", f"training.minutes={minutes}", "evaluation.every=100000")
            long, _ = train(arguments.recipe, Path(folder, "long"), *whole)
        reached = "never" if theirs is None else f"{theirs:.1f} s"
        print(
            f"seed {seed}: nanogpt-char {baseline['val_loss']:.4f} in {baseline['train_seconds']:.1f} s; {target:.2f}: {reached}, "
            f"{arguments.recipe} {'never' if ours is None else f'{ours:.1f} s'}, "
            f"{long['val_loss']:.4f} after {long['train_seconds']:.1f} s ({long['step']} steps)",
            flush=True,
        )
        if ours is not None:
            ratios.append((theirs if theirs is not None else baseline["train_seconds"]) / ours)
        same_time.append(long["val_loss"])
    if ratios:
        at_least = "at least, where the baseline never got there" if arguments.target else ""
        print(f"times faster to the target: median {statistics.median(ratios):.1f} {at_least}")
    print(f"loss at the baseline's seconds of stepping: median {statistics.median(same_time):.4f}")


if __name__ == "__main__":
    main()
