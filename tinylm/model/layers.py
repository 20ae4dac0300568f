"""The parts of a transformer block: norms, attention, feed-forward.

Legend: B batch, T time, S source time, C width, H heads, K key/value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.model.cache import CacheRows
from tinylm.model.functions import Dropout, relu_squared, rms_norm, rotate
from tinylm.recipe.schema import ModelSection

Rotation = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a learned gain or without."""

    def __init__(self, width: int, eps: float, gain: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def make_norm(model: ModelSection, width: int) -> nn.Module:
    """The norm that the recipe names, over the last axis."""
    if model.norm == "layernorm":
        return nn.LayerNorm(width, eps=model.norm_eps, elementwise_affine=model.norm_gain, bias=model.bias)
    return RMSNorm(width, model.norm_eps, model.norm_gain)


@dataclass(frozen=True)
class ForwardContext:
    """What every block of one forward pass may look at."""

    tokens: Tensor
    """(B, T) ids."""
    embedded: Tensor
    """(B, T, C), what the first block reads."""
    rotation: Rotation | None = None
    """Cosines and sines, (T, 1, D / 2)."""
    cache: CacheRows | None = None


class Attention(nn.Module):
    """Multi-head attention, with fewer key/value heads than query heads when `n_kv_head` says so (Ainslie et al. 2023).

    Queries come from one source, keys and values from the same one or another (cross-attention). The three projections
    are one matrix, its rows being queries, keys, values.
    """

    def __init__(self, model: ModelSection, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = model.n_head, model.kv_heads, model.head_width
        self.dropout = model.attention_drops
        self.layer = layer
        self.query_rows = self.heads * self.head_width
        rows = self.query_rows + 2 * self.kv_heads * self.head_width
        self.qkv = nn.Linear(model.n_embd, rows, bias=model.bias)
        self.output = nn.Linear(self.query_rows, model.n_embd, bias=model.bias)
        self.qk_norm_eps = model.norm_eps if model.qk_norm else None
        gains = model.qk_norm and model.qk_gain
        self.query_gain = nn.Parameter(torch.ones(self.head_width)) if gains else None
        self.key_gain = nn.Parameter(torch.ones(self.head_width)) if gains else None
        self.value_share = nn.Parameter(torch.tensor([0.5])) if model.value_residual and layer > 0 else None

    def forward(
        self,
        queries_from: Tensor,
        keys_from: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        rotation: Rotation | None = None,
        cache: CacheRows | None = None,
        added_values: Tensor | None = None,
        first_values: Tensor | None = None,
        last: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, T, C) -> (B, T, C), and the values (B, S, K, D) that were mixed. `last`: only for so many last positions.

        `keys_from` (B, S, C), default the queries' source. `mask` broadcasts to (B, H, T, S), True = may look. `causal`
        lets position t look at positions up to t, counted from the end of what `cache` holds. `added_values`
        (B, S, K, D) are added to the values, `first_values` blended into them.
        """
        B, T, _ = queries_from.shape
        q, k, v = self._project(queries_from, keys_from, rotation)  # (B, time, heads, D)
        if added_values is not None:
            v = v + added_values.to(v.dtype)
        if self.value_share is not None and first_values is not None:
            v = torch.lerp(first_values.to(v.dtype), v, self.value_share.to(v.dtype))
        values = v
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, time, D)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        if last is not None:
            q, T = q[:, :, -last:], min(last, T)
        grouped = self.kv_heads != self.heads
        if grouped and q.device.type == "cuda" and q.dtype == torch.float32:  # no fast kernel there takes groups
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
            grouped = False
        S = k.shape[2]
        # The kernel's own causality takes no mask and no cached positions. T > 1 is asked last: an exported graph leaves T open.
        if causal and (mask is not None or S > T) and T > 1:
            earlier = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
            mask = earlier if mask is None else mask & earlier
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal and mask is None and not S > T,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=grouped,
        )
        output: Tensor = self.output(mixed.transpose(1, 2).reshape(B, T, self.query_rows))
        return output, values

    def _project(self, queries_from: Tensor, keys_from: Tensor | None, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, time, heads, D). Those of one source are normalised and turned together."""
        if keys_from is None:
            together = self._heads(self.qkv(queries_from))
            if self.qk_norm_eps is None and rotation is None:
                q, k, v = torch.split(together, [self.heads, self.kv_heads, self.kv_heads], dim=2)
                return q, k, v
            looking, v = torch.split(together, [self.heads + self.kv_heads, self.kv_heads], dim=2)  # one gradient, not two of zeros
            q, k = torch.split(self._norm_and_rotate(looking, rotation), [self.heads, self.kv_heads], dim=2)
            return q, k, v
        rows, bias = self.query_rows, self.qkv.bias
        q = self._heads(F.linear(queries_from, self.qkv.weight[:rows], None if bias is None else bias[:rows]))
        k, v = self._heads(F.linear(keys_from, self.qkv.weight[rows:], None if bias is None else bias[rows:])).chunk(2, dim=2)
        if self.qk_norm_eps is not None:
            q, k = rms_norm(q, self.query_gain, self.qk_norm_eps), rms_norm(k, self.key_gain, self.qk_norm_eps)
        return q, k, v

    def _norm_and_rotate(self, queries_and_keys: Tensor, rotation: Rotation | None) -> Tensor:
        if self.qk_norm_eps is not None:
            queries_and_keys = rms_norm(queries_and_keys, None, self.qk_norm_eps)
            if self.query_gain is not None and self.key_gain is not None:
                gains = torch.cat((self.query_gain.expand(self.heads, -1), self.key_gain.expand(self.kv_heads, -1)))
                queries_and_keys = queries_and_keys * gains.to(queries_and_keys.dtype)
        return queries_and_keys if rotation is None else rotate(queries_and_keys, *rotation)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_width)


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
        if self.kind in ("gelu", "gelu_exact"):
            hidden = F.gelu(hidden, approximate="tanh" if self.kind == "gelu" else "none")
        elif self.kind == "relu":
            hidden = F.relu(hidden)
        elif self.kind == "relu2":
            hidden = relu_squared(hidden)
        else:
            gate, values = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * values
        output: Tensor = self.output(hidden)
        return output


class Block(nn.Module):
    """Attention and feed-forward around a residual stream, normalised before (pre) or after (post) each sum."""

    def __init__(self, model: ModelSection, layer: int, vocab_size: int) -> None:
        super().__init__()
        self.post = model.norm_position == "post"
        self.parallel = model.parallel_residual
        self.residual_mix = nn.Parameter(torch.tensor([1.0, 0.0])) if model.embedding_shortcut else None
        self.attention_norm = make_norm(model, model.n_embd)
        self.attention = Attention(model, layer)
        values = model.kv_heads * model.head_width
        outer = layer < model.value_embeddings or layer >= model.n_layer - model.value_embeddings
        self.value_embedding = nn.Embedding(vocab_size, values) if outer else None
        self.feed_forward_norm = None if self.post and self.parallel else make_norm(model, model.n_embd)
        self.feed_forward = FeedForward(model)
        self.dropout = Dropout(model.dropout)

    def forward(
        self, x: Tensor, shared: ForwardContext, first_values: Tensor | None, last: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, T, C) -> (B, T, C), causal, and the attention's values. `first_values`: those of the first block.

        `last`: only so many last positions are wanted, (B, last, C); the keys and values of all are cached.
        """
        if self.residual_mix is not None:
            keep, add = self.residual_mix.to(x.dtype).unbind()
            x = keep * x + add * shared.embedded
        added = None
        if self.value_embedding is not None:
            added = self.value_embedding(shared.tokens).to(x.dtype)
            added = added.view(*added.shape[:2], -1, self.attention.head_width)
        mixed, values = self.attention(
            x if self.post else self.attention_norm(x),
            causal=True,
            rotation=shared.rotation,
            cache=shared.cache,
            added_values=added,
            first_values=first_values,
            last=last,
        )
        if last is not None:
            x = x[:, -last:]
        mixed = self.dropout(mixed)
        if self.feed_forward_norm is None:
            return self.attention_norm(x + mixed + self._feed(x)), values
        if self.post:
            x = self.attention_norm(x + mixed)
            return self.feed_forward_norm(x + self._feed(x)), values
        if self.parallel:
            return x + mixed + self._feed(self.feed_forward_norm(x)), values
        x = x + mixed
        return x + self._feed(self.feed_forward_norm(x)), values

    def _feed(self, x: Tensor) -> Tensor:
        fed: Tensor = self.dropout(self.feed_forward(x))
        return fed
