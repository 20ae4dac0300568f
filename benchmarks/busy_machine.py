"""Measure training speed alongside other busy processes, with different wait policies for idle OpenMP threads.

    python benchmarks/busy_machine.py [--rounds 5] [--seconds 3] [--precision fp32] [--settings torch tinylm one-thread]

Each measurement trains a small model (3 layers, width 192, vocabulary 4096, context 256, batch 8, AdamW) in a new process, because
the OpenMP runtime reads its environment only once. For each number of busy processes (zero, one, and one per core), the settings
are measured in turn. `torch` is torch's default and `tinylm` is `tinylm.wait_policy`. The script prints each setting's median
tokens/s and its ratio to the first setting on the idle machine. The load average of each round, on stderr, shows whether the
machine was otherwise idle.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from tinylm.recipe.values import ComputeDtype
from tinylm.wait_policy import VARIABLES

VOCABULARY, CONTEXT, BATCH = 4096, 256, 8
SHAPE = {"preset": "modern", "n_layer": 3, "n_head": 3, "n_embd": 192, "context_length": CONTEXT}
SETTINGS: dict[str, dict[str, str]] = {
    "torch": {},
    "tinylm": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spin-1000": {"GOMP_SPINCOUNT": "1000"},
    "spin-10000": {"GOMP_SPINCOUNT": "10000"},
    "one-thread": {"OMP_NUM_THREADS": "1"},
}
"""Environment variables for each setting."""


def measure(setting: str, seconds: float, precision_name: ComputeDtype) -> float:
    """Train for two warm-up steps, then for at least three steps and `seconds`. Return the throughput in tokens/s, excluding the
    warm-up."""
    import torch

    from tinylm.data.datasets import TokenStream
    from tinylm.device import set_threads
    from tinylm.model.transformer import Transformer
    from tinylm.optim import groups
    from tinylm.recipe.schema import AdamWOptimizer, DecoderSection
    from tinylm.training.feed import Feed
    from tinylm.training.objectives import CausalLM
    from tinylm.training.out_of_memory import keep_freed_memory
    from tinylm.training.precision import Precision
    from tinylm.training.step import GradientSettings, accumulate

    keep_freed_memory()
    if setting == "tinylm":
        set_threads(None)
    tokens = torch.randint(VOCABULARY, (100_000,), generator=torch.Generator().manual_seed(0)).numpy()
    network = Transformer(DecoderSection.model_validate(SHAPE), VOCABULARY)
    optimizers, objective = groups.build(AdamWOptimizer(name="adamw"), network), CausalLM()
    settings = GradientSettings(BATCH, Precision(precision_name, torch.device("cpu")), objective)
    steps, start = -2, 0.0
    with Feed(TokenStream(tokens, CONTEXT, seed=0), objective, seed=0) as feed:
        while steps < 3 or time.perf_counter() - start < seconds:
            if steps == 0:
                start = time.perf_counter()
            optimizers.zero_grad()
            accumulate(network, feed.batch(0, BATCH), settings)
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizers.step()
            steps += 1
    return steps * BATCH * CONTEXT / (time.perf_counter() - start)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run `count` busy processes until the context exits."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument(
        "--busy", nargs="+", type=int, default=[0, 1, os.cpu_count() or 1], help="numbers of busy processes to measure with"
    )
    parser.add_argument("--measure", choices=list(SETTINGS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(options.measure, options.seconds, options.precision))
        return
    speeds: dict[tuple[str, int], list[float]] = defaultdict(list)
    command = [sys.executable, __file__, "--seconds", str(options.seconds), "--precision", options.precision, "--measure"]
    environment = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "OMP_NUM_THREADS")}
    for _ in range(options.rounds):
        for count in options.busy:
            for name in options.settings:
                with busy_processes(count):
                    done = subprocess.run(
                        [*command, name], env=environment | SETTINGS[name], stdout=subprocess.PIPE, text=True, check=True
                    )
                speeds[name, count].append(float(done.stdout))
        print(f"load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
    baseline = statistics.median(speeds[options.settings[0], options.busy[0]])
    print(f"tokens/s in {options.precision} (ratio to {options.settings[0]} with {options.busy[0]} busy processes)")
    for name in options.settings:
        medians = [statistics.median(speeds[name, count]) for count in options.busy]
        cells = [
            f"{count} busy {median:7,.0f} ({median / baseline:.2f})" for count, median in zip(options.busy, medians, strict=True)
        ]
        print(f"{name:11}  {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
