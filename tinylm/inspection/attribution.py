"""Direct logit attribution: how much every embedding, head, feed-forward layer and bias contributes to a logit.

A token's logit is the dot product of its output vector (a row of the output projection's weight) and the final hidden state. The
hidden state is a sum of components (`tinylm.model.decomposition`), so the logit is a sum as well. The scale of the final norm is
frozen at its value in the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tinylm.model.base import Model
from tinylm.model.classifier import SequenceClassifier, pool
from tinylm.model.decomposition import Components, decompose, final_hidden, frozen_norm, hook_names
from tinylm.model.hooks import ActivationCache

_SMALL = 1e-12
"""The input below which the ratio of a pooling unit is 1, its limit for tanh."""


@dataclass(frozen=True)
class Attribution:
    """Contributions to a logit, or to the difference between two logits."""

    components: list[str]
    """Names in the order of the forward pass (see `tinylm.model.decomposition.decompose`)."""
    contributions: Tensor
    """(component, batch, position)."""
    logits: Tensor
    """(batch, position): the logit or difference that the model computed, before `logit_softcap` if the model has one."""

    @property
    def sums(self) -> Tensor:
        """(batch, position): the sum of all contributions."""
        return self.contributions.sum(0)

    @property
    def remainder(self) -> float:
        """The largest difference between a logit and the sum of its contributions. It is only due to rounding."""
        return float((self.logits - self.sums).abs().max())


@torch.no_grad()
def attribution(
    network: Model, tokens: Tensor, targets: Tensor, against: Tensor | None = None, cache: ActivationCache | None = None
) -> Attribution:
    """Attribute the logits of `targets` to components. All arguments are ids (batch, position).

    The target at a position is the token predicted there, which is usually the next token. With `against`, attribute the difference
    between the logits of `targets` and `against`. To skip the forward pass, pass a `cache` with all activations for these tokens.
    Raises `InputError` if the architecture cannot be split into components.
    """
    if cache is None:
        _, cache = network.run_with_cache(tokens, hook_names(network))
    parts = decompose(network, cache)
    weight = network.output_embedding().weight
    direction = weight[targets] if against is None else weight[targets] - weight[against]  # (B, T, C)
    hidden = final_hidden(network, cache)
    names, contributions = list(parts.names), torch.einsum("nbtc,btc->nbt", parts.vectors, direction)
    logits = (hidden * direction).sum(-1)
    bias = network.output_embedding().bias
    if bias is not None:
        biases = bias[targets] if against is None else bias[targets] - bias[against]  # (B, T)
        names, contributions, logits = [*names, "head bias"], torch.cat((contributions, biases[None])), logits + biases
    return Attribution(names, contributions, logits)


@torch.no_grad()
def label_attribution(classifier: SequenceClassifier, label: int, against: int | None, cache: ActivationCache) -> Attribution:
    """Attribute a label's logit for one text to components of the pooled vector. Labels are given by number.

    With `against`, attribute the difference between two labels' logits. `cache` contains the activations of the classifier's body.
    The pooling layer is frozen like a norm: each of its units is multiplied by the ratio of its output and input in the forward
    pass. The result has one position. Raises `InputError` if the body cannot be split into components.
    """
    parts = decompose(classifier.body, cache)
    weight, bias = classifier.output.weight, classifier.output.bias
    direction = weight[label] if against is None else weight[label] - weight[against]  # (C,)
    constant = bias[label] if against is None else bias[label] - bias[against]
    pooled = pool(final_hidden(classifier.body, cache), None, classifier.pool)[0]  # (C,)
    logit = classifier.pooled_logits(pooled) @ _selector(len(bias), label, against, bias)
    # (component, C)
    parts = Components(parts.names, torch.cat([pool(vectors, None, classifier.pool) for vectors in parts.vectors]))
    if classifier.pooler is not None:
        inputs = classifier.pooler(pooled)  # (C,)
        ratios = torch.where(inputs.abs() < _SMALL, torch.ones_like(inputs), classifier.pooler_activation(inputs) / inputs)
        parts = Components(parts.names, parts.vectors @ classifier.pooler.weight.T)
        if classifier.pooler.bias is not None:
            parts += Components(["pooling bias"], classifier.pooler.bias[None])
        parts = parts.scaled(ratios)
    if classifier.pooler_norm is not None:
        parts = frozen_norm(classifier.pooler_norm, parts, "pooling norm bias")
    contributions = torch.cat((parts.vectors @ direction, constant[None]))
    return Attribution([*parts.names, "label bias"], contributions[:, None, None], logit[None, None])


def _selector(count: int, label: int, against: int | None, like: Tensor) -> Tensor:
    """Return the vector (count,) whose dot product with the logits is the logit of `label`, or its difference to `against`."""
    selector = torch.zeros(count, device=like.device)
    selector[label] += 1
    if against is not None:
        selector[against] -= 1
    return selector
