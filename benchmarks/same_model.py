"""Is the model always the same? One recipe trained in many fresh processes; how many different weights come out.

    python benchmarks/same_model.py --runs 60
    python benchmarks/same_model.py --runs 10 --busy --set training.steps=40

`--busy` keeps the cores occupied by another process meanwhile. Exits with 1 where the weights differ.
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
MULTIPLY = "import torch; a = torch.rand(1500, 1500)\nwhile True: a @ a"


def weights_of(recipe: str, overrides: list[str], threads: int, out: Path) -> str:
    """Train it, and the fingerprint of its last weights."""
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
    found: Counter[str] = Counter()
    beside = subprocess.Popen([sys.executable, "-c", MULTIPLY]) if arguments.busy else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number in range(arguments.runs):
                fingerprint = weights_of(
                    arguments.recipe, SHORT + arguments.overrides, arguments.threads, Path(folder, str(number))
                )
                found[fingerprint] += 1
                print(f"{number + 1:4}  {fingerprint}", flush=True)
    finally:
        if beside is not None:
            beside.kill()
    print(f"{arguments.runs} trainings, {len(found)} different weights: {', '.join(map(str, found.values()))}")
    return 0 if len(found) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
