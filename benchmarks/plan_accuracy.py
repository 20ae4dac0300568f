"""What `tinylm plan` foretells against what a training on this CPU then takes: memory, seconds of a step, seconds of measuring.

    python benchmarks/plan_accuracy.py [--steps 5] [--precision auto|fp32|bf16]

Three recipes, each in a process of its own, on random tokens (a step costs the same on every text) and without compiling: the
precision and the micro-batch are the plan's. Memory is how much the process's resident set grew, at its highest over the steps and
one evaluation, over what it was just before the model was built; a tiny model has been trained and measured before that, so that
what libraries load and keep is not counted. What the allocator keeps between tensors is. Seconds of a step are the median after the
first two. The plan measures the machine before the process starts: on a busy one both sides are wrong in their own way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tinylm.cost.memory import HOLES
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
"""Recipe and vocabulary, those of builtin:python-docs."""


def recipe_of(name: str, settings: list[str]) -> Recipe:
    settings = ["training.compile=off", *settings]
    if name.startswith("gpt2"):
        return loads(GPT2, settings)
    return load(RECIPES / f"{name}.yaml", ["data.train=builtin:python-docs", *settings])


def resident() -> tuple[int, int]:
    """Bytes of the resident set: now, and the most since `forget_the_highest`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, most = (int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return now, most


def forget_the_highest() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def serve(name: str, settings: list[str], micro: int, steps: int) -> None:
    """In a process of its own: train, measure, and print a line of JSON. `settings` name the precision."""
    import numpy as np
    import torch

    from tinylm.data.batches import Batches
    from tinylm.data.shards import Counts, Shard
    from tinylm.evaluation.perplexity import evaluate
    from tinylm.model.objective import CausalObjective
    from tinylm.model.transformer import Transformer
    from tinylm.optim import groups
    from tinylm.training.feed import Feed
    from tinylm.training.out_of_memory import keep_freed_memory
    from tinylm.training.precision import Precision
    from tinylm.training.step import accumulate

    keep_freed_memory()

    def train(recipe: Recipe, vocab_size: int, micro: int, steps: int) -> tuple[list[float], int, float]:
        generator = np.random.default_rng(0)
        tokens = generator.integers(1, vocab_size, TRAIN_TOKENS)
        heldout = np.concatenate([[0], tokens[:HELDOUT_TOKENS], [0]])  # one document between ends of text
        shard = Shard(heldout, Counts(1, HELDOUT_TOKENS, HELDOUT_TOKENS, HELDOUT_TOKENS, 0), end_of_text=0)
        size, device = recipe.training.global_batch_size, torch.device("cpu")
        precision, objective = Precision(recipe.training.precision, device), CausalObjective()
        network = Transformer(recipe.model, vocab_size)
        network.recompute = recipe.training.activation_checkpointing
        optimizers = groups.build(recipe.training.optimizer, network, network.stacked_matrices())
        network.train()
        seconds = []
        with Feed(Batches(tokens, recipe.model.context_length, seed=0), objective, pin=False) as feed:
            for step in range(steps):
                start = time.perf_counter()
                optimizers.zero_grad()
                accumulate(network, objective, feed.take(step * size, size), micro, precision, precision.scaler())
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizers.step()
                seconds.append(time.perf_counter() - start)
        stepping = resident()[1]
        start = time.perf_counter()
        lengths = np.ones(vocab_size, dtype=np.int64)
        evaluate(network, shard, lengths, context=recipe.model.context_length, stride=recipe.evaluation.stride, device=device)
        return seconds, stepping, time.perf_counter() - start

    tiny = ["model.n_layer=1", "model.n_embd=32", "model.n_head=2", "model.context_length=16", "training.global_batch_size=2"]
    small = recipe_of(name, [*settings, *tiny, "evaluation.stride=null", *(["model.ngram_rows=16"] if "char" in name else [])])
    train(small, 16, 1, 2)
    forget_the_highest()
    before = resident()[0]
    seconds, stepping, measuring = train(recipe_of(name, settings), CASES[name], micro, steps)
    highest = resident()[1]
    print(json.dumps({"seconds": seconds, "stepping": stepping - before, "highest": highest - before, "measuring": measuring}))


def predict(name: str, settings: list[str]) -> Plan:
    return make_plan(recipe_of(name, settings), CASES[name], TRAIN_TOKENS, heldout_tokens=HELDOUT_TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--serve", nargs=2, metavar=("RECIPE", "MICRO"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = [f"training.precision={arguments.precision}"]
    if arguments.serve:
        serve(arguments.serve[0], settings, int(arguments.serve[1]), arguments.steps)
        return
    print(f"{'recipe':17} {'in':5} {'what':22} {'predicted':>10} {'measured':>10} {'error':>6}")
    for name in CASES:
        planned = predict(name, settings)
        command = [sys.executable, __file__, "--precision", planned.precision, "--steps", str(arguments.steps)]
        command += ["--serve", name, str(planned.micro_batch_size)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found = json.loads(answer.splitlines()[-1])
        memory = planned.memory_bytes
        step = max(memory.activations, memory.gradients + memory.update)  # one micro-batch a step in all three
        step = memory.weights + memory.optimizer + int(HOLES * step)
        evaluations = -(-planned.steps // recipe_of(name, settings).evaluation.every)
        rows = (
            ("memory of steps, MiB", step / 2**20, found["stepping"] / 2**20),
            ("memory in all, MiB", (memory.total - memory.saving) / 2**20, found["highest"] / 2**20),
            ("a step, ms", 1000 * planned.seconds_per_step, 1000 * statistics.median(found["seconds"][2:] or found["seconds"])),
            ("an evaluation, s", planned.evaluation_seconds / evaluations, found["measuring"]),
        )
        for what, predicted, measured in rows:
            error = predicted / measured - 1
            print(f"{name:17} {planned.precision:5} {what:22} {predicted:10.1f} {measured:10.1f} {error:+6.0%}", flush=True)


if __name__ == "__main__":
    main()
