"""Compare the speed of sliding-window perplexity evaluation in tinylm and in a plain loop around transformers' GPT-2.

    python benchmarks/evaluating.py [--rounds 3] [--tokens 20000]

The model has 13.8M parameters and a context of 256 tokens, the stride is half the context, and the text is one document of random
tokens. Both implementations have the same weights, use batches of 8192 tokens, and run in turn on the same cores. The loop is a
batched version of the one in transformers' perplexity guide. It masks the targets that an earlier window has scored.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from sampling import add_noise, to_transformers
from transformers import GPT2LMHeadModel
from transformers.utils import logging

from tinylm.cost.memory import EVALUATION_BATCH_TOKENS
from tinylm.data.shards import Counts, Shard
from tinylm.evaluation.perplexity import EvaluationOptions, evaluate
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import DecoderSection

VOCABULARY, CONTEXT = 8192, 256
STRIDE = CONTEXT // 2


def tinylm_perplexity(network: Transformer, shard: Shard) -> float:
    result = evaluate(network, shard, np.ones(VOCABULARY, dtype=np.int64), EvaluationOptions(CONTEXT, STRIDE))
    return result.perplexity


@torch.inference_mode()
def transformers_perplexity(gpt2: GPT2LMHeadModel, shard: Shard) -> float:
    tokens = torch.from_numpy(np.asarray(shard.tokens[:-1], dtype=np.int64))
    windows, scored = [], 0
    for begin in range(0, len(tokens) - 1, STRIDE):
        end = min(begin + CONTEXT, len(tokens) - 1)
        inputs, targets = tokens[begin:end], tokens[begin + 1 : end + 1].clone()
        targets[: max(0, scored - begin)] = -100
        scored = end
        windows.append((F.pad(inputs, (0, CONTEXT - len(inputs))), F.pad(targets, (0, CONTEXT - len(targets)), value=-100)))
        if end == len(tokens) - 1:
            break
    nats, size = 0.0, EVALUATION_BATCH_TOKENS // CONTEXT
    for start in range(0, len(windows), size):
        inputs, targets = (torch.stack(part) for part in zip(*windows[start : start + size], strict=True))
        logits = gpt2(inputs, use_cache=False).logits
        nats += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"))
    return math.exp(nats / (len(tokens) - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=20_000)
    options = parser.parse_args()
    logging.set_verbosity_error()
    model = DecoderSection.model_validate({"preset": "gpt2", "n_layer": 6, "n_head": 6, "n_embd": 384, "context_length": CONTEXT})
    network = add_noise(Transformer(model, VOCABULARY)).eval()
    gpt2 = to_transformers(network, VOCABULARY)
    generator = np.random.default_rng(0)
    tokens = np.concatenate([[0], generator.integers(1, VOCABULARY, options.tokens), [0]]).astype(np.uint16)
    shard = Shard(tokens, Counts(1, options.tokens, options.tokens, options.tokens, 0), 0)
    variants = {
        "transformers": lambda: transformers_perplexity(gpt2, shard),
        "tinylm": lambda: tinylm_perplexity(network, shard),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    perplexities = {}
    for _ in range(options.rounds):
        for name, work in variants.items():
            start = time.perf_counter()
            perplexities[name] = work()
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(times) for name, times in seconds.items()}
    for name, value in perplexities.items():
        print(f"{name:<13} {options.tokens / best[name]:9.0f} tokens/s  perplexity {value:.6f}")
    difference = abs(perplexities["tinylm"] / perplexities["transformers"] - 1)
    print(f"speedup over transformers {best['transformers'] / best['tinylm']:.2f}, relative perplexity difference {difference:.1e}")


if __name__ == "__main__":
    main()
