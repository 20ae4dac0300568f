"""The logit lens: what a model would predict if it stopped after each layer (nostalgebraist 2020).

Legend: `L` layers, `B` batch, `T` time, `C` width, `V` vocabulary, `K` guesses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.evaluation.scoring import all_logprobs
from tinylm.model.base import Model
from tinylm.model.classifier import SequenceClassifier
from tinylm.model.hooks import ActivationCache


@dataclass(frozen=True)
class LensGuesses:
    """The most likely tokens after each layer. The layer axis has L + 1 entries, as in `logit_lens`."""

    ids: Tensor
    """(layer, position, K), most likely first."""
    probabilities: Tensor
    """(layer, position, K)."""
    ranks: Tensor
    """(layer, position): the rank of the true token, starting at 1, or 0 if the true token is unknown."""


def lens_names(network: Model) -> list[str]:
    """Return the hook points that the lens reads: the input to the first block, then the output of each block.

    Raises `InputError` if the model has no residual stream.
    """
    names = ["blocks.0.resid_pre", *(f"blocks.{layer}.resid_post" for layer in range(network.depth))]
    if not set(names) <= set(network.hook_names()):
        raise InputError(f"a model with the {network.architecture} architecture has no residual stream for the logit lens")
    return names


@torch.no_grad()
def logit_lens(network: Model, tokens: Tensor, cache: ActivationCache | None = None) -> Tensor:
    """Compute logits after each layer: ids (batch, position) -> logits (layer, batch, position, vocabulary).

    The layer axis has L + 1 entries: the input to the first block, then the output of each block. The final norm is recomputed for
    each of these residuals instead of reusing the scale from the last layer. The last entry is the model's own prediction. To skip
    the forward pass, pass a `cache` with the residuals for these tokens. Raises `InputError` if the model has no residual stream.
    """
    return torch.stack(list(_lens_logits(network, tokens, cache)))


def _lens_logits(network: Model, tokens: Tensor, cache: ActivationCache | None) -> Iterator[Tensor]:
    """Yield the logits (B, T, V) after each layer."""
    names = lens_names(network)
    if cache is None:
        _, cache = network.run_with_cache(tokens, names)
    for name in names:
        yield network.unembed(cache[name])


@torch.no_grad()
def lens_guesses(network: Model, tokens: Tensor, truth: Tensor, count: int, cache: ActivationCache | None = None) -> LensGuesses:
    """Return the `count` most likely tokens after each layer for one text, ids (1, T), without keeping the logits of all layers.

    `truth` (T,) contains the token that each position should predict, or a negative number if it is unknown.
    """
    return _guesses(_lens_logits(network, tokens, cache), truth, count)


@torch.no_grad()
def label_guesses(classifier: SequenceClassifier, cache: ActivationCache) -> LensGuesses:
    """Return all labels after each layer, most likely first. There is one position, which is the pooled one.

    The final norm, the pooler and the output layer are applied to the residuals of each layer. `cache` contains the activations of
    the classifier's body for one text. Raises `InputError` if the body has no residual stream.
    """
    body = classifier.body
    logits = (classifier.label_logits(body.finish(cache[name]))[None] for name in lens_names(body))
    unknown = torch.tensor([-1], device=classifier.device)
    return _guesses(logits, unknown, len(classifier.objective.labels))


def _guesses(layers: Iterable[Tensor], truth: Tensor, count: int) -> LensGuesses:
    ids, probabilities, ranks = [], [], []
    for logits in layers:
        top = all_logprobs(logits[0]).exp().topk(min(count, logits.shape[-1]), dim=-1)
        true_logits = logits[0].gather(-1, truth.clamp_min(0)[:, None])
        rank = (1 + (logits[0] > true_logits).sum(-1)) * (truth >= 0)
        ids.append(top.indices)
        probabilities.append(top.values)
        ranks.append(rank)
    return LensGuesses(torch.stack(ids), torch.stack(probabilities), torch.stack(ranks))
