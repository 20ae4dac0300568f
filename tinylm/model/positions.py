"""Tables for rotary and sinusoidal position embeddings, and positions and masks for document masking.

Learned position embeddings are an `nn.Embedding`. Legend: `B` batch, `T` time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from tinylm.recipe.schema import LinearRopeScaling, Llama3RopeScaling, RopeScaling, YarnRopeScaling


def rope_table(
    length: int, head_width: int, theta: float, scaling: RopeScaling | None = None, fraction: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for rotary position embeddings (Su et al. 2021), each (length, head_width / 2), float32.

    Only a `fraction` of the dimensions is rotated. The remaining pairs have angle 0.
    """
    pairs = int(head_width // 2 * fraction)
    frequencies = theta ** (-torch.arange(0, 2 * pairs, 2, dtype=torch.float64) / (2 * pairs))
    factor = 1.0
    if scaling is not None:
        frequencies, factor = _scale_frequencies(frequencies, theta, scaling)
    frequencies = pad(frequencies, (0, head_width // 2 - pairs))
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def _scale_frequencies(frequencies: Tensor, theta: float, scaling: RopeScaling) -> tuple[Tensor, float]:
    """Return the scaled frequencies (pairs,) and the factor for the cosines and sines."""
    slow = frequencies / scaling.factor
    if isinstance(scaling, LinearRopeScaling):
        return slow, 1.0
    if isinstance(scaling, Llama3RopeScaling):
        rotations = scaling.original_context * frequencies / (2 * math.pi)
        share = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return torch.lerp(slow, frequencies, share.clamp(0, 1)), 1.0
    low, high = _yarn_bounds(len(frequencies), theta, scaling)
    ramp = ((torch.arange(len(frequencies), dtype=torch.float64) - low) / (high - low or 0.001)).clamp(0, 1)
    default = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return torch.lerp(frequencies, slow, ramp), scaling.attention_factor or default


def _yarn_bounds(pairs: int, theta: float, scaling: YarnRopeScaling) -> tuple[float, float]:
    """Return the indices of the pairs that make `beta_fast` and `beta_slow` rotations in the original context.

    See section 3.2 of Peng et al. 2023.
    """
    low, high = (
        pairs * math.log(scaling.original_context / (rotations * 2 * math.pi)) / math.log(theta)
        for rotations in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, 2 * pairs - 1)


def sinusoidal_table(length: int, width: int, *, interleaved: bool = True) -> Tensor:
    """Return sinusoidal position embeddings (Vaswani et al. 2017, section 3.5), (length, width), float32.

    Sines and cosines alternate if `interleaved` is true. Otherwise, all sines precede all cosines, as in Marian.
    """
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return torch.stack((angles.sin(), angles.cos()), dim=-1 if interleaved else 1).flatten(1).float()


def segment_starts(segments: Tensor) -> Tensor:
    """Return where segments begin: [5, 5, 5, 6, 6] -> [True, False, False, True, False]. (B, T) -> (B, T)."""
    return torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)


def positions_in_segments(segments: Tensor) -> Tensor:
    """Return positions that restart at 0 in each segment: [5, 5, 5, 6, 6] -> [0, 1, 2, 0, 1]. (B, T) -> (B, T)."""
    index = torch.arange(segments.shape[1], device=segments.device)
    starts = index * segment_starts(segments)
    if torch.compiler.is_exporting():  # ONNX has no running maximum
        return index - torch.where(index[:, None] >= index, starts[:, None], 0).amax(dim=2)
    return index - starts.cummax(dim=1).values


def segment_mask(segments: Tensor, *, causal: bool = True) -> Tensor:
    """Return an attention mask that is True where the key is in the query's segment and, if `causal`, not after the query.

    (B, T) -> (B, 1, T, T).
    """
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same.tril() if causal else same
