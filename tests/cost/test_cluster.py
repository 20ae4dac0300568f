"""Test the time of collectives against calculations by hand, and how communication overlaps with computation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from planning import recipe

from tinylm.cost import cluster as model
from tinylm.cost.accelerators import Accelerator, Source, find
from tinylm.cost.cluster import (
    LINK_EFFICIENCY,
    NETWORK_EFFICIENCY,
    PROTOCOLS,
    STRAGGLING,
    Cluster,
    Layers,
    Passes,
    Strategy,
    exposed_seconds,
)
from tinylm.cost.gpu_scaling import simulate_scaling
from tinylm.errors import InputError

ROUND = Accelerator("round", {"fp32": 1e12, "bf16": 10e12}, 10e9, 1e12, 100e9, Source("", ""), network_bandwidth=50e9)
LAYERS = Layers(blocks=4, block_parameters=1e7, head_parameters=0, embedding_parameters=2e7, head_share=0.2)


def test_a_ring_sends_all_other_parts_over_the_slowest_link() -> None:
    large = 1e12
    node, nodes = Cluster(ROUND, 8), Cluster(ROUND, 32)
    assert (node.nodes, nodes.nodes) == (1, 4)
    assert node.ring_seconds(large) == pytest.approx(7 / 8 * large / (LINK_EFFICIENCY * 100e9), rel=1e-4)
    assert nodes.ring_seconds(large) == pytest.approx(31 / 32 * large / (NETWORK_EFFICIENCY * 50e9), rel=1e-4)
    assert nodes.all_reduce_seconds(large) == pytest.approx(2 * nodes.ring_seconds(large), rel=1e-4)
    assert Cluster(ROUND, 32, network_bandwidth=25e9).ring_seconds(large) == pytest.approx(2 * nodes.ring_seconds(large), rel=1e-4)
    assert Cluster(ROUND, 1).ring_seconds(large) == Cluster(ROUND, 1).all_reduce_seconds(large) == 0


def test_the_latency_of_a_ring_grows_with_the_devices_and_that_of_a_tree_with_the_logarithm_of_the_nodes() -> None:
    protocol = PROTOCOLS[0]
    latency = protocol.launch + 56 * protocol.link_hop + 7 * protocol.network_hop
    assert Cluster(ROUND, 64).ring_seconds(0) == pytest.approx(latency)
    tree = protocol.launch + 2 * (7 * protocol.tree_link_hop + 3 * protocol.tree_network_hop)
    assert Cluster(ROUND, 64).all_reduce_seconds(0) == pytest.approx(tree)
    assert tree < latency


def test_only_the_gradients_of_the_first_block_and_the_embeddings_are_reduced_after_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "STRAGGLING", 0.0)
    node = Cluster(ROUND, 8)
    exposed = exposed_seconds(node, LAYERS, Passes(seconds=60.0), "ddp")
    buckets = 4 * (1e7 + 2e7) / model.BUCKET_BYTES
    assert exposed == pytest.approx(buckets * node.all_reduce_seconds(model.BUCKET_BYTES), rel=1e-6)
    untied = replace(LAYERS, head_parameters=2e7, embedding_parameters=0)
    first_block = exposed_seconds(node, untied, Passes(seconds=60.0), "ddp")
    assert first_block == pytest.approx(exposed / 3, rel=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_without_computation_nothing_overlaps(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "PROTOCOLS", (replace(PROTOCOLS[1], launch=0, **dict.fromkeys(_HOPS, 0.0)),))
    node, seconds = Cluster(ROUND, 8), 1e-9
    exposed = exposed_seconds(node, LAYERS, Passes(seconds, gather_bytes=2, reduce_bytes=4), strategy)
    gathered = 2 * 4 * 1e7 + 2e7 if strategy == "fsdp" else 0  # blocks twice, the rest once
    sent = 7 / 8 * (2 * gathered + 4 * 6e7 * (1 if strategy == "fsdp" else 2))
    assert exposed == pytest.approx(sent / (LINK_EFFICIENCY * 100e9), rel=1e-3)


_HOPS = ("link_hop", "network_hop", "tree_link_hop", "tree_network_hop")


def test_accumulation_reduces_gradients_once_but_gathers_weights_for_every_micro_batch() -> None:
    slow = Cluster(replace(ROUND, link_bandwidth=1e9), 8)

    def exposed(micro_batches: int, strategy: Strategy) -> float:
        return exposed_seconds(slow, LAYERS, Passes(1e-6, micro_batches), strategy)

    assert exposed(4, "ddp") == pytest.approx(exposed(1, "ddp"), rel=1e-4)
    assert exposed(4, "fsdp") > 2 * exposed(1, "fsdp")


def test_more_nodes_wait_longer_for_the_slowest_one() -> None:
    fast = replace(ROUND, link_bandwidth=math.inf, network_bandwidth=math.inf)
    exposed = [exposed_seconds(Cluster(fast, gpus), LAYERS, Passes(100.0), "ddp") for gpus in (8, 16, 64)]
    assert exposed == pytest.approx([0, 100 * STRAGGLING, 300 * STRAGGLING], abs=0.01)


def test_a_fixed_batch_scales_worse_than_a_fixed_batch_per_device() -> None:
    size = ["model.n_layer=12", "model.n_embd=768", "model.n_head=12", "training.global_batch_size=512"]
    small = recipe(*size, "training.optimizer=adamw")
    table = simulate_scaling(small, 50_304, find("h100-sxm"), [1, 8, 64, 1024])
    assert [row.gpus for row in table.strong] == [1, 8, 64], "512 sequences cannot be divided among 1024 devices"
    assert [row.gpus for row in table.weak] == [1, 8, 64, 1024]
    assert table.strong[0].efficiency == table.weak[0].efficiency == 1
    assert table.strong[2].efficiency < table.weak[2].efficiency
    for rows in (table.strong, table.weak):
        assert [row.efficiency for row in rows] == sorted((row.efficiency for row in rows), reverse=True)
        for row in rows:
            assert row.micro_batch_size * row.gradient_accumulation_steps * row.gpus == row.global_batch_size
            assert row.tokens_per_second * row.seconds_per_step == pytest.approx(row.tokens_per_step)
    with pytest.raises(InputError, match=r"512 sequences cannot be divided among 3 or 1024 devices \(include 1 in --gpus\)"):
        simulate_scaling(small, 50_304, find("h100-sxm"), [3, 1024])
