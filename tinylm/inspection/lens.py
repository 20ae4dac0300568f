"""The logit lens: what a model would predict if it ended after each layer (nostalgebraist 2020).

Legend: `L` layers, `B` batch, `T` time, `C` width, `V` vocabulary, `K` guesses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.evaluation.scoring import all_logprobs
from tinylm.model.base import Model
from tinylm.model.hooks import ActivationCache


@dataclass(frozen=True)
class LensGuesses:
    """The best guesses of each layer. Axis `layer` has L + 1 entries, as in `logit_lens`."""

    ids: Tensor
    """(layer, position, K), most likely first."""
    probabilities: Tensor
    """(layer, position, K)."""
    ranks: Tensor
    """(layer, position): rank of the true token, 1 for the best guess; 0 where it is not known."""


def lens_names(network: Model) -> list[str]:
    """The hook points of the residual stream that the lens reads: the input of the first block, then the output of each block.

    Raises `InputError` if the model has no residual stream.
    """
    names = ["blocks.0.resid_pre", *(f"blocks.{layer}.resid_post" for layer in range(network.depth))]
    if not set(names) <= set(network.hook_names()):
        raise InputError(f"a model of architecture {network.architecture} has no residual stream for the logit lens")
    return names


@torch.no_grad()
def logit_lens(network: Model, tokens: Tensor, cache: ActivationCache | None = None) -> Tensor:
    """Ids (batch, position) -> logits (layer, batch, position, vocabulary).

    Axis `layer` has L + 1 entries: the input of the first block, then the output of each block. The final norm is computed again on
    each of these residuals, so its scale is not the one of the last layer. The last entry is the model's own prediction. `cache`
    saves the forward pass if it has the residuals of the same tokens. Raises `InputError` if the model has no residual stream.
    """
    return torch.stack(list(_lens_logits(network, tokens, cache)))


def _lens_logits(network: Model, tokens: Tensor, cache: ActivationCache | None) -> Iterator[Tensor]:
    """Yield the logits (B, T, V) of each layer."""
    names = lens_names(network)
    if cache is None:
        _, cache = network.run_with_cache(tokens, names)
    for name in names:
        yield network.unembed(cache[name])


@torch.no_grad()
def lens_guesses(network: Model, tokens: Tensor, truth: Tensor, count: int, cache: ActivationCache | None = None) -> LensGuesses:
    """Return the `count` best guesses of each layer for one text, ids (1, T), without keeping the logits of all layers.

    `truth` (T,): the token that each position should predict, or a negative number.
    """
    ids, probabilities, ranks = [], [], []
    for logits in _lens_logits(network, tokens, cache):
        top = all_logprobs(logits[0]).exp().topk(min(count, logits.shape[-1]), dim=-1)
        true_logits = logits[0].gather(-1, truth.clamp_min(0)[:, None])
        rank = (1 + (logits[0] > true_logits).sum(-1)) * (truth >= 0)
        ids.append(top.indices)
        probabilities.append(top.values)
        ranks.append(rank)
    return LensGuesses(torch.stack(ids), torch.stack(probabilities), torch.stack(ranks))
