"""Compare the training speed of tinylm and of a plain loop around transformers' GPT2LMHeadModel.

    python benchmarks/throughput.py [--rounds 5] [--steps 4] [--precision fp32]

The model has 13.9M parameters: 6 layers, 6 heads, width 384, vocabulary 8192, context 256. The batch size is 8, and gradients are
clipped to norm 1. All variants run in turn on the same cores. Model FLOPs are counted as 6 per parameter per token, plus causal
attention. MFU is relative to the throughput of a 2048 x 2048 matmul, measured between the rounds. The script also prints the
optimizer's share of the step time for AdamW and Muon.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tinylm.cost.micro_batch import CPU_MICRO_BATCH_TOKENS
from tinylm.cost.parameters import flops_per_token
from tinylm.data.datasets import TokenStream
from tinylm.model.transformer import Transformer
from tinylm.optim import groups
from tinylm.recipe.schema import AdamWOptimizer, DecoderSection, MuonOptimizer
from tinylm.reporting import SILENT
from tinylm.training.compilation import Trial, compile_units
from tinylm.training.feed import Feed
from tinylm.training.objectives import CausalLM
from tinylm.training.out_of_memory import keep_freed_memory
from tinylm.training.precision import Precision
from tinylm.training.step import GradientSettings, accumulate

VOCABULARY, CONTEXT, BATCH = 8192, 256, 8
SHAPE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "context_length": CONTEXT}
CPU = torch.device("cpu")


def dataset() -> TokenStream:
    generator = torch.Generator().manual_seed(0)
    return TokenStream(torch.randint(VOCABULARY, (200_000,), generator=generator).numpy(), CONTEXT, seed=0)


def make_tinylm_step(
    preset: str, section: AdamWOptimizer | MuonOptimizer, precision: Precision, compiled: bool
) -> Callable[[], tuple[float, float]]:
    """Return a function that runs one training step and returns (seconds for the whole step, seconds for the optimizer)."""
    model = DecoderSection.model_validate({"preset": preset, **SHAPE, "tie_embeddings": True})
    network = Transformer(model, VOCABULARY)
    optimizers = groups.build(section, network)
    objective = CausalLM()
    feed, position = Feed(dataset(), objective, seed=0), 0
    micro = max(1, CPU_MICRO_BATCH_TOKENS // CONTEXT)
    settings = GradientSettings(micro, precision, objective)
    if compiled:
        compile_units(network, Trial(network, feed.batch(0, BATCH), settings), required=True, reporter=SILENT)

    def step() -> tuple[float, float]:
        nonlocal position
        start = time.perf_counter()
        optimizers.zero_grad()
        accumulate(network, feed.batch(position, BATCH), settings)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        middle = time.perf_counter()
        optimizers.step()
        position += BATCH
        end = time.perf_counter()
        return end - start, end - middle

    return step


def make_transformers_step(precision: Precision) -> Callable[[], tuple[float, float]]:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=384, n_layer=6, n_head=6, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    network = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    source, position = dataset(), 0

    def step() -> tuple[float, float]:
        nonlocal position
        start = time.perf_counter()
        tokens = torch.from_numpy(source.examples(position, BATCH)["tokens"])[:, :-1]
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast():
            loss = network(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        middle = time.perf_counter()
        optimizer.step()
        position += BATCH
        end = time.perf_counter()
        return end - start, end - middle

    return step


def matmul_flops_per_second(precision: Precision) -> float:
    matrix = torch.randn(2048, 2048).to(torch.bfloat16 if precision.name == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


VARIANTS = ("transformers", "gpt2", "gpt2, compiled", "modern, muon", "modern, muon, compiled")


def run_worker(variant: str, precision: Precision) -> None:
    """Run a training step for each line on stdin, and print the seconds for the whole step and for the optimizer."""
    if variant == "transformers":
        step = make_transformers_step(precision)
    else:
        keep_freed_memory()  # as `tinylm train` does; transformers does not change the allocator
        preset, compiled = variant.split(",")[0], variant.endswith("compiled")
        section = MuonOptimizer(name="muon") if "muon" in variant else AdamWOptimizer(name="adamw")
        step = make_tinylm_step(preset, section, precision, compiled)
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(*step(), flush=True)


class Worker:
    """A process that runs one variant."""

    def __init__(self, name: str, precision: Precision) -> None:
        command = [sys.executable, __file__, "--precision", precision.name, "--variant", name]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._read_line()

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def step(self) -> tuple[float, float]:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        total, optimizer = map(float, self._read_line().split())
        return total, optimizer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    precision = Precision(arguments.precision, CPU)
    if arguments.variant:
        run_worker(arguments.variant, precision)
        return
    workers = {name: Worker(name, precision) for name in VARIANTS}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    peaks = []
    for _ in range(arguments.rounds):
        peaks.append(matmul_flops_per_second(precision))
        for name, worker in workers.items():
            worker.step()  # warm up the CPU caches after the other variants
            times[name] += [worker.step() for _ in range(arguments.steps)]
    for worker in workers.values():
        worker.close()
    peak = statistics.median(peaks)
    flops = flops_per_token(DecoderSection.model_validate({"preset": "gpt2", **SHAPE}), VOCABULARY) * BATCH * CONTEXT
    base = statistics.median(seconds for seconds, _ in times["transformers"])
    print(f"matmul: {peak / 1e9:.0f} GFLOP/s in {precision.name}; one step: {flops / 1e9:.0f} GFLOP")
    for name, measured in times.items():
        seconds = statistics.median(total for total, _ in measured)
        optimizer = statistics.median(part for _, part in measured)
        speed = f"{1000 * seconds:6.0f} ms/step  {BATCH * CONTEXT / seconds:6.0f} tokens/s  {base / seconds:5.2f} x transformers"
        print(f"{name:24} {speed}  MFU {flops / seconds / peak:4.0%}  optimizer {optimizer / seconds:4.1%} of step time")


if __name__ == "__main__":
    main()
