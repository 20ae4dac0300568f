"""Check which optimizer updates which parameter, and that the optimizer state can be saved and restored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import causal_batch, ids, model
from torch import Tensor

from tinylm.model.transformer import Transformer
from tinylm.optim import groups
from tinylm.optim.groups import Optimizers
from tinylm.recipe.schema import AdamWOptimizer, MuonOptimizer, Optimizer
from tinylm.training.objectives import CausalLM

SECTIONS: list[Optimizer] = [
    MuonOptimizer(name="muon"),
    AdamWOptimizer(name="adamw"),
    MuonOptimizer(name="muon", momentum_warmup=5, cautious_weight_decay=True),
]


def _build(section: Optimizer, **parts: Any) -> tuple[Transformer, Optimizers]:
    network = model("gpt2", **parts).train()
    return network, groups.build(section, network)


def _backward(network: Transformer, seed: int) -> None:
    objective = CausalLM()
    objective.losses(network, causal_batch(ids(2, 10, seed=seed))).mean().backward()


def _step(network: Transformer, optimizers: Optimizers, seed: int) -> None:
    optimizers.zero_grad()
    _backward(network, seed)
    optimizers.step()


def _decays(optimizers: Optimizers, network: Transformer) -> dict[str, tuple[str, float]]:
    names = {parameter: name for name, parameter in network.named_parameters()}
    return {
        names[parameter]: (part, group["weight_decay"])
        for part, optimizer in optimizers.parts.items()
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_adamw_decays_only_matrices() -> None:
    network, optimizers = _build(AdamWOptimizer(name="adamw", weight_decay=0.3))
    decays = _decays(optimizers, network)
    assert set(decays) == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        assert decays[name] == ("adamw", 0.3 if parameter.ndim == 2 else 0.0), name


def test_muon_updates_the_matrices_in_blocks_and_adamw_updates_the_rest_without_decay() -> None:
    network, optimizers = _build(MuonOptimizer(name="muon", weight_decay=0.3))
    decays = _decays(optimizers, network)
    assert set(decays) == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        is_matrix = name.startswith("blocks.") and parameter.ndim == 2
        assert decays[name] == (("muon", 0.3) if is_matrix else ("adamw", 0.0)), name


def test_adamw_steps_match_unfused_torch_adamw() -> None:
    section = AdamWOptimizer(name="adamw", lr=3e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    # Use float64: the gradient of a key bias is only rounding noise, and Adam amplifies it.
    network, reference = model("gpt2").double(), model("gpt2").double()
    optimizers = groups.build(section, network)
    other = torch.optim.AdamW(
        [
            {"params": [p for p in reference.parameters() if p.ndim > 1], "weight_decay": 0.2},
            {"params": [p for p in reference.parameters() if p.ndim == 1], "weight_decay": 0.0},
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
        _backward(reference, seed)
        other.step()
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-7)


def test_muon_orthogonalizes_stacked_matrices_separately() -> None:
    """If `stacked_matrices` does not list the fused query, key and value weight, Muon orthogonalizes it as one matrix."""
    section = MuonOptimizer(name="muon")
    (split, optimizers), (unsplit, _) = _build(section), _build(section)
    _step(split, optimizers, 0)
    unsplit.stacked_matrices = dict
    _step(unsplit, groups.build(section, unsplit), 0)
    assert not torch.allclose(split.blocks[0].attention.qkv.weight, unsplit.blocks[0].attention.qkv.weight, atol=1e-4)
    assert torch.equal(split.blocks[0].attention.output.weight, unsplit.blocks[0].attention.output.weight)


def test_the_learning_rate_of_each_group_is_its_peak_times_the_multiplier() -> None:
    _, optimizers = _build(MuonOptimizer(name="muon", lr=0.5, adamw_lr=0.1))
    optimizers.scale_lr(0.5)
    optimizers.scale_lr(0.2)
    assert [group["lr"] for group in optimizers.parts["muon"].param_groups] == pytest.approx([0.1])
    assert [group["lr"] for group in optimizers.parts["adamw"].param_groups] == pytest.approx([0.02, 0.02])


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_training_continues_bit_for_bit_from_a_restored_state(section: Optimizer) -> None:
    network, optimizers = _build(section)
    for seed in range(3):
        _step(network, optimizers, seed)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    state: dict[str, Tensor] = {name: value.clone() for name, value in optimizers.state().items()}
    for seed in range(3, 6):
        _step(network, optimizers, seed)

    resumed, resumed_optimizers = _build(section)
    resumed.load_state_dict(weights)
    resumed_optimizers.load_state(state)
    for seed in range(3, 6):
        _step(resumed, resumed_optimizers, seed)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), resumed.parameters(), strict=True))
    assert resumed_optimizers.state().keys() == optimizers.state().keys()
    assert all(torch.equal(value, resumed_optimizers.state()[name]) for name, value in optimizers.state().items())


def test_a_restored_state_is_a_copy() -> None:
    network, optimizers = _build(SECTIONS[0])
    _step(network, optimizers, 0)
    state = optimizers.state()
    kept = {name: value.clone() for name, value in state.items()}
    other_network, other_optimizers = _build(SECTIONS[0])
    other_optimizers.load_state(state)
    _step(other_network, other_optimizers, 1)
    assert all(torch.equal(kept[name], value) for name, value in state.items())


def test_the_state_of_an_unknown_parameter_is_rejected() -> None:
    _, optimizers = _build(SECTIONS[1])
    with pytest.raises(KeyError):
        optimizers.load_state({"adamw/no.such.weight/step": torch.zeros(())})


@pytest.mark.parametrize(
    ("device", "supports_bf16", "setting", "expected"),
    [
        ("cuda", True, "auto", "bf16"),
        ("cuda", False, "auto", "fp32"),
        ("cpu", True, "auto", "bf16"),
        ("cpu", False, "auto", "fp32"),
        ("mps", True, "auto", "fp32"),
        ("cpu", False, "bf16", "bf16"),
        ("cuda", True, "fp32", "fp32"),
    ],
)
def test_newton_schulz_uses_the_configured_dtype_and_auto_uses_bfloat16_if_the_device_supports_it(
    device: str, supports_bf16: bool, setting: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supports_bf16 or including_emulation)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: supports_bf16)
    section = MuonOptimizer(name="muon", newton_schulz_dtype=setting)
    assert groups.resolve_muon(section, torch.device(device)).newton_schulz_dtype == expected


@pytest.mark.parametrize(
    ("device", "has_bf16_units", "keys", "expected"),
    [
        ("cpu", False, {}, "rational"),
        ("cpu", True, {}, "newton_schulz"),
        ("cuda", False, {}, "newton_schulz"),
        ("cpu", False, {"newton_schulz_steps": 5}, "newton_schulz"),
        ("cpu", False, {"newton_schulz_dtype": "fp32"}, "newton_schulz"),
        ("cpu", True, {"orthogonalization": "rational"}, "rational"),
    ],
)
def test_auto_orthogonalization_depends_on_the_device_and_on_newton_schulz_keys(
    device: str, has_bf16_units: bool, keys: dict[str, object], expected: str
) -> None:
    section = MuonOptimizer.model_validate({"name": "muon", **keys})
    assert section.resolved(device, has_bf16_units=has_bf16_units).orthogonalization == expected


@pytest.mark.parametrize("coefficients", ["classic", "polar_express"])
def test_muon_in_bfloat16_is_close_to_float32(coefficients: str) -> None:
    networks = []
    for dtype in ("fp32", "bf16"):
        network = model("gpt2").train()
        section = MuonOptimizer(name="muon", newton_schulz_dtype=dtype, newton_schulz=coefficients)
        optimizers = groups.build(section, network)
        generator = torch.Generator().manual_seed(0)
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizers.step()
        networks.append(network)
    for name, start in model("gpt2").named_parameters():
        exact, half = (network.get_parameter(name) for network in networks)
        updated_by_muon = name.startswith("blocks.") and start.ndim == 2
        assert torch.equal(exact, half) is not updated_by_muon, name
        assert (exact - half).norm() < 0.05 * (exact - start).norm(), name


def test_muon_uses_the_settings_from_the_recipe() -> None:
    section = MuonOptimizer(
        name="muon",
        lr=0.03,
        momentum=0.9,
        momentum_warmup=7,
        newton_schulz="classic",
        newton_schulz_steps=4,
        weight_decay=0.2,
        cautious_weight_decay=True,
    )
    _, optimizers = _build(section)
    [group] = optimizers.parts["muon"].param_groups
    assert (group["lr"], group["momentum"], group["momentum_warmup"]) == (0.03, 0.9, 7)
    assert (group["coefficients"], group["steps"]) == ("classic", 4)
    assert (group["weight_decay"], group["cautious"]) == (0.2, True)
