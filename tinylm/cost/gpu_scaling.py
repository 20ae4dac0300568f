"""Predict how the step time of a recipe depends on the number of accelerators. This module does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinylm.cost.accelerators import Accelerator
from tinylm.cost.cluster import GPUS_PER_NODE, Cluster, Strategy
from tinylm.cost.examples import ExampleSize
from tinylm.cost.network import network_cost
from tinylm.cost.step_time import StepEstimate, estimate_on_cluster
from tinylm.errors import InputError
from tinylm.recipe import Recipe
from tinylm.recipe.values import ComputeDtype


@dataclass(frozen=True)
class ScalingRow:
    """The step on `gpus` devices. `micro_batch_size` and `gradient_accumulation_steps` are per device."""

    gpus: int
    nodes: int
    parallel: Strategy
    global_batch_size: int
    tokens_per_step: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    seconds_per_step: float
    tokens_per_second: float
    mfu: float
    efficiency: float
    """Throughput per device, relative to the first row."""


@dataclass(frozen=True)
class GpuScaling:
    """Two tables, one row per number of devices."""

    hardware: str
    gpus_per_node: int
    network_bandwidth: float
    """Of a node, in one direction, in bytes/s."""
    precision: ComputeDtype
    strong: tuple[ScalingRow, ...]
    """With the recipe's global batch. Numbers of devices among which it cannot be divided are left out."""
    weak: tuple[ScalingRow, ...]
    """With one micro-batch per device, as large as in the first row of `strong`."""


def simulate_scaling(
    recipe: Recipe,
    vocab_size: int,
    accelerator: Accelerator,
    gpus: Sequence[int],
    *,
    gpus_per_node: int = GPUS_PER_NODE,
    network_bandwidth: float | None = None,
    size: ExampleSize | None = None,
) -> GpuScaling:
    """Predict the step time on each number of devices in `gpus`. `size` is as in `plan.make_plan`.

    Raises `InputError` if the architecture has no estimates, if the accelerator does not support the recipe's precision, or if the
    global batch cannot be divided among any of the numbers of devices.
    """

    def estimate(sized: Recipe, count: int) -> tuple[Cluster, StepEstimate]:
        cluster = Cluster(accelerator, count, gpus_per_node, network_bandwidth)
        return cluster, estimate_on_cluster(sized, vocab_size, None, cluster, size)

    batch = recipe.training.global_batch_size
    fitting = [count for count in gpus if batch % count == 0]
    if not fitting:
        raise InputError(
            f"{batch} sequences cannot be divided among {' or '.join(map(str, gpus))} devices",
            where="training.global_batch_size",
            hint="include 1 in --gpus",
        )
    strong = [(recipe, *estimate(recipe, count)) for count in fitting]
    first = strong[0][2]
    weak = []
    for count in gpus:
        micro = first.micro_batch_size
        sizes = {"global_batch_size": count * micro, "micro_batch_size": micro}
        sized = recipe.model_copy(update={"training": recipe.training.model_copy(update=sizes)})
        weak.append((sized, *estimate(sized, count)))
    return GpuScaling(
        hardware=accelerator.name,
        gpus_per_node=gpus_per_node,
        network_bandwidth=network_bandwidth or accelerator.network_bandwidth,
        precision=first.precision,
        strong=_rows(strong, vocab_size, size),
        weak=_rows(weak, vocab_size, size),
    )


def _rows(
    steps: Sequence[tuple[Recipe, Cluster, StepEstimate]], vocab_size: int, size: ExampleSize | None
) -> tuple[ScalingRow, ...]:
    rows: list[ScalingRow] = []
    reference = 0.0
    for recipe, cluster, step in steps:
        network, batch = network_cost(recipe, vocab_size, size), recipe.training.global_batch_size
        tokens = round(batch * network.size.tokens)
        speed = tokens / step.step_seconds
        reference = reference or speed / cluster.gpus
        peak = cluster.gpus * step.peak_flops
        rows.append(
            ScalingRow(
                gpus=cluster.gpus,
                nodes=cluster.nodes,
                parallel=step.parallel,
                global_batch_size=batch,
                tokens_per_step=tokens,
                micro_batch_size=step.micro_batch_size,
                gradient_accumulation_steps=batch // cluster.gpus // step.micro_batch_size,
                seconds_per_step=step.step_seconds,
                tokens_per_second=speed,
                mfu=batch * network.flops(recipe.training.lora) / (step.step_seconds * peak),
                efficiency=speed / cluster.gpus / reference,
            )
        )
    return tuple(rows)
