"""Compare the roofline model of `tinylm.cost` with published training runs, and print the error for each run.

The source of each run specifies its architecture, batch size, device, and execution mode. If a source is incomplete, a note lists
the assumptions. The constants in `tinylm.cost.accelerators` were not fitted to these runs, with one exception: MATMUL_EFFICIENCY
was chosen using llm.c's run of the 124M model on A100s. MATMUL_EFFICIENCY_HOPPER was fitted to tinylm's own run on an H200.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from tinylm.cost.accelerators import elementwise_bytes, find, matmul_bytes, state_bytes, step_seconds
from tinylm.cost.cluster import BACKWARD_FRACTION, Cluster, Layers, Passes, Strategy, exposed_seconds
from tinylm.cost.parameters import flops_per_token, parameter_counts
from tinylm.recipe.schema import DecoderSection


@dataclass(frozen=True)
class Run:
    """A published training run."""

    name: str
    hardware: str
    devices: int
    tokens_per_second: float
    """Total throughput of all devices in tokens/s."""
    published: str
    """The speed as reported by the source."""
    url: str
    model: dict[str, Any]
    tokens_per_step: int
    micro_batches: int
    vocab_size: int = 50_304
    compiled: bool = True
    stream_bytes: int = 4
    """Bytes per element of the residual stream."""
    strategy: Strategy = "ddp"
    note: str = ""


def gpt2(n_layer: int, n_head: int, n_embd: int, context_length: int = 1024) -> dict[str, Any]:
    return {"preset": "gpt2", "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "context_length": context_length}


LLM_C = "https://github.com/karpathy/llm.c/blob/master/scripts/run_gpt2_{}.sh"
FOUNDRY = "https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md"
HALF_MILLION = 524_288

RUNS = (
    Run(
        "llm.c GPT-2 124M",
        "a100-80gb-sxm",
        8,
        HALF_MILLION / 0.300,
        "300 ms per step",
        LLM_C.format("124M"),
        gpt2(12, 12, 768),
        HALF_MILLION,
        1,
        stream_bytes=2,
        note="hand-fused kernels, counted as compiled; all in bf16",
    ),
    Run(
        "llm.c GPT-2 350M",
        "a100-80gb-sxm",
        8,
        HALF_MILLION / 0.820,
        "820 ms per step",
        LLM_C.format("350M"),
        gpt2(24, 16, 1024),
        HALF_MILLION,
        1,
        stream_bytes=2,
        note="as above",
    ),
    Run(
        "llm.c GPT-2 774M",
        "a100-80gb-sxm",
        8,
        HALF_MILLION / 1.7,
        "1.7 s per step",
        LLM_C.format("774M"),
        gpt2(36, 20, 1280),
        HALF_MILLION,
        2,
        stream_bytes=2,
        note="as above",
    ),
    Run(
        "llm.c GPT-2 1558M",
        "h100-sxm",
        8,
        2 * HALF_MILLION / 2.80,
        "2.80 s per step",
        LLM_C.format("1558M"),
        gpt2(48, 25, 1600),
        2 * HALF_MILLION,
        8,
        stream_bytes=2,
        note="as above; GELU fused into the matmul",
    ),
    Run(
        "modded-nanogpt baseline",
        "h100-sxm",
        8,
        19_560 * HALF_MILLION / (45 * 60),
        "45 min for 19,560 steps",
        "https://github.com/KellerJordan/modded-nanogpt",
        gpt2(12, 12, 768),
        HALF_MILLION,
        1,
        note="includes validation",
    ),
    Run(
        "Romero, GPT-2 124M",
        "rtx-4090",
        2,
        221e3,
        "221k tokens/s",
        "https://www.tylerromero.com/posts/nanogpt-speedrun-worklog",
        gpt2(12, 12, 768),
        HALF_MILLION // 2,
        8,
        note="compiled; micro-batches of 16 assumed",
    ),
    Run(
        "ashrafs1, 162M",
        "a100-80gb-sxm",
        1,
        195e3,
        "195k tokens/s",
        "https://huggingface.co/ashrafs1/nanogpt",
        {"preset": "modern", "n_layer": 12, "n_head": 12, "n_embd": 768, "context_length": 2048, "logit_softcap": 30.0},
        HALF_MILLION,
        8,
        note="compilation assumed; excludes Muon's matmuls",
    ),
    Run(
        "TinyLlama 1.1B",
        "a100-40gb-sxm",
        8,
        22e9 / (32 * 3600),
        "32 h for 22B tokens",
        "https://github.com/jzhang38/TinyLlama",
        {
            "preset": "llama",
            "n_layer": 22,
            "n_head": 32,
            "n_kv_head": 4,
            "n_embd": 2048,
            "feed_forward_multiple": 2.75,
            "context_length": 2048,
        },
        2_097_152,
        16,
        vocab_size=32_000,
        note="hand-fused kernels, counted as compiled",
    ),
    Run(
        "MPT 125M",
        "a100-80gb-sxm",
        8,
        1_251_751,
        "1.252M tokens/s",
        FOUNDRY,
        gpt2(12, 12, 768),
        1_048_576,
        2,
        50_368,
        False,
        strategy="fsdp",
        note="eager, FSDP",
    ),
    Run(
        "MPT 350M",
        "a100-80gb-sxm",
        8,
        518_504,
        "518.5k tokens/s",
        FOUNDRY,
        gpt2(24, 16, 1024),
        1_048_576,
        2,
        50_368,
        False,
        strategy="fsdp",
        note="as above",
    ),
    Run(
        "MPT 1B",
        "a100-80gb-sxm",
        8,
        164_109,
        "164.1k tokens/s",
        FOUNDRY,
        gpt2(24, 16, 2048, 2048),
        917_504,
        4,
        50_368,
        False,
        strategy="fsdp",
        note="as above",
    ),
    Run(
        "MPT 1B",
        "h100-sxm",
        8,
        363_645,
        "363.6k tokens/s",
        FOUNDRY,
        gpt2(24, 16, 2048, 2048),
        229_376,
        1,
        50_368,
        False,
        strategy="fsdp",
        note="as above",
    ),
    Run(
        "nanoGPT 124M",
        "a100-40gb-sxm",
        8,
        600_000 * 491_520 / (4 * 86_400),
        "4 days for 600,000 steps",
        "https://github.com/karpathy/nanoGPT",
        gpt2(12, 12, 768),
        491_520,
        5,
        vocab_size=50_257,
        note="as of 2023-01-31; commit 77e7e04 made it about 25% faster by padding the vocabulary",
    ),
)


def layers(model: DecoderSection, vocab_size: int) -> Layers:
    """Return how the parameters of a model are distributed over its layers."""
    counts = parameter_counts(model, vocab_size)
    outside = counts["embedding"] + counts["positions"] + counts["tables"]
    blocks = counts["matrices"] + counts["rest"]
    share = 6 * vocab_size * model.n_embd / flops_per_token(model, vocab_size)
    return Layers(model.n_layer, blocks / model.n_layer, counts["head"], outside, share)


def simulated_seconds(
    model: DecoderSection,
    cluster: Cluster,
    tokens: int,
    *,
    vocab_size: int = 50_304,
    micro_batches: int = 1,
    compiled: bool = True,
    stream_bytes: int = 4,
    strategy: Strategy = "ddp",
    reduce_bytes: int = 4,
    recomputed: float = 0.0,
) -> float:
    """Return the predicted seconds of a step in bf16. `recomputed` is the fraction of the forward pass that runs twice."""
    parts = layers(model, vocab_size)
    factor = 1 + recomputed * (1 - BACKWARD_FRACTION)
    elementwise = elementwise_bytes(model, vocab_size, "bf16", compiled=compiled, stream_bytes=stream_bytes)
    shards = cluster.gpus if strategy == "fsdp" else 1
    computed = step_seconds(
        cluster.accelerator,
        cluster.gpus,
        "bf16",
        matmul_flops=factor * tokens * flops_per_token(model, vocab_size),
        matmul_bytes=factor * tokens * matmul_bytes(model, vocab_size, "bf16"),
        elementwise_bytes=factor * tokens * elementwise,
        state_bytes=state_bytes(round(parts.parameters), micro_batches, "bf16", shards=shards),
    )
    backward = 1 - (1 - BACKWARD_FRACTION) / factor
    passes = Passes(computed.passes, micro_batches, reduce_bytes=reduce_bytes, backward_fraction=backward)
    return computed.total + exposed_seconds(cluster, parts, passes, strategy)


def predicted_seconds(run: Run) -> float:
    """Return the predicted seconds per optimizer step."""
    return simulated_seconds(
        DecoderSection.model_validate(run.model),
        Cluster(find(run.hardware), run.devices),
        run.tokens_per_step,
        vocab_size=run.vocab_size,
        micro_batches=run.micro_batches,
        compiled=run.compiled,
        stream_bytes=run.stream_bytes,
        strategy=run.strategy,
    )


def main() -> None:
    print(f"{'run':24} {'hardware':17} {'as reported':24} {'published ms':>12} {'predicted ms':>12} {'error':>6}  note")
    errors = []
    for run in RUNS:
        published, predicted = run.tokens_per_step / run.tokens_per_second, predicted_seconds(run)
        error = predicted / published - 1
        errors.append(abs(error))
        hardware = f"{run.devices} {run.hardware}"
        times = f"{1e3 * published:12.0f} {1e3 * predicted:12.0f} {100 * error:+5.0f}%"
        print(f"{run.name:24} {hardware:17} {run.published:24} {times}  {run.note}")
    within = sum(error <= 0.25 for error in errors)
    summary = f"median {100 * median(errors):.0f}%, maximum {100 * max(errors):.0f}%"
    print(f"\nabsolute error: {summary}, within 25% for {within} of {len(errors)} runs\n")
    for url in dict.fromkeys(run.url for run in RUNS):
        print(f"{', '.join(dict.fromkeys(run.name for run in RUNS if run.url == url))}: {url}")


if __name__ == "__main__":
    main()
