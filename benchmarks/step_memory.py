"""Peak memory of a training step of ours against the same step in transformers, each in a process of its own.

    python benchmarks/step_memory.py [--checkpointing]

GPT-2 small: 12 layers, 12 heads, width 768, vocabulary 50 257, context 1024, micro-batch 4, float32, AdamW. What is compared
is the most memory the process held (its maximal resident set) over two steps, and that less what it held before the model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "context_length": 1024}
VOCABULARY, CONTEXT, BATCH = 50_257, 1024, 4


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(side: str) -> None:
    """In a child process: two steps, and a line of JSON."""
    import torch

    tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    if side == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        before = resident()
        network = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            network(tokens[:, :-1], labels=tokens[:, :-1]).loss.backward()
            optimizer.step()
    else:
        from tinylm.model.objective import CausalObjective
        from tinylm.model.transformer import Transformer
        from tinylm.optim import groups
        from tinylm.recipe.schema import AdamWOptimizer, ModelSection
        from tinylm.training.feed import GlobalBatch
        from tinylm.training.out_of_memory import keep_freed_memory
        from tinylm.training.precision import Precision
        from tinylm.training.step import accumulate

        before = resident()
        keep_freed_memory()
        ours = Transformer(ModelSection.model_validate({"preset": "gpt2", **SHAPE}), VOCABULARY)
        ours.recompute = side == "checkpointing"
        optimizers = groups.build(AdamWOptimizer(name="adamw"), ours, ours.stacked_matrices())
        objective, precision = CausalObjective(), Precision("fp32", torch.device("cpu"))
        batch = GlobalBatch(objective.example(tokens), BATCH * CONTEXT)

        def step() -> None:
            optimizers.zero_grad()
            accumulate(ours, objective, batch, BATCH, precision, precision.scaler())
            optimizers.step()

    step()
    start = time.perf_counter()
    step()
    print(json.dumps({"peak": resident(), "before": before, "seconds": time.perf_counter() - start}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpointing", action="store_true", help="ours with activation checkpointing as well")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        measure(arguments.side)
        return
    results = {}
    for side in ("transformers", "tinylm", *(("checkpointing",) if arguments.checkpointing else ())):
        command = [sys.executable, __file__, "--side", side]
        results[side] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        peak, net = results[side]["peak"], results[side]["peak"] - results[side]["before"]
        base = results["transformers"]
        print(
            f"{side:14} peak {peak / 2**30:6.2f} GiB ({peak / base['peak']:4.0%} of transformers)   "
            f"for the step {net / 2**30:6.2f} GiB ({net / (base['peak'] - base['before']):4.0%})   "
            f"second step {results[side]['seconds']:5.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
