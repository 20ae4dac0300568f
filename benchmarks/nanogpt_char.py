"""nanoGPT's CPU recipe, re-created, and our default against it: held-out loss over all held-out characters, and seconds.

    python benchmarks/nanogpt_char.py PATH/TO/tinyshakespeare.txt [--steps 2000] [--repeat 1]

Each repetition trains both sides in turn: `nanogpt-char` as it is, then the same model size and number of steps with
`preset: modern` and Muon. The published figure for the baseline is 1.874 nats per character.
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

PUBLISHED = 1.874
OURS = (
    "model.preset=modern",
    "training.optimizer={name: muon}",
    "training.schedule={name: wsd}",
)


def train(text: Path, folder: Path, steps: int, seed: int, overrides: tuple[str, ...]) -> dict[str, Any]:
    settings = [
        f"data.train={text}",
        f"training.steps={steps}",
        "evaluation.every=100000",
        "checkpoint.every=100000",
        f"seed={seed}",
        *overrides,
    ]
    command = [sys.executable, "-m", "tinylm", "train", "nanogpt-char", "--out", str(folder), "--json", "--quiet"]
    for setting in settings:
        command += ["--set", setting]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    if not arguments.text.exists():
        sys.exit(f"skipped: {arguments.text} is not here; name a copy of tinyshakespeare")
    ratios = []
    for repetition in range(arguments.repeat):
        with tempfile.TemporaryDirectory() as folder:
            seed = 1337 + repetition
            baseline = train(arguments.text, Path(folder, "baseline"), arguments.steps, seed, ())
            ours = train(arguments.text, Path(folder, "ours"), arguments.steps, seed, OURS)
        ratios.append(ours["train_seconds"] / baseline["train_seconds"])
        for name, result in (("nanogpt-char", baseline), ("modern + muon", ours)):
            print(
                f"seed {seed}  {name:14} held-out {result['val_loss']:.4f} nats/char "
                f"({result['val_loss'] - PUBLISHED:+.4f} from {PUBLISHED}), "
                f"{result['train_seconds']:.1f} s of stepping, {1000 * result['train_seconds'] / result['step']:.1f} ms a step, "
                f"{result['seconds']:.1f} s in all",
                flush=True,
            )
    print(f"seconds of stepping, ours / baseline: median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
