"""The parts of a transformer block: norms, attention, feed-forward.

Legend: B batch, T time, S source time, C width, H heads, K key/value heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.model.cache import KeyValueCache
from tinylm.model.positions import rotate
from tinylm.recipe.schema import ModelSection

Rotation = tuple[Tensor, Tensor]


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm (Zhang & Sennrich 2019) over the last axis, computed in the type of its input under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(model: ModelSection, width: int) -> nn.Module:
    """The norm that the recipe names, over the last axis."""
    if model.norm == "layernorm":
        return nn.LayerNorm(width, eps=model.norm_eps, bias=model.bias)
    return RMSNorm(width, eps=model.norm_eps)


class Attention(nn.Module):
    """Multi-head attention, with fewer key/value heads than query heads when `n_kv_head` says so (Ainslie et al. 2023).

    Queries come from one source, keys and values from the same one or another (cross-attention). The three projections
    are one matrix, its rows being queries, keys, values.
    """

    def __init__(self, model: ModelSection, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = model.n_head, model.kv_heads, model.head_width
        self.dropout = model.dropout
        self.layer = layer
        self.query_rows = self.heads * self.head_width
        rows = self.query_rows + 2 * self.kv_heads * self.head_width
        self.qkv = nn.Linear(model.n_embd, rows, bias=model.bias)
        self.output = nn.Linear(self.query_rows, model.n_embd, bias=model.bias)
        self.query_norm = RMSNorm(self.head_width, eps=model.norm_eps) if model.qk_norm else None
        self.key_norm = RMSNorm(self.head_width, eps=model.norm_eps) if model.qk_norm else None

    def forward(
        self,
        queries_from: Tensor,
        keys_from: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        rotation: Rotation | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C).

        `keys_from` (B, S, C), default the queries' source. `mask` broadcasts to (B, H, T, S), True = may look. `causal`
        lets position t look at positions up to t, counted from the end of what `cache` holds.
        """
        B, T, _ = queries_from.shape
        q, k, v = self._project(queries_from, keys_from)  # (B, heads, time, D)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        S = k.shape[2]
        if causal and T > 1 and (mask is not None or S > T):  # the kernel's own causality takes no mask and no cached positions
            earlier = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
            mask = earlier if mask is None else mask & earlier
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal and mask is None and T > 1,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.kv_heads != self.heads,
        )
        output: Tensor = self.output(mixed.transpose(1, 2).reshape(B, T, self.query_rows))
        return output

    def _project(self, queries_from: Tensor, keys_from: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if keys_from is None:
            q, k, v = self.qkv(queries_from).split(
                (self.query_rows, self.kv_heads * self.head_width, self.kv_heads * self.head_width), dim=-1
            )
        else:
            rows, bias = self.query_rows, self.qkv.bias
            q = F.linear(queries_from, self.qkv.weight[:rows], None if bias is None else bias[:rows])
            k, v = F.linear(keys_from, self.qkv.weight[rows:], None if bias is None else bias[rows:]).chunk(2, dim=-1)
        return self._heads(q), self._heads(k), self._heads(v)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_width).transpose(1, 2)


class FeedForward(nn.Module):
    """Two projections with a non-linearity between, or SwiGLU's three (Shazeer 2020): the gate's rows before the values'."""

    def __init__(self, model: ModelSection) -> None:
        super().__init__()
        self.kind = model.feed_forward
        width = model.feed_forward_width
        self.input = nn.Linear(model.n_embd, 2 * width if self.kind == "swiglu" else width, bias=model.bias)
        self.output = nn.Linear(width, model.n_embd, bias=model.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.input(x)
        if self.kind == "gelu":
            hidden = F.gelu(hidden, approximate="tanh")
        elif self.kind == "relu":
            hidden = F.relu(hidden)
        elif self.kind == "relu2":  # So et al. 2021
            hidden = F.relu(hidden)
            hidden = hidden * hidden
        else:
            gate, values = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * values
        output: Tensor = self.output(hidden)
        return output


class Block(nn.Module):
    """Attention and feed-forward around a residual stream, normalised before (pre) or after (post) each sum."""

    def __init__(self, model: ModelSection, layer: int) -> None:
        super().__init__()
        self.post = model.norm_position == "post"
        self.parallel = model.parallel_residual
        self.attention_norm = make_norm(model, model.n_embd)
        self.attention = Attention(model, layer)
        self.feed_forward_norm = None if self.post and self.parallel else make_norm(model, model.n_embd)
        self.feed_forward = FeedForward(model)
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, x: Tensor, rotation: Rotation | None, cache: KeyValueCache | None) -> Tensor:
        """(B, T, C) -> (B, T, C), causal."""

        def attend(x: Tensor) -> Tensor:
            mixed: Tensor = self.dropout(self.attention(x, causal=True, rotation=rotation, cache=cache))
            return mixed

        def feed(x: Tensor) -> Tensor:
            fed: Tensor = self.dropout(self.feed_forward(x))
            return fed

        if self.feed_forward_norm is None:
            return self._norm(self.attention_norm, x + attend(x) + feed(x))
        if self.post:
            x = self._norm(self.attention_norm, x + attend(x))
            return self._norm(self.feed_forward_norm, x + feed(x))
        if self.parallel:
            return x + attend(self.attention_norm(x)) + feed(self.feed_forward_norm(x))
        x = x + attend(self.attention_norm(x))
        return x + feed(self.feed_forward_norm(x))

    @staticmethod
    def _norm(norm: nn.Module, x: Tensor) -> Tensor:
        normalised: Tensor = norm(x)
        return normalised
