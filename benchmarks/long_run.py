"""Measure the held-out loss of a recipe over training time on a CPU, `shakespeare-char-long` unless stated otherwise.

    python benchmarks/long_run.py tinyshakespeare.txt [--minutes 20] [--repeat 3] [--recipe shakespeare-char-long] [--set K=V ...]

Times start at the first training step and include compilation and evaluation. The loss is in nats per byte. In an ASCII text like
tinyshakespeare, this is the loss per character, also for a recipe with subword tokens. Every held-out character is scored once.
nanoGPT's best published loss on tinyshakespeare is 1.4697 (10.6M parameters, on an A100).
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

NANOGPT_LOSS = 1.4697


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--recipe", default="shakespeare-char-long")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    arguments = parser.parse_args()
    if not Path(arguments.source).exists():
        sys.exit(f"skipped: {arguments.source} does not exist; pass the path to tinyshakespeare.txt")
    best_losses = []
    for seed in range(1337, 1337 + arguments.repeat):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder, "run")
            settings = [
                f"data.train={arguments.source}",
                f"seed={seed}",
                f"training.minutes={arguments.minutes}",
                *arguments.settings,
            ]
            command = [sys.executable, "-m", "tinylm", "train", arguments.recipe, "--out", str(run), "--json", "--quiet"]
            for setting in settings:
                command += ["--set", setting]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        curve = [(line["seconds"] / 60, line["val_bits_per_byte"] * math.log(2)) for line in lines if line["kind"] == "eval"]
        reached_at = next((minutes for minutes, loss in curve if loss <= NANOGPT_LOSS), None)
        best_loss = min(loss for _, loss in curve)
        print(f"seed {seed}: held-out loss " + ", ".join(f"{loss:.4f} at {minutes:.1f} min" for minutes, loss in curve))
        reached = "not reached" if reached_at is None else f"reached after {reached_at:.1f} minutes"
        print(
            f"seed {seed}: best loss {best_loss:.4f} nats per byte, final loss {curve[-1][1]:.4f}; "
            f"{result['parameters']:,} parameters, {result['step']} steps, {result['seconds'] / 60:.1f} minutes; "
            f"nanoGPT's loss {NANOGPT_LOSS} {reached}",
            flush=True,
        )
        best_losses.append(best_loss)
    print(f"median of the seeds' best losses within {arguments.minutes:g} minutes: {statistics.median(best_losses):.4f}")


if __name__ == "__main__":
    main()
