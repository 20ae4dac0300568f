"""Which parameter gets which update, and optimizer state that travels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import ids, model
from torch import Tensor

from tinylm.model.objective import CausalObjective
from tinylm.model.transformer import Transformer
from tinylm.optim import groups
from tinylm.optim.groups import Optimizers
from tinylm.recipe.schema import AdamWOptimizer, MuonOptimizer, Optimizer

SECTIONS: list[Optimizer] = [MuonOptimizer(name="muon"), AdamWOptimizer(name="adamw")]


def _build(section: Optimizer, **parts: Any) -> tuple[Transformer, Optimizers]:
    network = model("gpt2", **parts).train()
    return network, groups.build(section, network, network.stacked_matrices())


def _step(network: Transformer, optimizers: Optimizers, seed: int) -> None:
    optimizers.zero_grad()
    CausalObjective().losses(network, ids(2, 10, seed=seed)).mean().backward()
    optimizers.step()


def _decays(optimizers: Optimizers, network: Transformer) -> dict[str, tuple[str, float]]:
    names = {parameter: name for name, parameter in network.named_parameters()}
    return {
        names[parameter]: (part, group["weight_decay"])
        for part, optimizer in optimizers.parts.items()
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_adamw_decays_matrices_only() -> None:
    network, optimizers = _build(AdamWOptimizer(name="adamw", weight_decay=0.3))
    decays = _decays(optimizers, network)
    assert set(decays) == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        assert decays[name] == ("adamw", 0.3 if parameter.ndim == 2 else 0.0), name


def test_muon_takes_the_matrices_inside_blocks_and_adamw_the_rest_without_decay() -> None:
    network, optimizers = _build(MuonOptimizer(name="muon", weight_decay=0.3))
    decays = _decays(optimizers, network)
    assert set(decays) == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        inside = name.startswith("blocks.") and parameter.ndim == 2
        assert decays[name] == (("muon", 0.3) if inside else ("adamw", 0.0)), name


def test_adamw_steps_are_torchs_plain_adamw() -> None:
    section = AdamWOptimizer(name="adamw", lr=3e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    network, twin = (
        model("gpt2").double(),
        model("gpt2").double(),
    )  # a key's bias has no gradient but rounding, which Adam would amplify
    optimizers = groups.build(section, network, {})
    other = torch.optim.AdamW(
        [
            {"params": [p for p in twin.parameters() if p.ndim > 1], "weight_decay": 0.2},
            {"params": [p for p in twin.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=3e-3,
        betas=(0.8, 0.9),
        eps=1e-6,
        foreach=False,
        fused=False,
    )
    for seed in range(3):
        _step(network, optimizers, seed)
        other.zero_grad()
        CausalObjective().losses(twin, ids(2, 10, seed=seed)).mean().backward()
        other.step()
    for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-7)


def test_stacked_matrices_reach_muon() -> None:
    """Told nothing of queries, keys and values, it would take another step."""
    section = MuonOptimizer(name="muon")
    (told, optimizers), (untold, _) = _build(section), _build(section)
    _step(told, optimizers, 0)
    _step(untold, groups.build(section, untold, {}), 0)
    assert not torch.allclose(told.blocks[0].attention.qkv.weight, untold.blocks[0].attention.qkv.weight, atol=1e-4)
    assert torch.equal(told.blocks[0].attention.output.weight, untold.blocks[0].attention.output.weight)


def test_rates_follow_the_multiplier_from_each_groups_own_peak() -> None:
    _, optimizers = _build(MuonOptimizer(name="muon", lr=0.5, adamw_lr=0.1))
    optimizers.set_rate(0.5)
    optimizers.set_rate(0.2)
    assert [group["lr"] for group in optimizers.parts["muon"].param_groups] == pytest.approx([0.1])
    assert [group["lr"] for group in optimizers.parts["adamw"].param_groups] == pytest.approx([0.02, 0.02])


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_state_put_back_continues_bit_for_bit(section: Optimizer) -> None:
    network, optimizers = _build(section)
    for seed in range(3):
        _step(network, optimizers, seed)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    state: dict[str, Tensor] = {name: value.clone() for name, value in optimizers.state().items()}
    for seed in range(3, 6):
        _step(network, optimizers, seed)

    resumed, others = _build(section)
    resumed.load_state_dict(weights)
    others.load_state(state)
    for seed in range(3, 6):
        _step(resumed, others, seed)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), resumed.parameters(), strict=True))
    assert others.state().keys() == optimizers.state().keys()
    assert all(torch.equal(value, others.state()[name]) for name, value in optimizers.state().items())


def test_state_put_back_is_not_shared_with_where_it_came_from() -> None:
    network, optimizers = _build(SECTIONS[0])
    _step(network, optimizers, 0)
    state = optimizers.state()
    kept = {name: value.clone() for name, value in state.items()}
    other, others = _build(SECTIONS[0])
    others.load_state(state)
    _step(other, others, 1)
    assert all(torch.equal(kept[name], value) for name, value in state.items())


def test_state_of_an_unknown_parameter_is_refused() -> None:
    _, optimizers = _build(SECTIONS[1])
    with pytest.raises(KeyError):
        optimizers.load_state({"adamw/no.such.weight/step": torch.zeros(())})
