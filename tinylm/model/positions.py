"""Tables for rotary and sinusoidal position embeddings, and positions within segments, for document masking.

Learned position embeddings are an `nn.Embedding`. `B` batch, `T` time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(length: int, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines for rotary position embeddings (Su et al. 2021), each (length, head_width / 2), float32."""
    frequencies = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def sinusoidal_table(length: int, width: int) -> Tensor:
    """Sinusoidal position embeddings (Vaswani et al. 2017, section 3.5), (length, width), float32."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).float()


def positions_in_segments(segments: Tensor) -> Tensor:
    """Positions that start at 0 in each segment: [5, 5, 5, 6, 6] -> [0, 1, 2, 0, 1]. (B, T) -> (B, T)."""
    index = torch.arange(segments.shape[1], device=segments.device)
    is_start = torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    starts = (index * is_start).cummax(dim=1).values
    return index - starts


def segment_mask(segments: Tensor) -> Tensor:
    """Causal attention mask within segments: True where the key is in the query's segment and not after the query.

    (B, T) -> (B, 1, T, T).
    """
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same.tril()
