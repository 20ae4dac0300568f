"""Compare the speed of two revisions of tinylm, interleaving their training steps and samples.

    python benchmarks/revisions.py BEFORE [AFTER] [--preset modern] [--steps 60] [--samples 12] [--threads 2]

BEFORE and AFTER (default: HEAD) are git revisions. Each runs in its own process, from a copy of its files. The processes take
turns: one training step each, and later one batch of samples each. A change in the machine's speed therefore affects both alike.
The script prints each revision's median time, and the median ratio AFTER / BEFORE over all pairs of turns with its 95% confidence
interval.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKAGES = {"tinylm": "tinylm", "cli": "tinylm_cli", "recipes": "tinylm_recipes"}
RECIPE = """
data: {{train: "builtin:python-docs", heldout: {{share: 0.1}}}}
tokenizer: {{kind: bpe, vocab_size: 2048}}
model: {{preset: {preset}, n_layer: 4, n_head: 4, n_embd: 128, context_length: 256}}
training: {{steps: {steps}, global_batch_size: 8, micro_batch_size: 8, precision: fp32, compile: off, log_every: 1}}
evaluation: {{every: 1000000, max_tokens: 2000}}
checkpoint: {{every: 1000000, keep: 0}}
seed: 1
"""
UNCOUNTED = 5
"""Number of training steps at the start that are not timed."""


def take_turn(seconds: float) -> None:
    """Report how many seconds the last piece of work took, and wait for the next turn."""
    print(json.dumps(seconds), flush=True)
    sys.stdin.readline()


def work(arguments: argparse.Namespace) -> None:
    """Train and sample, one piece per turn. Uses only functions that both revisions have."""
    from tinylm import pipeline
    from tinylm.generation.engine import generate_batch
    from tinylm.generation.sampling import SamplingOptions
    from tinylm.recipe import loads
    from tinylm.run import Run
    from tinylm.training.metrics import Observer, StepEvent

    engine = sys.modules["tinylm.generation.engine"]

    class TakesTurns(Observer):
        start = 0.0

        def step(self, event: StepEvent) -> None:
            take_turn(time.perf_counter() - self.start)
            self.start = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        recipe = loads(RECIPE.format(preset=arguments.preset, steps=arguments.steps + UNCOUNTED))
        pipeline.train(recipe, Path(folder, "run"), device="cpu", threads=arguments.threads, observer=TakesTurns())
        run = Run(Path(folder, "run"))
        network, tokenizer = run.network(run.checkpoint("last"), "cpu"), run.tokenizer
        options = SamplingOptions(max_new_tokens=40)
        requests = [engine.Request(f"The {row}", options, row) for row in range(4)]
        for _ in range(arguments.samples + 1):
            start = time.perf_counter()
            list(generate_batch(network, tokenizer, requests))
            take_turn(time.perf_counter() - start)


def start_worker(folder: Path, revision: str) -> subprocess.Popen[str]:
    """Copy a revision to `folder` and start a worker process that imports it."""
    archive = subprocess.run(["git", "archive", revision, *PACKAGES], capture_output=True, check=True).stdout
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    for name, package in PACKAGES.items():
        if name != package:
            (folder / package).symlink_to(folder / name)
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_turn(worker: subprocess.Popen[str]) -> float:
    """Let a worker do one piece of work, and return how many seconds it took."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return float(json.loads(worker.stdout.readline()))


def report(name: str, before: list[float], after: list[float]) -> None:
    ratios = [new / old for old, new in zip(before, after, strict=True)]
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(2000))
    milliseconds = [1000 * statistics.median(values) for values in (before, after)]
    print(
        f"{name}: before {milliseconds[0]:.2f} ms, after {milliseconds[1]:.2f} ms, "
        f"after / before {statistics.median(ratios):.4f} (95% interval {medians[50]:.4f} to {medians[-51]:.4f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?", default="HEAD")
    parser.add_argument("--preset", default="modern")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        workers = [start_worker(Path(folder, name), getattr(arguments, name)) for name in ("before", "after")]
        for worker in workers:  # wait until the data is prepared, which is not timed
            assert worker.stdout is not None
            worker.stdout.readline()
        turns: list[list[float]] = [[], []]
        for turn in range(UNCOUNTED - 1 + arguments.steps + arguments.samples + 1):
            for side in (0, 1) if turn % 2 else (1, 0):
                turns[side].append(run_turn(workers[side]))
        for worker in workers:
            worker.communicate("\n")
    first, last = UNCOUNTED - 1, UNCOUNTED - 1 + arguments.steps
    report("training step", turns[0][first:last], turns[1][first:last])
    report("sampling", turns[0][last + 1 :], turns[1][last + 1 :])


if __name__ == "__main__":
    main()
