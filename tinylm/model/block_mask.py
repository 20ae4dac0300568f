"""Attention within segments (document masking) on a GPU with FlexAttention, which skips blocks of keys in other segments.

The other implementation, a dense mask (`positions.segment_mask`), makes attention compute and mask all scores.

Legend: `B` batch, `T` time, `H` query heads, `K` key/value heads, `D` head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tinylm.model.functions import has_triton
from tinylm.recipe.transformer import TransformerSection

_MIN_HEAD_WIDTH = 16
"""Minimum head width that FlexAttention supports."""


class FlexAttention:
    """Whether training may use FlexAttention. If it cannot be compiled, `training.compilation.Trial` disables it."""

    enabled = True
    used = False
    """Whether a block mask has been created in this process."""


flex = FlexAttention()


def is_supported(model: TransformerSection, device: torch.device) -> bool:
    """Whether attention within segments can use a block mask in training on this device."""
    plain = model.attention_window is None and model.attention_softcap is None and not model.attention_dropout_p
    return device.type == "cuda" and has_triton() and plain and model.head_width >= _MIN_HEAD_WIDTH


def segment_block_mask(segments: Tensor, *, causal: bool = True) -> BlockMask:
    """Return the block mask that is equivalent to `positions.segment_mask` for segments (B, T)."""

    def allows(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = segments[batch, query] == segments[batch, key]
        return same & (query >= key) if causal else same

    flex.used = True
    rows, length = segments.shape
    return create_block_mask(allows, rows, None, length, length, device=segments.device)


def block_masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Attention with queries (B, H, T, D), keys and values (B, K, T, D). Returns (B, H, T, D)."""
    grouped = q.shape[1] != k.shape[1]
    if q.device.type == "cuda":
        compiled: Tensor = _compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=grouped)
        return compiled
    attended: Tensor = flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
    return attended


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    """Without compilation, FlexAttention computes all scores. In a compiled block, this compilation becomes part of the block's."""
    return torch.compile(flex_attention, dynamic=False)
