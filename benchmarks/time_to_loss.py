"""Compare how quickly a recipe of tinylm and nanoGPT's recipe reach nanoGPT's loss on the same CPU cores.

    python benchmarks/time_to_loss.py SOURCE [--target 1.88] [--repeat 3] [--recipe shakespeare-char]

SOURCE is tinyshakespeare.txt, another text of about a megabyte, or builtin:python-docs. The loss is in nats per character over all
held-out characters (the last tenth of the text), each scored once. For a recipe with subword tokens, like shakespeare-bpe, the loss
per token is converted to a loss per character. Times count only training steps, not evaluation. For each seed, the script trains
three times:

1. The baseline: the unchanged `nanogpt-char` recipe (2000 steps), evaluated every 250 steps. This measures its final loss, its
   training time, and its time to the target loss. Without --target, the target is the baseline's final loss.
2. tinylm's recipe for 200 steps with a constant learning rate, evaluated every 10 steps. This measures the speedup to the target
   loss.
3. tinylm's recipe for the training time of the baseline. This measures the loss after the same training time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def train(recipe: str, folder: Path, *settings: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train a recipe, and return the output of `tinylm train --json` and the evaluations logged during training."""
    command = [sys.executable, "-m", "tinylm", "train", recipe, "--out", str(folder), "--json", "--quiet"]
    for setting in ("checkpoint.every=100000", "checkpoint.keep=0", *settings):
        command += ["--set", setting]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return result, [line for line in lines if line["kind"] == "eval"]


def per_byte(evaluation: dict[str, Any]) -> float:
    """Return the loss in nats per byte."""
    nats: float = evaluation["val_bits_per_byte"] * math.log(2)
    return nats


def seconds_to_target(evaluations: list[dict[str, Any]], target: float) -> float | None:
    """Return the training time at the first evaluation with at most `target` nats per byte."""
    return next((line["train_seconds"] for line in evaluations if per_byte(line) <= target), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--target", type=float)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=1337)
    parser.add_argument("--recipe", default="shakespeare-char")
    arguments = parser.parse_args()
    if not arguments.source.startswith("builtin:") and not Path(arguments.source).exists():
        sys.exit(f"skipped: {arguments.source} does not exist; pass the path to tinyshakespeare.txt")
    source = f"data.train={arguments.source}"
    speedups, same_time_losses = [], []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.repeat):
        with tempfile.TemporaryDirectory() as folder:
            baseline, evaluations = train("nanogpt-char", Path(folder, "baseline"), source, f"seed={seed}", "evaluation.every=250")
            target = arguments.target or baseline["val_loss"]
            bytes_per_character = evaluations[-1]["val_loss"] / per_byte(evaluations[-1])
            baseline_seconds = seconds_to_target(evaluations, target / bytes_per_character)
            minutes = baseline["train_seconds"] / 60
            short = (source, f"seed={seed}", "training.steps=200", "evaluation.every=10", "training.schedule=constant")
            _, evaluations = train(arguments.recipe, Path(folder, "short"), *short)
            recipe_seconds = seconds_to_target(evaluations, target / bytes_per_character)
            same_time = (source, f"seed={seed}", "training.steps=null", f"training.minutes={minutes}", "evaluation.every=100000")
            long, evaluations = train(arguments.recipe, Path(folder, "long"), *same_time)
            long_loss = per_byte(evaluations[-1]) * bytes_per_character
        baseline_time, recipe_time = (
            "not reached" if seconds is None else f"after {seconds:.1f} s" for seconds in (baseline_seconds, recipe_seconds)
        )
        print(
            f"seed {seed}: nanogpt-char: loss {baseline['val_loss']:.4f} after {baseline['train_seconds']:.1f} s, "
            f"target {target:.2f} {baseline_time}; "
            f"{arguments.recipe}: target {target:.2f} {recipe_time}, "
            f"loss {long_loss:.4f} after {long['train_seconds']:.1f} s ({long['step']} steps)",
            flush=True,
        )
        if recipe_seconds is not None:
            speedups.append((baseline_seconds if baseline_seconds is not None else baseline["train_seconds"]) / recipe_seconds)
        same_time_losses.append(long_loss)
    if speedups:
        lower_bound = " (a lower bound if the baseline did not reach the target)" if arguments.target else ""
        print(f"speedup to the target loss: median {statistics.median(speedups):.1f}{lower_bound}")
    print(f"loss after the baseline's training time: median {statistics.median(same_time_losses):.4f}")


if __name__ == "__main__":
    main()
