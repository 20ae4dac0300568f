"""Measure what attention heads do: previous-token, duplicate-token and induction scores (Olsson et al. 2022), and entropy.

The scores are measured on a random sequence that is repeated once, so that its tokens can be predicted only from the repetition.

Legend: `B` batch, `T` time, `L` length of the repeated part, `H` heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.model.base import Model

PERIOD = 50
"""Length of the repeated part, if the context is long enough."""
ROWS = 4
CHARACTERISTIC = 0.3
"""A score must be at least this high to determine a head's type. Attention spread evenly over 100 tokens scores below 0.1."""
KINDS = ("previous_token", "duplicate_token", "induction")


@dataclass(frozen=True)
class HeadScores:
    """Scores of all heads between 0 and 1, each (layer, head)."""

    previous_token: Tensor
    """Mean attention to the token directly before: mean of `pattern[i, i - 1]`."""
    duplicate_token: Tensor
    """Mean attention to all earlier occurrences of the same token, averaged over the queries with earlier occurrences."""
    induction: Tensor
    """Mean attention to the token that followed the earlier occurrence: mean of `pattern.diagonal(offset=1 - L)`."""
    entropy: Tensor
    """Mean entropy of the attention weights, in bits. 0 means that every token attends to a single token."""

    def of(self, kind: str) -> Tensor:
        """Return the scores (layer, head) for one of `KINDS`."""
        scores: Tensor = getattr(self, kind)
        return scores

    def kind(self, layer: int, head: int) -> str | None:
        """Return the entry of `KINDS` with the largest score, or None if no score reaches `CHARACTERISTIC`."""
        best = max(KINDS, key=lambda kind: float(self.of(kind)[layer, head]))
        return best if float(self.of(best)[layer, head]) >= CHARACTERISTIC else None

    def strongest(self) -> list[tuple[int, int]]:
        """Return all heads as (layer, head), sorted by each head's largest score, highest first."""
        largest = torch.stack([self.of(kind) for kind in KINDS]).amax(0)
        order = largest.flatten().argsort(descending=True, stable=True).tolist()
        return [divmod(index, largest.shape[1]) for index in order]


def repeated_tokens(network: Model, *, rows: int = ROWS, seed: int = 0) -> Tensor:
    """Return sequences (rows, 2 L) that each consist of two copies of L random ids. L is `PERIOD`, or half of a shorter context.

    Raises `InputError` if the context has fewer than 4 tokens.
    """
    period = min(PERIOD, network.model.context_length // 2)
    if period < 2:
        raise InputError(f"a context of {network.model.context_length} tokens is too short to repeat a sequence")
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(network.vocab_size, (rows, period), generator=generator)
    return torch.cat((half, half), dim=1).to(network.device)


@torch.no_grad()
def head_scores(network: Model, tokens: Tensor | None = None, **inputs: Any) -> HeadScores:
    """Score every head on repeated tokens (batch, 2 L). By default, these are the tokens from `repeated_tokens`.

    `inputs` are additional arguments of `Model.hidden`, such as the memory of a decoder with cross-attention.
    Raises `InputError` if the model has no attention or `tokens` is not a repeated sequence.
    """
    if tokens is None:
        tokens = repeated_tokens(network)
    period = tokens.shape[1] // 2
    if tokens.shape[1] != 2 * period or not torch.equal(tokens[:, :period], tokens[:, period:]):
        raise InputError("the tokens must be two copies of the same sequence")
    names = pattern_names(network)
    with network.caching(names) as cache:
        network.hidden(tokens, **inputs)
    patterns = [cache[name] for name in names]
    equal = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)  # (B, T, T)
    return HeadScores(
        previous_token=torch.stack([_diagonal_mean(pattern, -1) for pattern in patterns]),
        duplicate_token=torch.stack([_mean_attention_to(pattern, equal) for pattern in patterns]),
        induction=torch.stack([_diagonal_mean(pattern, 1 - period) for pattern in patterns]),
        entropy=torch.stack([entropy_bits(pattern).mean((0, 2)) for pattern in patterns]),
    )


def pattern_names(network: Model) -> list[str]:
    """Return the hook points of the attention patterns. Raises `InputError` if there are none."""
    names = [name for name in network.hook_names() if name.endswith(".attn.pattern")]
    if not names:
        raise InputError(f"a model with the {network.architecture} architecture has no attention")
    return names


def entropy_bits(pattern: Tensor) -> Tensor:
    """Compute the entropy (...) in bits of attention weights (..., key)."""
    nats: Tensor = torch.special.entr(pattern).sum(-1)
    return nats / math.log(2)


def _diagonal_mean(pattern: Tensor, offset: int) -> Tensor:
    """Compute the mean of one diagonal for each head: (B, H, T, T) -> (H,)."""
    return pattern.diagonal(offset, dim1=-2, dim2=-1).mean((0, 2))


def _mean_attention_to(pattern: Tensor, keys: Tensor) -> Tensor:
    """Compute the mean attention (H,) to the keys selected by the mask `keys` (B, T, T). `pattern` is (B, H, T, T).

    The mean is over the queries for which at least one key is selected.
    """
    attended = (pattern * keys[:, None]).sum(-1)  # (B, H, T)
    has_any = keys.any(-1)  # (B, T)
    return attended.transpose(0, 1)[:, has_any].mean(-1)
