"""Compare attention, feed-forward layers, norms and position embeddings with their formulas and with PyTorch modules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import section
from torch import Tensor, nn

from tinylm.model.functions import rotate
from tinylm.model.layers import Attention, FeedForward, make_norm
from tinylm.model.positions import rope_table, sinusoidal_table


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _attention(**overrides: object) -> Attention:
    torch.manual_seed(0)
    attention = Attention(section("gpt2", **overrides), 0).eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return attention


def _reference_attention(attention: Attention, x: Tensor, kv_source: Tensor, mask: Tensor | None) -> Tensor:
    """Compute softmax(q k' / sqrt(D)) v, one head at a time."""
    heads, kv_heads, width = attention.heads, attention.kv_heads, attention.head_width
    weight, bias = attention.qkv.weight, attention.qkv.bias
    queries = F.linear(x, weight[: heads * width], bias[: heads * width])
    keys = F.linear(kv_source, weight[heads * width : (heads + kv_heads) * width], bias[heads * width : (heads + kv_heads) * width])
    values = F.linear(kv_source, weight[(heads + kv_heads) * width :], bias[(heads + kv_heads) * width :])
    outputs = []
    for head in range(heads):
        group = head // (heads // kv_heads)
        q = queries[..., head * width : (head + 1) * width]
        k = keys[..., group * width : (group + 1) * width]
        v = values[..., group * width : (group + 1) * width]
        scores = torch.einsum("btd,bsd->bts", q, k) / math.sqrt(width)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        outputs.append(torch.einsum("bts,bsd->btd", scores.softmax(dim=-1), v))
    return F.linear(torch.cat(outputs, dim=-1), attention.output.weight, attention.output.bias)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_causal_attention_matches_the_formula(kv_heads: int) -> None:
    attention, x = _attention(n_kv_head=kv_heads), _random(2, 7, 32)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(x, causal=True)[0], _reference_attention(attention, x, x, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_masked_cross_attention_matches_the_formula(kv_heads: int) -> None:
    attention, x, source = _attention(n_kv_head=kv_heads), _random(2, 5, 32), _random(2, 9, 32, seed=1)
    mask = torch.rand(2, 5, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[..., 0] = True
    output, _ = attention(x, source, mask=mask[:, None])
    torch.testing.assert_close(output, _reference_attention(attention, x, source, mask), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention(x, source)[0], _reference_attention(attention, x, source, None), atol=1e-5, rtol=1e-5)


def test_cross_attention_matches_torch_multihead_attention() -> None:
    attention, x, source = _attention(), _random(2, 5, 32), _random(2, 9, 32, seed=1)
    other = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    other.load_state_dict(
        {
            "in_proj_weight": attention.qkv.weight,
            "in_proj_bias": attention.qkv.bias,
            "out_proj.weight": attention.output.weight,
            "out_proj.bias": attention.output.bias,
        }
    )
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    theirs, _ = other(x, source, source, key_padding_mask=padding)
    torch.testing.assert_close(attention(x, source, mask=~padding[:, None, None])[0], theirs, atol=1e-5, rtol=1e-5)


def test_a_mask_is_combined_with_the_causal_mask() -> None:
    attention, x = _attention(), _random(2, 6, 32)
    mask = torch.ones(2, 6, 6, dtype=torch.bool)
    mask[1, :, 1] = False
    combined = mask & torch.ones(6, 6, dtype=torch.bool).tril()
    output, _ = attention(x, mask=mask[:, None], causal=True)
    torch.testing.assert_close(output, _reference_attention(attention, x, x, combined), atol=1e-5, rtol=1e-5)


def test_with_qk_norm_attention_is_invariant_to_the_scale_of_queries_and_keys() -> None:
    plain, normed = _attention(), _attention(qk_norm=True)
    x = _random(1, 6, 32)
    for attention in (plain, normed):
        with torch.no_grad():
            attention.qkv.bias.zero_()
            attention.output.bias.zero_()
            before, _ = attention(x)
            attention.qkv.weight[: 2 * attention.query_rows] *= 10  # scales queries and keys, not values
            invariant = torch.allclose(attention(x)[0], before, atol=1e-4)
        assert invariant == (attention is normed)


@pytest.mark.parametrize("kind", ["gelu", "relu", "relu2", "swiglu"])
def test_feed_forward_matches_the_formula(kind: str) -> None:
    torch.manual_seed(0)
    model = section(feed_forward=kind, bias=True)
    layer, x = FeedForward(model), _random(3, 32)
    hidden = x @ layer.input.weight.T + layer.input.bias
    if kind == "swiglu":
        gate, values = hidden[:, : model.feed_forward_width], hidden[:, model.feed_forward_width :]
        hidden = gate / (1 + torch.exp(-gate)) * values
    elif kind == "gelu":  # tanh approximation (Hendrycks & Gimpel 2016), as in GPT-2
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    else:
        hidden = hidden.clamp_min(0) ** (2 if kind == "relu2" else 1)
    torch.testing.assert_close(layer(x), hidden @ layer.output.weight.T + layer.output.bias, atol=1e-5, rtol=1e-5)


def test_norms_match_their_formulas() -> None:
    x = _random(4, 32) * 3 + 1
    layer = make_norm(section("gpt2"), 32)
    centered = x - x.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(layer(x), centered / (x.var(dim=-1, unbiased=False, keepdim=True) + 1e-5).sqrt())
    rms_norm = make_norm(section("llama", norm_eps=0.5), 32)
    torch.testing.assert_close(rms_norm(x), x / (x.pow(2).mean(dim=-1, keepdim=True) + 0.5).sqrt())


def test_layer_norm_has_a_bias_only_if_the_model_has_biases() -> None:
    assert make_norm(section("gpt2"), 32).bias is not None
    assert make_norm(section("gpt2", bias=False), 32).bias is None


def test_rotate_rotates_each_pair_by_position_times_frequency() -> None:
    """Su et al. 2021, equation 34, in complex numbers: pair i is rotated by the angle t * theta^(-2i/D)."""
    x, width, theta = _random(1, 2, 5, 8), 8, 100.0
    rotated = rotate(x, *rope_table(5, width, theta))
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    for t in range(5):
        for i in range(4):
            expected = pairs[0, :, t, i] * complex(math.cos(t * theta ** (-2 * i / width)), math.sin(t * theta ** (-2 * i / width)))
            torch.testing.assert_close(rotated[0, :, t, i].double(), expected.real, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(rotated[0, :, t, i + 4].double(), expected.imag, atol=1e-5, rtol=1e-5)


def test_rotated_dot_products_depend_only_on_the_distance() -> None:
    q, k = _random(8), _random(8, seed=1)
    cosines, sines = rope_table(40, 8, 10000.0)
    rotated = rotate(torch.stack([q, k]).view(2, 1, 1, 8).expand(2, 1, 40, 8), cosines, sines)[:, 0]
    torch.testing.assert_close(rotated[0, 7] @ rotated[1, 3], rotated[0, 33] @ rotated[1, 29], atol=1e-5, rtol=1e-5)
    assert abs(rotated[0, 7] @ rotated[1, 3] - rotated[0, 7] @ rotated[1, 4]) > 1e-3


def test_sinusoidal_position_embeddings_match_the_transformer_paper() -> None:
    """Vaswani et al. 2017, section 3.5."""
    table = sinusoidal_table(30, 12)
    for position in (0, 1, 29):
        for i in range(6):
            angle = position / 10000 ** (2 * i / 12)
            assert float(table[position, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(table[position, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-6)
