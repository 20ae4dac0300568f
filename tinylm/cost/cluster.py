"""Simulate a data-parallel optimizer step on a cluster: how long gradients and weights travel, and how much of it overlaps with
computation. This module does not import torch.

The input is the time that one device computes (`accelerators.step_seconds`). The collectives are those of `training.parallel`:

- `ddp` all-reduces the gradients in float32 during the backward pass of a step's last micro-batch, a block at a time.
- `fsdp` all-gathers the weights of each block before its forward pass and again before its backward pass, one block ahead, and
  reduce-scatters its gradients in float32 during the backward pass of the last micro-batch.

The collectives run one after another. Computation waits for the weights that it needs, and the update waits for all gradients.
The time of a collective is its latency plus its bytes divided by the bandwidth, as in NCCL's model of itself (src/graph/tuning.cc).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tinylm.cost.accelerators import Accelerator
from tinylm.errors import InputError

Strategy = Literal["ddp", "fsdp"]

GPUS_PER_NODE = 8
LINK_EFFICIENCY = 0.7
"""Fraction of the link bandwidth that collectives with 100 MB or more reach within a node. This value is an assumption."""
NETWORK_EFFICIENCY = 0.85
"""Fraction of the network bandwidth that collectives with 100 MB or more reach between nodes. This value is an assumption."""
TREE_EFFICIENCY = 0.9
"""Bandwidth of a tree all-reduce, as a fraction of that of a ring."""


@dataclass(frozen=True)
class Protocol:
    """One of NCCL's ways to send data, with the latencies and the relative bandwidth in NCCL's model."""

    launch: float
    """Seconds that a collective takes in addition to its hops."""
    link_hop: float
    network_hop: float
    tree_link_hop: float
    tree_network_hop: float
    bandwidth: float
    """Fraction of the bandwidth that collectives reach."""


PROTOCOLS = (
    Protocol(14e-6, 1.9e-6, 4.0e-6, 1.25e-6, 8.5e-6, 0.92),  # LL128
    Protocol(8.4e-6, 3.4e-6, 14e-6, 4.0e-6, 14e-6, 1.0),  # Simple
)
"""NCCL uses the protocol for which it expects the shortest time. LL is omitted, because it is faster only below about 100 kB."""
STRAGGLING = 0.014
"""How much longer the passes take for each doubling of the nodes, because all devices wait for the slowest one. Estimated from the
table of llm-foundry for A100s in `benchmarks/published_scaling.py`, which values from 0.012 to 0.02 fit about equally well. The
other tables test it."""
BUCKET_BYTES = 25 * 2**20
"""DistributedDataParallel reduces gradients in buckets of this size."""
BACKWARD_FRACTION = 2 / 3
"""The backward pass's share of the time for the forward and backward pass. For each matrix product in the forward pass, the
backward pass computes two."""


@dataclass(frozen=True)
class Cluster:
    """`gpus` equal devices in nodes of `gpus_per_node`. `network_bandwidth` is a node's, in one direction, in bytes/s."""

    accelerator: Accelerator
    gpus: int
    gpus_per_node: int = GPUS_PER_NODE
    network_bandwidth: float | None = None
    """None for `accelerator.network_bandwidth`."""

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise InputError(f"must be at least 1, not {self.gpus}", where="--devices")

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.gpus_per_node)

    @property
    def bandwidth(self) -> float:
        """Bytes/s that travel over each link of a ring through all devices. A ring crosses each node's network once.

        All network cards of a node work for the ring (NCCL uses several rings at the same time), so the whole bandwidth counts.
        """
        link = LINK_EFFICIENCY * self.accelerator.link_bandwidth
        if self.nodes == 1:
            return link
        return min(link, NETWORK_EFFICIENCY * (self.network_bandwidth or self.accelerator.network_bandwidth))

    def ring_seconds(self, size: float) -> float:
        """Return the seconds of an all-gather or a reduce-scatter of `size` bytes in total, in a ring (Patarasuk & Yuan 2009)."""
        return self._ring_seconds(size, 1)

    def all_reduce_seconds(self, size: float) -> float:
        """Return the seconds of an all-reduce of `size` bytes: in a ring, or in a tree if that is faster."""
        if self.gpus == 1:
            return 0.0
        links, levels = min(self.gpus, self.gpus_per_node) - 1, math.log2(self.nodes)
        trees = (
            protocol.launch
            + 2 * (links * protocol.tree_link_hop + levels * protocol.tree_network_hop)
            + 2 * size / (TREE_EFFICIENCY * protocol.bandwidth * self.bandwidth)
            for protocol in PROTOCOLS
        )
        return min(self._ring_seconds(size, 2), *trees)

    def _ring_seconds(self, size: float, rounds: int) -> float:
        """Return the seconds for `rounds` rounds in which each device sends 1 / `gpus` of `size` bytes to every other device."""
        if self.gpus == 1:
            return 0.0
        links, networks = self.gpus - self.nodes, self.nodes - 1
        return min(
            protocol.launch
            + rounds * (links * protocol.link_hop + networks * protocol.network_hop)
            + rounds * (self.gpus - 1) / self.gpus * size / (protocol.bandwidth * self.bandwidth)
            for protocol in PROTOCOLS
        )


@dataclass(frozen=True)
class Layers:
    """How a network's trained parameters are distributed over its layers. Each part is communicated separately."""

    blocks: int
    block_parameters: float
    head_parameters: float
    """Parameters whose gradients are complete when the backward pass starts: those of an untied head."""
    embedding_parameters: float
    """Parameters whose gradients are complete when the backward pass ends: those of the embeddings, including a tied head."""
    head_share: float
    """The head's share of the time of a forward and backward pass."""

    @property
    def parameters(self) -> float:
        return self.blocks * self.block_parameters + self.head_parameters + self.embedding_parameters


@dataclass(frozen=True)
class Passes:
    """The forward and backward passes of a step on one device, without communication."""

    seconds: float
    """Total time of all micro-batches."""
    micro_batches: int = 1
    gather_bytes: int = 2
    """Bytes per weight that `fsdp` gathers: 2 in bf16, and 4 otherwise."""
    reduce_bytes: int = 4
    """Bytes per gradient that is reduced."""
    backward_fraction: float = BACKWARD_FRACTION


def exposed_seconds(cluster: Cluster, layers: Layers, passes: Passes, strategy: Strategy) -> float:
    """Return the seconds by which communication and slower devices make a step longer."""
    if cluster.gpus == 1:
        return 0.0
    simulate = _simulate_ddp if strategy == "ddp" else _simulate_fsdp
    return simulate(cluster, layers, passes) - passes.seconds + STRAGGLING * math.log2(cluster.nodes) * passes.seconds


def _simulate_ddp(cluster: Cluster, layers: Layers, passes: Passes) -> float:
    """Return the seconds until all gradients have been reduced."""
    backward = passes.backward_fraction * passes.seconds / passes.micro_batches
    head, block = _split(layers, backward)
    network = now = passes.seconds - backward + head
    parts = [layers.head_parameters, *[layers.block_parameters] * layers.blocks, layers.embedding_parameters]
    for number, parameters in enumerate(parts):
        now += block if 0 < number <= layers.blocks else 0.0
        network = max(network, now) + _bucketed_seconds(cluster, passes.reduce_bytes * parameters)
    return max(now, network)


def _bucketed_seconds(cluster: Cluster, size: float) -> float:
    """Return the seconds to all-reduce `size` bytes of gradients. A bucket can contain the gradients of several blocks."""
    buckets = size / BUCKET_BYTES
    return buckets * cluster.all_reduce_seconds(BUCKET_BYTES)


def _simulate_fsdp(cluster: Cluster, layers: Layers, passes: Passes) -> float:
    """Return the seconds until all gradients have been reduced. The embeddings and the head are one unit, gathered first."""
    root = layers.head_parameters + layers.embedding_parameters
    gather_root = cluster.ring_seconds(passes.gather_bytes * root)
    gather = cluster.ring_seconds(passes.gather_bytes * layers.block_parameters)
    reduce = cluster.ring_seconds(passes.reduce_bytes * layers.block_parameters)
    per_batch = passes.seconds / passes.micro_batches
    forward = _split(layers, (1 - passes.backward_fraction) * per_batch)
    backward = _split(layers, passes.backward_fraction * per_batch)
    now = network = 0.0
    for micro_batch in range(passes.micro_batches):
        network = now = max(now, network) + gather_root
        now, network = _gathered_pass(now, network, [gather] * layers.blocks, forward[1], 0.0)
        now += forward[0] + backward[0]
        last = micro_batch == passes.micro_batches - 1
        now, network = _gathered_pass(now, network, [gather] * layers.blocks, backward[1], reduce if last else 0.0)
    return max(now, network) + cluster.ring_seconds(passes.reduce_bytes * root)


def _gathered_pass(now: float, network: float, gathers: Sequence[float], block: float, reduce: float) -> tuple[float, float]:
    """Run a pass over blocks that takes `block` seconds each, whose weights are gathered one block ahead.

    After each block, its gradients are reduced, which takes `reduce` seconds. Takes and returns the times until which the device
    computes and until which the network is busy.
    """
    arrived = network = max(now, network) + gathers[0] if gathers else network
    for number in range(len(gathers)):
        start = max(now, arrived)
        if number + 1 < len(gathers):
            arrived = network = max(start, network) + gathers[number + 1]
        now = start + block
        network = max(now, network) + reduce if reduce else network
    return now, network


def _split(layers: Layers, seconds: float) -> tuple[float, float]:
    """Divide the seconds of a pass among the head and the blocks. Returns the seconds of the head and of one block."""
    return layers.head_share * seconds, (1 - layers.head_share) * seconds / max(layers.blocks, 1)
