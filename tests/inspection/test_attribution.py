"""The contributions of all components add up to the model's logits, for every model option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model.parts import case_network, cases_and_presets
from tiny import PRESETS, ids, model

from tinylm.errors import InputError
from tinylm.inspection import attribution

COMBINATIONS: list[dict[str, Any]] = [
    {"parallel_residual": True, "norm_position": "post"},
    {"norm_position": "post", "embedding_shortcut": True, "norm": "layernorm", "bias": True},
    {"norm_position": "both", "embedding_norm": True, "norm": "layernorm", "bias": True, "norm_gain": True},
    {"value_embeddings": 1, "value_residual": True, "n_kv_head": 2, "ngram_embeddings": [2], "embedding_shortcut": True},
    {"norm_position": "output", "bias": True, "logit_softcap": 3.0},
]
CASES = [*cases_and_presets(), *((preset, overrides) for overrides in COMBINATIONS for preset in PRESETS)]


@pytest.mark.parametrize(("preset", "overrides"), CASES)
def test_contributions_sum_to_the_logit_at_every_position(preset: str, overrides: dict[str, Any]) -> None:
    network, tokens = case_network(overrides, preset), ids(2, 12)
    targets = ids(2, 12, seed=1)
    result = attribution(network, tokens, targets)
    with torch.no_grad():
        logits = network(tokens).gather(-1, targets[..., None])[..., 0]
    cap = network.model.logit_softcap
    expected = logits if cap is None else cap * torch.atanh((logits / cap).double()).float()
    far_from_cap = torch.ones_like(logits, dtype=torch.bool) if cap is None else logits.abs() < 0.9 * cap
    torch.testing.assert_close(result.sums[far_from_cap], expected[far_from_cap], atol=2e-4, rtol=1e-4)
    assert result.remainder < 1e-3
    assert len(result.components) == len(set(result.components)) == len(result.contributions)


def test_the_attribution_of_a_logit_difference_is_the_difference_between_two_attributions() -> None:
    network, tokens = model("gpt2"), ids(1, 8)
    targets, against = ids(1, 8, seed=1), ids(1, 8, seed=2)
    difference = attribution(network, tokens, targets, against)
    separate = attribution(network, tokens, targets).contributions - attribution(network, tokens, against).contributions
    torch.testing.assert_close(difference.contributions, separate, atol=1e-5, rtol=1e-5)


def test_removing_a_head_changes_the_logit_by_its_contribution() -> None:
    """With RMSNorm and a fixed final-norm scale, a head's contribution equals the drop in the logit when the head is removed.

    The last feed-forward layer reads this head's output. The test therefore restores the layer's original output.
    """
    network, tokens = model("llama"), ids(1, 8)
    targets = ids(1, 8, seed=1)
    result = attribution(network, tokens, targets)
    with torch.no_grad():
        _, cache = network.run_with_cache(tokens)

        def remove(z: torch.Tensor, name: str) -> None:
            z[:, :, 2] = 0

        def restore(x: torch.Tensor, name: str) -> torch.Tensor:
            return cache[name]

        with network.hooks({"blocks.1.attn.z": remove, "blocks.1.mlp_out": restore}):
            _, without = network.run_with_cache(tokens, ["blocks.1.resid_post"])
        residual = cache["blocks.1.resid_post"]
        scale = torch.rsqrt(residual.square().mean(-1, keepdim=True) + network.model.norm_eps)
        removed = (residual - without["blocks.1.resid_post"]) * scale * network.final_norm.weight  # type: ignore[union-attr, operator]
        expected = (removed * network.head.weight[targets]).sum(-1)
    torch.testing.assert_close(result.contributions[result.components.index("L1H2")], expected, atol=1e-5, rtol=1e-4)


def test_architectures_that_are_not_decoders_are_rejected() -> None:
    from bigram import Bigram, BigramSection

    network = Bigram(BigramSection(context_length=8), 20)
    with pytest.raises(InputError, match="bigram architecture cannot be split into components"):
        attribution(network, ids(1, 4, vocab_size=20), ids(1, 4, vocab_size=20))
