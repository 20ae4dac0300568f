"""Compare the predictions of `tinylm plan` with actual training on this CPU: memory, step time, evaluation time.

    python benchmarks/plan_accuracy.py [--steps 5] [--precision auto|fp32|bf16]

The script trains three recipes in separate processes, on random tokens (the cost of a step does not depend on the text), without
compilation, and with the precision and micro-batch size from the plan. The error is predicted / measured - 1.

Memory is the growth of the resident set, from just before the model is built to its maximum over the steps and one evaluation. It
includes memory that the allocator keeps. A tiny model is trained and evaluated first, so one-time library allocations are not
counted. The step time is the median, excluding the first two steps. `make_plan` benchmarks the machine before each training process
starts; on a busy machine, neither prediction nor measurement is reliable.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tinylm.cost.memory import FRAGMENTATION
from tinylm.cost.plan import Plan, make_plan
from tinylm.recipe import Recipe, loads
from tinylm.recipe.loader import load

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
TRAIN_TOKENS, HELDOUT_TOKENS = 200_000, 20_000
GPT2 = """
data: {train: "builtin:python-docs"}
tokenizer: {kind: bpe, vocab_size: 8192}
model: {preset: gpt2, n_layer: 6, n_head: 6, n_embd: 384, context_length: 256}
training: {steps: 100, global_batch_size: 8, optimizer: adamw}
"""
CASES = {"quickstart": 4096, "shakespeare-char": 113, "gpt2, 13.9M": 8192}
"""Vocabulary size of each recipe on builtin:python-docs."""


def make_recipe(name: str, settings: list[str]) -> Recipe:
    settings = ["training.compile=off", *settings]
    if name.startswith("gpt2"):
        return loads(GPT2, settings)
    return load(RECIPES / f"{name}.yaml", ["data.train=builtin:python-docs", *settings])


def current_and_peak_rss() -> tuple[int, int]:
    """Return the current resident set size, and its maximum since `reset_peak`, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return now, peak


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # see proc(5)


def run_worker(name: str, settings: list[str], micro: int, steps: int) -> None:
    """Train and evaluate in this process, and print the measurements as one line of JSON."""
    import numpy as np
    import torch

    from tinylm.data.datasets import TokenStream
    from tinylm.data.shards import Counts, Shard
    from tinylm.evaluation.perplexity import EvaluationOptions, evaluate
    from tinylm.model.transformer import Transformer
    from tinylm.optim import groups
    from tinylm.training.feed import Feed
    from tinylm.training.objectives import CausalLM
    from tinylm.training.out_of_memory import keep_freed_memory
    from tinylm.training.precision import Precision
    from tinylm.training.step import GradientSettings, accumulate

    keep_freed_memory()

    def train(recipe: Recipe, vocab_size: int, micro: int, steps: int) -> tuple[list[float], int, float]:
        generator = np.random.default_rng(0)
        tokens = generator.integers(1, vocab_size, TRAIN_TOKENS)
        heldout = np.concatenate([[0], tokens[:HELDOUT_TOKENS], [0]])  # one document between end-of-text tokens
        shard = Shard(heldout, Counts(1, HELDOUT_TOKENS, HELDOUT_TOKENS, HELDOUT_TOKENS, 0), end_of_text=0)
        size, device = recipe.training.global_batch_size, torch.device("cpu")
        precision, objective = Precision(recipe.training.precision, device), CausalLM()
        network = Transformer(recipe.model, vocab_size)
        network.recompute = recipe.training.activation_checkpointing
        optimizers = groups.build(recipe.training.optimizer, network)
        network.train()
        settings, seconds = GradientSettings(micro, precision, objective), []
        with Feed(TokenStream(tokens, recipe.model.context_length, seed=0), objective, seed=0) as feed:
            for step in range(steps):
                start = time.perf_counter()
                optimizers.zero_grad()
                accumulate(network, feed.batch(step * size, size), settings)
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizers.step()
                seconds.append(time.perf_counter() - start)
        step_peak = current_and_peak_rss()[1]
        start = time.perf_counter()
        lengths = np.ones(vocab_size, dtype=np.int64)
        evaluate(network, shard, lengths, EvaluationOptions(stride=recipe.evaluation.stride))
        return seconds, step_peak, time.perf_counter() - start

    tiny = ["model.n_layer=1", "model.n_embd=32", "model.n_head=2", "model.context_length=16", "training.global_batch_size=2"]
    if "char" in name:
        tiny.append("model.ngram_rows=16")
    tiny_recipe = make_recipe(name, [*settings, *tiny, "evaluation.stride=null"])
    train(tiny_recipe, 16, 1, 2)
    reset_peak()
    before = current_and_peak_rss()[0]
    seconds, step_peak, evaluation_seconds = train(make_recipe(name, settings), CASES[name], micro, steps)
    peak = current_and_peak_rss()[1]
    memory = {"step_memory": step_peak - before, "total_memory": peak - before}
    print(json.dumps({"seconds": seconds, **memory, "evaluation_seconds": evaluation_seconds}))


def predict(name: str, settings: list[str]) -> Plan:
    return make_plan(make_recipe(name, settings), CASES[name], TRAIN_TOKENS, heldout_tokens=HELDOUT_TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--worker", nargs=2, metavar=("RECIPE", "MICRO"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = [f"training.precision={arguments.precision}"]
    if arguments.worker:
        run_worker(arguments.worker[0], settings, int(arguments.worker[1]), arguments.steps)
        return
    print(f"{'recipe':17} {'dtype':5} {'quantity':22} {'predicted':>10} {'measured':>10} {'error':>6}")
    for name in CASES:
        plan = predict(name, settings)
        command = [sys.executable, __file__, "--precision", plan.precision, "--steps", str(arguments.steps)]
        command += ["--worker", name, str(plan.micro_batch_size)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        actual = json.loads(output.splitlines()[-1])
        memory = plan.memory_bytes
        step = max(memory.activations, memory.gradients + memory.update)  # all three recipes have one micro-batch per step
        step = memory.weights + memory.optimizer + int(FRAGMENTATION * step)
        evaluations = -(-plan.steps // make_recipe(name, settings).evaluation.every)
        rows = (
            ("step memory, MiB", step / 2**20, actual["step_memory"] / 2**20),
            ("total memory, MiB", (memory.total - memory.saving) / 2**20, actual["total_memory"] / 2**20),
            ("step time, ms", 1000 * plan.seconds_per_step, 1000 * statistics.median(actual["seconds"][2:] or actual["seconds"])),
            ("evaluation time, s", plan.evaluation_seconds / evaluations, actual["evaluation_seconds"]),
        )
        for quantity, predicted, measured in rows:
            error = predicted / measured - 1
            print(f"{name:17} {plan.precision:5} {quantity:22} {predicted:10.1f} {measured:10.1f} {error:+6.0%}", flush=True)


if __name__ == "__main__":
    main()
