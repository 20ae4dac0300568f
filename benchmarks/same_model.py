"""Check that training is deterministic: train a recipe in many processes and count the distinct final models.

    python benchmarks/same_model.py --runs 60
    python benchmarks/same_model.py --runs 10 --busy --set training.steps=40

With `--busy`, another process computes matrix products at the same time. The exit status is 1 if any weights differ.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

SHORT = [
    *("training.steps=8", "training.precision=fp32", "training.compile=off", "training.micro_batch_size=8"),
    *("evaluation.every=1000000", "checkpoint.every=1000000", "sampling.every=null", "data.heldout.share=0.01"),
]
CPU_LOAD = "import torch; a = torch.rand(1500, 1500)\nwhile True: a @ a"


def weights_fingerprint(recipe: str, overrides: list[str], threads: int, out: Path) -> str:
    """Train the recipe and return a hash of its final weights."""
    settings = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "tinylm", "train", recipe, "--out", str(out), "--quiet", "--threads", str(threads)]
    subprocess.run([*command, *settings], check=True, stdout=subprocess.DEVNULL)
    (weights,) = out.glob("checkpoints/step-*/model.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:12]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    fingerprints: Counter[str] = Counter()
    load = subprocess.Popen([sys.executable, "-c", CPU_LOAD]) if arguments.busy else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number in range(arguments.runs):
                fingerprint = weights_fingerprint(
                    arguments.recipe, SHORT + arguments.overrides, arguments.threads, Path(folder, str(number))
                )
                fingerprints[fingerprint] += 1
                print(f"{number + 1:4}  {fingerprint}", flush=True)
    finally:
        if load is not None:
            load.kill()
    counts = ", ".join(map(str, fingerprints.values()))
    print(f"{arguments.runs} runs, {len(fingerprints)} distinct models (number of runs for each: {counts})")
    return 0 if len(fingerprints) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
