"""Modules for transformer blocks: norms, attention and feed-forward layers.

Legend: `B` batch, `T` time, `S` time of keys and values, `C` width, `H` query heads, `K` key/value heads, `D` head width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from tinylm.model.block_mask import block_masked_attention
from tinylm.model.cache import CacheRows
from tinylm.model.functions import Dropout, relu_squared, rms_norm, rotate
from tinylm.model.fused_attention import fused_attention
from tinylm.model.hooks import HookPoint
from tinylm.recipe.schema import TransformerSection

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines for rotary position embeddings, each (T, 1, D / 2)."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with an optional learned gain."""

    def __init__(self, width: int, eps: float, gain: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def make_norm(model: TransformerSection, width: int) -> nn.Module:
    """Create the norm that `model` configures, for a last axis of size `width`."""
    if model.norm == "layernorm":
        return nn.LayerNorm(width, eps=model.norm_eps, elementwise_affine=model.norm_gain, bias=model.bias)
    return RMSNorm(width, model.norm_eps, model.norm_gain)


def shift_keys(k: Tensor, heads: int, segment_starts: Tensor | None = None) -> Tensor:
    """Move the keys of the first `heads` heads to the next position: (B, K, S, D) -> (B, K, S, D).

    The first position gets a key of zeros, and so do the positions where `segment_starts` (B, S) is True.
    """
    shifted = F.pad(k[:, :heads, :-1], (0, 0, 1, 0))
    if segment_starts is not None:
        shifted = shifted.masked_fill(segment_starts[:, None, :, None], 0)
    return torch.cat((shifted, k[:, heads:]), dim=1)


KeysValues = tuple[Tensor, Tensor]
"""Keys and values, each (B, S, K, D)."""


@dataclass(frozen=True)
class Memory:
    """The input of cross-attention: an encoder's output, or the keys and values computed from it."""

    hidden: Tensor | None
    """(B, S, C), or None if `keys_values` is set."""
    mask: Tensor | None = None
    """(B, 1, 1, S), False at padding. None means that there is no padding."""
    keys_values: tuple[KeysValues, ...] | None = None
    """Keys and values for each block, or None if every block computes them from `hidden`."""


@dataclass(frozen=True)
class ForwardContext:
    """Inputs that all blocks share in a forward pass."""

    tokens: Tensor
    """(B, T) ids."""
    embedded: Tensor
    """(B, T, C), the input of the first block."""
    rotation: Rotation | None = None
    local_rotation: Rotation | None = None
    """The rotation for local blocks, if it differs from `rotation`."""
    cache: CacheRows | None = None
    mask: Tensor | BlockMask | None = None
    """(B, 1, T, T), True where a query can attend to a key, or an equivalent block mask. With None, a query can attend to all
    positions that `causal` allows."""
    causal: bool = True
    """Whether a position attends only to itself and earlier positions. A `mask` must already be causal if this is True."""
    memory: Memory | None = None
    """The input of cross-attention in blocks that have it."""
    segment_starts: Tensor | None = None
    """(B, T), True at the first position of each segment. None means that the first position is the only one."""


class Attention(nn.Module):
    """Multi-head attention, grouped-query when `n_kv_head` is less than `n_head` (Ainslie et al. 2023).

    Keys and values are computed from the same input as the queries, or from a different one (cross-attention). The rows of `qkv`
    contain the projections for the queries, then the keys, then the values.
    """

    def __init__(self, model: TransformerSection, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = model.n_head, model.kv_heads, model.head_width
        self.dropout = model.attention_dropout_p
        self.layer = layer
        self.window = model.window_of(layer)
        self.shifted_heads = model.shifted_key_heads
        self.query_rows = self.heads * self.head_width
        rows = self.query_rows + 2 * self.kv_heads * self.head_width
        self.qkv = nn.Linear(model.n_embd, rows, bias=model.bias)
        self.output = nn.Linear(self.query_rows, model.n_embd, bias=model.bias)
        self.softcap = model.attention_softcap
        self.qk_norm_eps = model.norm_eps if model.qk_norm else None
        self.norms_all_heads = model.qk_norm_joint
        gains = model.qk_norm and model.qk_gain
        query_width, key_width = (self.heads, self.kv_heads) if self.norms_all_heads else (1, 1)
        self.query_gain = nn.Parameter(torch.ones(query_width * self.head_width)) if gains else None
        self.key_gain = nn.Parameter(torch.ones(key_width * self.head_width)) if gains else None
        self.value_share = nn.Parameter(torch.tensor([0.5])) if model.value_residual and layer > 0 else None
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_z = HookPoint()

    def forward(
        self,
        x: Tensor,
        kv_source: Tensor | None = None,
        *,
        mask: Tensor | BlockMask | None = None,
        causal: bool = False,
        rotation: Rotation | None = None,
        cache: CacheRows | None = None,
        added_values: Tensor | None = None,
        first_values: Tensor | None = None,
        n_last: int | None = None,
        keys_values: KeysValues | None = None,
        segment_starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, T, C) -> (B, T, C) and the values (B, S, K, D), excluding cached values.

        `kv_source` (B, S, C): the input for keys and values (default: `x`). `mask` broadcasts to (B, H, T, S); True means that a
        query can attend to a key. `causal`: position t attends to the cached positions and to positions up to t. In a block with
        an attention window, a query attends only to keys less than `window` positions away. `added_values` (B, S, K, D) are added
        to the values. `first_values` (B, S, K, D) are interpolated with the values. `n_last`: return only the last `n_last`
        positions. `keys_values`: the result of `project_keys_values`, which replaces `kv_source`. `segment_starts`: see
        `ForwardContext`.

        The cache and `keys_values` can have N rows of keys and values that are each shared by G rows of `x` (B, 1, C). Then `mask`
        is (N, 1, G, S).
        """
        T = x.shape[1]
        if keys_values is not None:
            q, (k, v) = self._project_queries(x), keys_values
        else:
            q, k, v = self._project(x, kv_source, rotation)  # (B, T, H, D), (B, S, K, D), (B, S, K, D)
        if added_values is not None:
            v = v + added_values.to(v.dtype)
        if self.value_share is not None and first_values is not None:
            v = torch.lerp(first_values.to(v.dtype), v, self.value_share.to(v.dtype))
        shifts = self.shifted_heads > 0 and kv_source is None and keys_values is None
        if shifts and cache is None:
            k = shift_keys(k.transpose(1, 2), self.shifted_heads, segment_starts).transpose(1, 2)
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        values = v
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), (B, K, S, D), (B, K, S, D)
        if isinstance(mask, BlockMask):
            return self._project_output(block_masked_attention(q, k, v, mask)), values
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # S now includes the cached positions
            k = shift_keys(k, self.shifted_heads) if shifts else k
        rows, groups = q.shape[0], k.shape[0]  # `len` would make the batch size constant in an exported graph
        if groups != rows:
            assert mask is not None
            q, T = _grouped(q, groups, mask.shape[2]), mask.shape[2]
        if n_last is not None:
            q, T = q[:, :, -n_last:], min(n_last, T)
            mask = None if mask is None else mask[..., -n_last:, :]
        S = k.shape[2]
        windowed = self.window is not None and self.window < S
        grouped = self.kv_heads != self.heads
        # No fast CUDA kernel supports GQA in float32 or with a mask.
        if grouped and q.device.type == "cuda" and (q.dtype == torch.float32 or mask is not None or windowed):
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))  # (B, H, S, D)
            grouped = False
        # `is_causal` supports neither a mask nor cached positions. T > 1 is tested last because T is symbolic in an exported graph.
        unfused = bool(self.hook_scores.functions or self.hook_pattern.functions) or self.softcap is not None
        if causal and (mask is not None or S > T or unfused or windowed) and T > 1:
            causal_mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
            mask = causal_mask if mask is None else mask & causal_mask
        if self.window is not None and windowed:  # query t is at position S - T + t
            window_mask = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T - self.window + 1)
            if not causal:
                window_mask = window_mask.tril(S - T + self.window - 1)
            mask = window_mask if mask is None else mask & window_mask
        if unfused:
            attended = self._unfused_attention(q, k, v, mask)  # (B, H, T, D)
        else:
            attended = fused_attention(
                q,
                k,
                v,
                mask,
                is_causal=causal and mask is None and not S > T,
                dropout=self.dropout if self.training else 0.0,
                grouped=grouped,
            )  # (B, H, T, D)
        if groups != rows:
            attended = _ungrouped(attended, rows)
        return self._project_output(attended), values

    def _project_output(self, attended: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, T, C)."""
        z = self.hook_z(attended.transpose(1, 2))  # (B, T, H, D)
        output: Tensor = self.output(z.reshape(*z.shape[:2], self.query_rows))
        return output

    def _unfused_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q k' / sqrt(D)) v with hook points for scores and pattern. If all keys are masked, the output is 0."""
        k, v = (x.repeat_interleave(self.heads // x.shape[1], dim=1) for x in (k, v))  # (B, H, S, D)
        scores = q @ k.transpose(-2, -1) * self.head_width**-0.5  # (B, H, T, S)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        scores = self.hook_scores(scores)
        pattern = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        pattern = self.hook_pattern(pattern.masked_fill(scores.isneginf().all(dim=-1, keepdim=True), 0.0))
        return F.dropout(pattern, self.dropout, self.training).to(v.dtype) @ v

    def _project(self, x: Tensor, kv_source: Tensor | None, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, T, H, D), keys and values (B, S, K, D), after QK norm and, in self-attention, rotation."""
        if kv_source is None:
            qkv = self._split_heads(self.qkv(x))  # (B, T, H + 2 K, D)
            if self.qk_norm_eps is None and rotation is None:
                q, k, v = torch.split(qkv, [self.heads, self.kv_heads, self.kv_heads], dim=2)
                return q, k, v
            # Split in two steps so that the gradient of `qk` is one tensor instead of a sum of zero-padded slices.
            qk, v = torch.split(qkv, [self.heads + self.kv_heads, self.kv_heads], dim=2)
            q, k = torch.split(self._norm_and_rotate(qk, rotation), [self.heads, self.kv_heads], dim=2)
            return q, k, v
        return self._project_queries(x), *self.project_keys_values(kv_source)

    def _project_queries(self, x: Tensor) -> Tensor:
        """(B, T, C) -> normalized queries for cross-attention (B, T, H, D)."""
        rows, bias = self.query_rows, self.qkv.bias
        q = self._split_heads(F.linear(x, self.qkv.weight[:rows], None if bias is None else bias[:rows]))
        return q if self.qk_norm_eps is None else self._norm_heads(q, self.query_gain)

    def project_keys_values(self, kv_source: Tensor) -> KeysValues:
        """(B, S, C) -> normalized keys and values for cross-attention, each (B, S, K, D)."""
        rows, bias = self.query_rows, self.qkv.bias
        projected = F.linear(kv_source, self.qkv.weight[rows:], None if bias is None else bias[rows:])
        k, v = self._split_heads(projected).chunk(2, dim=2)
        return (k if self.qk_norm_eps is None else self._norm_heads(k, self.key_gain)), v

    def _norm_and_rotate(self, qk: Tensor, rotation: Rotation | None) -> Tensor:
        """Normalize and rotate query and key heads together: (B, T, H + K, D) -> (B, T, H + K, D)."""
        if self.qk_norm_eps is not None and self.norms_all_heads:
            q, k = torch.split(qk, [self.heads, self.kv_heads], dim=2)
            qk = torch.cat((self._norm_heads(q, self.query_gain), self._norm_heads(k, self.key_gain)), dim=2)
        elif self.qk_norm_eps is not None:
            qk = rms_norm(qk, None, self.qk_norm_eps)
            if self.query_gain is not None and self.key_gain is not None:
                gains = torch.cat((self.query_gain.expand(self.heads, -1), self.key_gain.expand(self.kv_heads, -1)))  # (H + K, D)
                qk = qk * gains.to(qk.dtype)
        return qk if rotation is None else rotate(qk, *rotation)

    def _norm_heads(self, x: Tensor, gain: Tensor | None) -> Tensor:
        """Normalize each head of x (B, T, heads, D), or, with `norms_all_heads`, all heads together."""
        assert self.qk_norm_eps is not None
        if not self.norms_all_heads:
            return rms_norm(x, gain, self.qk_norm_eps)
        return rms_norm(x.flatten(2), gain, self.qk_norm_eps).view(x.shape)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) -> (B, T, heads, D)."""
        return x.view(*x.shape[:2], -1, self.head_width)


def _grouped(q: Tensor, groups: int, size: int) -> Tensor:
    """Queries (R, H, 1, D) -> (groups, H, size, D). Rows after the last group are padding."""
    return q[: groups * size, :, 0].reshape(groups, size, q.shape[1], q.shape[3]).transpose(1, 2)


def _ungrouped(attended: Tensor, rows: int) -> Tensor:
    """The inverse of `_grouped`: (groups, H, size, D) -> (rows, H, 1, D), with zeros in rows of padding."""
    flat = attended.transpose(1, 2).flatten(0, 1)[:, :, None]
    return flat if len(flat) == rows else F.pad(flat, (0, 0, 0, 0, 0, 0, 0, rows - len(flat)))


class FeedForward(nn.Module):
    """Two linear layers with an activation in between.

    In a gated layer (Shazeer 2020), the first half of the rows of `input` computes the gate, and the second half the values.
    """

    def __init__(self, model: TransformerSection) -> None:
        super().__init__()
        self.kind = model.feed_forward
        width = model.feed_forward_width
        self.input = nn.Linear(model.n_embd, 2 * width if model.is_gated else width, bias=model.bias)
        self.output = nn.Linear(width, model.n_embd, bias=model.bias)
        self.hook_pre = HookPoint()
        self.hook_pre_linear = HookPoint() if model.is_gated else None
        self.hook_post = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        hidden = self.input(x)
        if self.hook_pre_linear is not None:  # SwiGLU or GeGLU
            gate, values = hidden.chunk(2, dim=-1)
            gate = self.hook_pre(gate)
            approximate = "tanh" if self.kind == "geglu" else "none"
            gate = F.silu(gate) if self.kind == "swiglu" else F.gelu(gate, approximate=approximate)
            hidden = gate * self.hook_pre_linear(values)
        else:
            hidden = self.hook_pre(hidden)
            if self.kind in ("gelu", "gelu_exact"):
                hidden = F.gelu(hidden, approximate="tanh" if self.kind == "gelu" else "none")
            elif self.kind == "relu":
                hidden = F.relu(hidden)
            elif self.kind == "silu":
                hidden = F.silu(hidden)
            else:
                hidden = relu_squared(hidden)
        output: Tensor = self.output(self.hook_post(hidden))
        return output


class Block(nn.Module):
    """Attention and feed-forward layers with residual connections.

    `norm_position` determines whether norms are applied to the layers' inputs (pre), their outputs (output), both (both), or the
    residual sums (post). With `cross_attention`, an additional layer between the two attends to `ForwardContext.memory`. It has its
    own norms and residual connection.
    """

    def __init__(self, model: TransformerSection, layer: int, vocab_size: int, *, cross_attention: bool = False) -> None:
        super().__init__()
        self.norm_position = model.norm_position
        self.post = model.norm_position == "post"
        self.parallel = model.parallel_residual
        self.hook_resid_pre = HookPoint()
        self.residual_mix = nn.Parameter(torch.tensor([1.0, 0.0])) if model.embedding_shortcut else None
        self.attention_norm = make_norm(model, model.n_embd)
        self.attention = Attention(model, layer)
        self.attention_output_norm = make_norm(model, model.n_embd) if model.norm_position == "both" else None
        self.uses_rope, self.is_local = model.uses_rope(layer), model.is_local(layer)
        is_outer = layer < model.value_embeddings or layer >= model.n_layer - model.value_embeddings
        self.value_embedding = nn.Embedding(vocab_size, model.kv_heads * model.head_width) if is_outer else None
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = None if self.parallel else HookPoint()
        self.cross_attention = Attention(model, layer) if cross_attention else None
        self.cross_attention_norm = make_norm(model, model.n_embd) if cross_attention else None
        self.cross_attention_output_norm = (
            make_norm(model, model.n_embd) if cross_attention and model.norm_position == "both" else None
        )
        self.hook_cross_attn_out = HookPoint() if cross_attention else None
        self.feed_forward_norm = None if self.post and self.parallel else make_norm(model, model.n_embd)
        self.feed_forward = FeedForward(model)
        self.feed_forward_output_norm = make_norm(model, model.n_embd) if model.norm_position == "both" else None
        self.hook_mlp_out, self.hook_resid_post = HookPoint(), HookPoint()
        self.dropout = Dropout(model.dropout)

    def forward(
        self, x: Tensor, context: ForwardContext, first_values: Tensor | None, n_last: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, T, C) -> the block's output (B, T, C) and its attention values (B, T, K, D).

        `first_values`: the first block's values, or None in the first block. `n_last`: return only the last `n_last` positions,
        (B, n_last, C). The keys and values of all positions are still cached.
        """
        x = self.hook_resid_pre(x)
        if self.residual_mix is not None:
            x_share, embedded_share = self.residual_mix.to(x.dtype).unbind()
            x = x_share * x + embedded_share * context.embedded
        added_values = None
        if self.value_embedding is not None:
            added_values = self.value_embedding(context.tokens).to(x.dtype)  # (B, T, K D)
            added_values = added_values.view(*added_values.shape[:2], -1, self.attention.head_width)  # (B, T, K, D)
        attended, values = self.attention(
            self.attention_norm(x) if self.norm_position in ("pre", "both") else x,
            mask=context.mask,
            causal=context.causal and context.mask is None,
            rotation=self._rotation(context),
            cache=context.cache,
            added_values=added_values,
            first_values=first_values,
            n_last=n_last,
            segment_starts=context.segment_starts,
        )
        if n_last is not None:
            x = x[:, -n_last:]
        attended = self.hook_attn_out(self.dropout(self._norm_output(attended, self.attention_norm, self.attention_output_norm)))
        if self.feed_forward_norm is None:  # post and parallel
            x = self.attention_norm(x + attended + self._feed_forward(x))
        elif self.hook_resid_mid is None:  # pre and parallel
            x = x + attended + self._feed_forward(self.feed_forward_norm(x))
        elif self.post:
            x = self.hook_resid_mid(self.attention_norm(x + attended))
            if self.cross_attention is not None:
                x = self._attend_to_memory(x, context)
            x = self.feed_forward_norm(x + self._feed_forward(x))
        else:
            x = self.hook_resid_mid(x + attended)
            if self.cross_attention is not None:
                x = self._attend_to_memory(x, context)
            x = x + self._feed_forward(x if self.norm_position == "output" else self.feed_forward_norm(x))
        return self.hook_resid_post(x), values

    def _attend_to_memory(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Add the cross-attention layer's output to x (B, T, C), with norms in the same places as in the other layers."""
        memory, norm = context.memory, self.cross_attention_norm
        assert self.cross_attention is not None
        assert self.hook_cross_attn_out is not None
        assert norm is not None
        assert memory is not None, "a block with cross-attention needs a memory"
        attended, _ = self.cross_attention(
            norm(x) if self.norm_position in ("pre", "both") else x,
            memory.hidden,
            mask=memory.mask,
            causal=False,
            keys_values=None if memory.keys_values is None else memory.keys_values[self.cross_attention.layer],
        )
        attended = self._norm_output(attended, norm, self.cross_attention_output_norm)
        x = x + self.hook_cross_attn_out(self.dropout(attended))
        return norm(x) if self.post else x

    def _rotation(self, context: ForwardContext) -> Rotation | None:
        if not self.uses_rope:
            return None
        return context.local_rotation if self.is_local and context.local_rotation is not None else context.rotation

    def _norm_output(self, x: Tensor, norm: nn.Module | None, second_norm: nn.Module | None) -> Tensor:
        """Normalize a layer's output with its only norm (output) or its second norm (both), or return it unchanged."""
        chosen = norm if self.norm_position == "output" else second_norm
        return x if chosen is None else chosen(x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        output = self._norm_output(self.feed_forward(x), self.feed_forward_norm, self.feed_forward_output_norm)
        dropped: Tensor = self.hook_mlp_out(self.dropout(output))
        return dropped


class Blocks(nn.ModuleList):
    """The blocks of a transformer. Training can compile each block, or all of them together (`training.compile: model`)."""

    def __init__(self, blocks: Iterable[Block], *, value_residual: bool = False, uses_dropout: bool = False) -> None:
        super().__init__(blocks)
        self._value_residual, self._uses_dropout = value_residual, uses_dropout

    def forward(self, x: Tensor, context: ForwardContext, *, n_last: int | None = None, recompute: bool = False) -> Tensor:
        """(B, T, C) -> (B, T, C), or (B, n_last, C). `recompute`: save only the input of each block for the backward pass."""
        first_values: Tensor | None = None
        for number, block in enumerate(self, 1):
            if n_last is not None and number == len(self):
                x, values = block(x, context, first_values, n_last=n_last)  # (B, n_last, C)
            elif recompute and torch.is_grad_enabled():
                x, values = checkpoint(block, x, context, first_values, use_reentrant=False, preserve_rng_state=self._uses_dropout)
            else:
                x, values = block(x, context, first_values)
            if first_values is None and self._value_residual:
                first_values = values
        return x
