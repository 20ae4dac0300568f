"""Compare the simulated step time of `tinylm.cost.cluster` with published measurements on 8 to 512 GPUs.

    python benchmarks/published_scaling.py [--all]

Three tables, all with a constant batch per GPU (weak scaling) and FSDP:

- llm-foundry: MPT models on A100 40GB, 1600 Gbit/s between nodes, 8 to 128 GPUs
- llm-foundry: MPT models on H100 80GB, 8 to 512 GPUs; 3200 Gbit/s between nodes is assumed
- torchtitan: Llama 3.1 8B on H100 96GB, 3200 Gbit/s between nodes, 8 and 128 GPUs

The script prints two errors. The error of the throughput includes the errors of the estimate for a single GPU. The error of the
scaling compares throughputs per GPU relative to the fewest GPUs with the same micro-batch, which depend only on the model of the
communication. One constant, `STRAGGLING`, was estimated from the first table. The other tables are independent.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from published import gpt2, simulated_seconds

from tinylm.cost.accelerators import Accelerator, find
from tinylm.cost.cluster import Cluster
from tinylm.recipe.schema import DecoderSection

CONTEXT_LENGTH = 2048
MPT_VOCAB_SIZE = 50_368
MPT = {  # layers, heads, width
    "125m": (12, 12, 768),
    "350m": (24, 16, 1024),
    "760m": (24, 12, 1536),
    "1b": (24, 16, 2048),
    "3b": (32, 20, 2560),
    "7b": (32, 32, 4096),
    "13b": (40, 40, 5120),
}
FOUNDRY = (
    "https://github.com/mosaicml/llm-foundry/blob/8c8dd48f72168c5d51e2f7b151595892a8fba43d/scripts/train/benchmarking/README.md"
)
TORCHTITAN = "https://github.com/pytorch/torchtitan/blob/b5bcd76c66d0acb1a08b176d9639425bc55e0b2a/benchmarks/llama3_h100_202412_torchtitan.md"


@dataclass(frozen=True)
class Measurement:
    """One row of a table. With the same model and micro-batch size, it belongs to the same series."""

    model: str
    gpus: int
    micro_batch: int
    micro_batches: int
    tokens_per_second: float
    """Per GPU."""
    recomputed: bool = False
    """Whether activations are recomputed."""

    @property
    def series(self) -> tuple[str, int, int, bool]:
        return self.model, self.micro_batch, self.micro_batches, self.recomputed


A100 = (
    *(Measurement("125m", gpus, 26, 1, speed) for gpus, speed in ((16, 130_535), (32, 127_122), (64, 125_234), (128, 123_936))),
    *(Measurement("350m", gpus, 18, 1, speed) for gpus, speed in ((16, 55_413), (32, 53_811), (64, 52_689), (128, 51_934))),
    *(Measurement("760m", gpus, 12, 1, speed) for gpus, speed in ((16, 29_607), (32, 29_648), (64, 29_344), (128, 28_940))),
    *(Measurement("1b", gpus, 10, 1, speed) for gpus, speed in ((32, 15_555), (64, 19_001), (128, 18_647))),
    *(Measurement("3b", gpus, 6, 1, speed) for gpus, speed in ((32, 9_914), (64, 9_736), (128, 9_538))),
    *(Measurement("7b", gpus, 18, 1, speed, True) for gpus, speed in ((32, 3_725), (64, 3_665), (128, 3_623))),
    *(Measurement("13b", gpus, 16, 1, speed, True) for gpus, speed in ((64, 1_976), (128, 1_972))),
    Measurement("125m", 8, 26, 3, 136_334),
    Measurement("350m", 8, 16, 4, 55_995),
    Measurement("760m", 8, 12, 4, 30_173),
    Measurement("1b", 8, 8, 8, 19_271),
    Measurement("1b", 16, 8, 1, 19_085),
    Measurement("3b", 8, 5, 8, 10_065),
    Measurement("3b", 16, 5, 1, 9_750),
    Measurement("7b", 8, 12, 4, 3_679, True),
    Measurement("7b", 16, 16, 1, 3_645, True),
    Measurement("13b", 16, 10, 1, 1_993, True),
    Measurement("13b", 32, 14, 1, 1_998, True),
)
"""All rows with a context of 2048 tokens, except 30B and 70B models."""
H100 = (
    *(Measurement("760m", gpus, 24, 1, speed) for gpus, speed in ((16, 68_551), (32, 67_971))),
    *(Measurement("1b", gpus, 20, 1, speed) for gpus, speed in ((16, 46_037), (32, 45_130), (64, 44_402))),
    *(Measurement("3b", gpus, 6, 3, speed) for gpus, speed in ((32, 23_021), (64, 22_525))),
    *(Measurement("7b", gpus, 6, 1, speed) for gpus, speed in ((8, 10_643), (128, 10_475), (256, 10_119), (512, 9_670))),
    *(Measurement("13b", gpus, 2, 1, speed) for gpus, speed in ((8, 4_792), (16, 4_767), (32, 4_811), (64, 4_800))),
    *(Measurement("13b", gpus, 16, 1, speed, True) for gpus, speed in ((128, 5_080), (256, 4_989), (512, 4_952))),
    Measurement("760m", 8, 24, 2, 63_147),
    Measurement("1b", 8, 14, 1, 45_455),
    Measurement("3b", 16, 10, 3, 24_142),
)
"""All rows with a context of 2048 tokens and full sharding, except 30B and 70B models."""
TITAN = tuple(Measurement("llama3-8b", gpus, 2, 1, speed) for gpus, speed in ((8, 6_667), (128, 6_514)))


@dataclass(frozen=True)
class Table:
    name: str
    accelerator: Accelerator
    measurements: Sequence[Measurement]
    in_bf16: bool = False
    """Whether weights are stored and gradients are reduced in bf16."""


TABLES = (
    Table("llm-foundry, A100 40GB", find("a100-40gb-sxm"), A100, in_bf16=True),
    Table("llm-foundry, H100 80GB", find("h100-sxm"), H100),
    Table("torchtitan, H100 96GB", replace(find("h100-sxm"), bandwidth=2.4e12), TITAN),
)


def predicted_speed(table: Table, measured: Measurement) -> float:
    """Return the predicted tokens/s per GPU."""
    cluster = Cluster(table.accelerator, measured.gpus)
    if measured.model == "llama3-8b":
        section = {
            "preset": "llama",
            "n_layer": 32,
            "n_head": 32,
            "n_kv_head": 8,
            "n_embd": 4096,
            "feed_forward_multiple": 3.5,
            "context_length": 8192,
            "tie_embeddings": False,
        }
        # Selective checkpointing recomputes every second matrix product of the forward pass, but not attention.
        options = {"vocab_size": 128_256, "compiled": True, "recomputed": 0.5}
    else:
        section = gpt2(*MPT[measured.model], CONTEXT_LENGTH)
        options = {"vocab_size": MPT_VOCAB_SIZE, "compiled": False, "recomputed": float(measured.recomputed)}
    if table.in_bf16:
        options |= {"stream_bytes": 2, "reduce_bytes": 2}
    model = DecoderSection.model_validate(section)
    tokens = measured.micro_batch * measured.micro_batches * model.context_length
    seconds = simulated_seconds(
        model, cluster, measured.gpus * tokens, micro_batches=measured.micro_batches, strategy="fsdp", **options
    )
    return tokens / seconds


def compare(table: Table, *, show: bool) -> tuple[list[float], list[float]]:
    """Print the rows of a table if `show` is true. Returns the errors of the throughput and of the scaling."""
    rows = sorted(table.measurements, key=lambda row: (list(MPT).index(row.model) if row.model in MPT else 0, row.gpus))
    first: dict[object, tuple[float, float]] = {}
    throughput, scaling = [], []
    for row in rows:
        predicted = predicted_speed(table, row)
        throughput.append(predicted / row.tokens_per_second - 1)
        reference = first.setdefault(row.series, (row.tokens_per_second, predicted))
        measured_share, predicted_share = row.tokens_per_second / reference[0], predicted / reference[1]
        scaled = reference[0] != row.tokens_per_second
        if scaled:
            scaling.append(predicted_share / measured_share - 1)
        if show:
            shares = f"{measured_share:8.1%} {predicted_share:8.1%} {scaling[-1]:+6.1%}" if scaled else ""
            speeds = f"{row.tokens_per_second:9,.0f} {predicted:9,.0f} {throughput[-1]:+6.1%}"
            print(f"  {row.model:10} {row.gpus:4} GPUs, {row.micro_batches} x {row.micro_batch:2} sequences {speeds} {shares}")
    return throughput, scaling


def summary(errors: Sequence[float]) -> str:
    worst = max(errors, key=abs)
    return f"median {median(map(abs, errors)):.1%}, worst {worst:+.1%} of {len(errors)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="print every row: tokens/s per GPU, and relative to the first row")
    show = parser.parse_args().all
    totals: dict[str, list[float]] = defaultdict(list)
    for table in TABLES:
        print(table.name)
        throughput, scaling = compare(table, show=show)
        print(f"  error of the throughput: {summary(throughput)}")
        print(f"  error of the scaling:    {summary(scaling)}")
        totals["throughput"] += throughput
        totals["scaling"] += scaling
    print("all")
    for name, errors in totals.items():
        print(f"  error of the {name + ':':12}{summary(errors)}")
    print(f"\n{FOUNDRY}\n{TORCHTITAN}")


if __name__ == "__main__":
    main()
