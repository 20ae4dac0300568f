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
from tinylm.model.decomposition import decompose, hook_names
from tinylm.model.hooks import ActivationCache


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
        """The largest difference between a logit and the sum of its contributions, which is only due to rounding."""
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
    hidden = cache["final_norm"] if "final_norm" in cache else network.hidden(tokens)
    names, contributions = list(parts.names), torch.einsum("nbtc,btc->nbt", parts.vectors, direction)
    logits = (hidden * direction).sum(-1)
    bias = network.output_embedding().bias
    if bias is not None:
        biases = bias[targets] if against is None else bias[targets] - bias[against]  # (B, T)
        names, contributions, logits = [*names, "head bias"], torch.cat((contributions, biases[None])), logits + biases
    return Attribution(names, contributions, logits)
