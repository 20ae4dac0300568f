"""Compare the peak memory of a training step in tinylm and in transformers, each in a separate process.

    python benchmarks/step_memory.py [--checkpointing]

The model is GPT-2 small: 12 layers, 12 heads, width 768, a vocabulary of 50,257 tokens and a context of 1024. It is trained with
AdamW in float32, with micro-batches of 4 sequences. The script prints each process's maximum resident set size over two steps, and
the growth since just before the model was built.
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


def peak_rss() -> int:
    """Return the maximum resident set size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_worker(variant: str) -> None:
    """Run two training steps in this process, and print the measurements as one line of JSON."""
    import torch

    tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    if variant == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        before = peak_rss()
        network = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            network(tokens[:, :-1], labels=tokens[:, :-1]).loss.backward()
            optimizer.step()
    else:
        from tinylm.model.transformer import Transformer
        from tinylm.optim import groups
        from tinylm.recipe.schema import AdamWOptimizer, DecoderSection
        from tinylm.training.feed import LocalBatch
        from tinylm.training.objectives import CausalLM
        from tinylm.training.out_of_memory import keep_freed_memory
        from tinylm.training.precision import Precision
        from tinylm.training.step import GradientSettings, accumulate

        before = peak_rss()
        keep_freed_memory()
        transformer = Transformer(DecoderSection.model_validate({"preset": "gpt2", **SHAPE}), VOCABULARY)
        transformer.recompute = variant == "checkpointing"
        optimizers = groups.build(AdamWOptimizer(name="adamw"), transformer)
        objective, precision = CausalLM(), Precision("fp32", torch.device("cpu"))
        batch = LocalBatch.whole(objective.batch({"tokens": tokens.numpy()}, 0, 0))

        def step() -> None:
            optimizers.zero_grad()
            accumulate(transformer, batch, GradientSettings(BATCH, precision, objective))
            optimizers.step()

    step()
    start = time.perf_counter()
    step()
    print(json.dumps({"peak": peak_rss(), "before": before, "seconds": time.perf_counter() - start}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpointing", action="store_true", help="also measure tinylm with activation checkpointing")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        run_worker(arguments.variant)
        return
    results = {}
    for variant in ("transformers", "tinylm", *(("checkpointing",) if arguments.checkpointing else ())):
        command = [sys.executable, __file__, "--variant", variant]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result = results[variant] = json.loads(output.splitlines()[-1])
        peak, growth = result["peak"], result["peak"] - result["before"]
        base = results["transformers"]
        print(
            f"{variant:14} peak {peak / 2**30:6.2f} GiB ({peak / base['peak']:4.0%} of transformers' peak)   "
            f"growth {growth / 2**30:6.2f} GiB ({growth / (base['peak'] - base['before']):4.0%} of transformers' growth)   "
            f"second step {result['seconds']:5.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
