"""Attention with a block mask equals attention with a dense mask. On a CPU, FlexAttention is not compiled and has no gradients."""

from __future__ import annotations

import pytest
import torch
from tiny import causal_batch, ids, model, section

from tinylm.model import block_mask
from tinylm.model.block_mask import block_masked_attention, segment_block_mask
from tinylm.model.positions import segment_mask
from tinylm.model.transformer import Transformer
from tinylm.training.compilation import Trial
from tinylm.training.feed import LocalBatch
from tinylm.training.objectives import CausalLM
from tinylm.training.precision import Precision
from tinylm.training.step import GradientSettings, accumulate

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
SEGMENTS = torch.tensor([[0] * 5 + [1] * 9 + [2] * 6, [3] * 20, list(range(20))])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_with_a_block_mask_equals_attention_with_a_dense_mask(causal: bool, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 20, 16, generator=generator) for heads in (4, kv_heads, kv_heads))
    attended = block_masked_attention(q, k, v, segment_block_mask(SEGMENTS, causal=causal))
    mask = segment_mask(SEGMENTS, causal=causal)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(attended, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("preset", ["modern", "gpt2", "llama"])
@torch.no_grad()
def test_a_model_returns_the_same_values_with_a_block_mask_and_with_a_dense_mask(preset: str) -> None:
    attention = model(preset, n_head=2, context_length=20).blocks[0].get_submodule("attention")
    x = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(0))
    dense, _ = attention(x, mask=segment_mask(SEGMENTS))
    blocks, _ = attention(x, mask=segment_block_mask(SEGMENTS))
    torch.testing.assert_close(blocks, dense, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "supported"),
    [
        ({}, True),
        ({"n_kv_head": 1}, True),
        ({"n_head": 4}, False),  # a head width of 8
        ({"attention_window": 4}, False),
        ({"attention_softcap": 5.0}, False),
        ({"attention_dropout": 0.1}, False),
    ],
    ids=str,
)
def test_block_masks_are_used_for_plain_attention_on_cuda(
    overrides: dict[str, float], supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_mask, "has_triton", lambda: True)
    chosen = section("modern", **{"n_head": 2, **overrides})
    assert block_mask.is_supported(chosen, torch.device("cuda")) == supported
    assert not block_mask.is_supported(chosen, torch.device("cpu"))


def _network() -> Transformer:
    network = model("modern", n_head=2, context_length=20).train()
    network.compile_loss = True  # allows a block mask
    return network


BATCH = LocalBatch.whole(causal_batch(ids(2, 21), (torch.arange(21) // 7).int().expand(2, -1)))
SETTINGS = GradientSettings(2, Precision("fp32", torch.device("cpu")), CausalLM())


def _gradient(network: Transformer) -> torch.Tensor:
    accumulate(network, BATCH, SETTINGS)
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])


def test_training_uses_a_dense_mask_after_one_warning_if_flex_attention_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel for this GPU\nwith a long message")

    expected = _gradient(_network())
    monkeypatch.setattr(block_mask.flex, "enabled", True)  # restored after the test
    monkeypatch.setattr(block_mask, "is_supported", lambda model, device: True)
    monkeypatch.setattr(block_mask, "flex_attention", fail)
    network = _network()
    with pytest.warns(UserWarning, match=r"cannot use FlexAttention \(no kernel for this GPU\); using a dense mask") as warned:
        Trial(network, BATCH, SETTINGS).seconds()
    assert len(warned) == 1
    assert torch.equal(_gradient(network), expected)


def test_an_error_that_also_occurs_with_a_dense_mask_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_mask.flex, "used", True)
    network = _network()
    monkeypatch.setattr(network, "hidden", None)
    with pytest.raises(TypeError):
        Trial(network, BATCH, SETTINGS).run()
    assert block_mask.flex.enabled
