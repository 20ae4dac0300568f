"""Modify activations and measure the effect: mean ablation, and activation patching between two texts (Meng et al. 2022).

Legend: `B` batch, `T` time, `H` heads, `D` head width, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.evaluation.scoring import token_losses
from tinylm.model.base import Model
from tinylm.model.hooks import HookFunction
from tinylm.reporting import Advance

Metric = Callable[[Tensor], Tensor]
"""Maps the logits at one position (batch, vocabulary) to one number per row (batch,)."""
_BATCH_TOKENS = 2048


def _ignore_progress(done: int) -> None:
    pass


# Ablation.


@dataclass(frozen=True)
class Ablation:
    """How much the loss increases, in nats per token, when a head or feed-forward layer is replaced with its mean.

    `head_errors` and `feed_forward_errors` are standard errors. Multiply by `bits_per_byte_factor` to convert to bits per byte.
    """

    loss: float
    """The loss without ablation."""
    heads: Tensor
    """(layer, head)."""
    head_errors: Tensor
    feed_forward: Tensor
    """(layer,)."""
    feed_forward_errors: Tensor
    tokens: int
    """The number of tokens that were scored."""

    @staticmethod
    def bits_per_byte_factor(tokens: int, size: int) -> float:
        """Return the factor that converts nats per token to bits per byte for a text with `tokens` tokens and `size` bytes."""
        return tokens / (size * math.log(2))


@torch.no_grad()
def ablate(network: Model, windows: Tensor, targets: Tensor | None = None, *, on_progress: Advance = _ignore_progress) -> Ablation:
    """Replace one head or feed-forward layer at a time with its mean over `windows`, and measure the loss.

    `windows` contains ids (window, position). `targets` contains ids of the same shape; negative ids are not scored. By default,
    the target is the next token. A head is ablated at `attn.z`, its output before the output projection, and a feed-forward layer
    at `mlp_out`. The mean is over all windows and positions. `on_progress` receives the number of finished forward passes. Raises
    `InputError` if the model has neither heads nor feed-forward layers.
    """
    if targets is None:
        windows, targets = windows[:, :-1], windows[:, 1:]
    known = network.hook_names()
    head_names = [name for name in known if name.endswith(".attn.z")]
    layer_names = [name for name in known if name.endswith(".mlp_out")]
    if not head_names and not layer_names:
        raise InputError(f"a model with the {network.architecture} architecture has neither heads nor feed-forward layers")
    logits, cache = network.run_with_cache(windows, [*head_names, *layer_names])
    scored = targets.flatten() >= 0
    before = token_losses(logits, targets).flatten()[scored]
    done = 1
    on_progress(done)

    def measure(name: str, function: HookFunction) -> tuple[Tensor, Tensor]:
        nonlocal done
        with network.hooks({name: function}):
            after = token_losses(network(windows), targets).flatten()[scored]
        done += 1
        on_progress(done)
        change = (after - before).double()
        return change.mean(), change.std() / math.sqrt(len(change))

    heads = [
        [measure(name, _set_head(head, cache[name][:, :, head].mean((0, 1)))) for head in range(cache[name].shape[2])]
        for name in head_names
    ]
    layers = [measure(name, _set_all(cache[name].mean((0, 1)))) for name in layer_names]
    return Ablation(
        loss=float(before.double().mean()),
        heads=torch.tensor([[float(mean) for mean, _ in row] for row in heads]),
        head_errors=torch.tensor([[float(error) for _, error in row] for row in heads]),
        feed_forward=torch.tensor([float(mean) for mean, _ in layers]),
        feed_forward_errors=torch.tensor([float(error) for _, error in layers]),
        tokens=int(scored.sum()),
    )


def _set_head(head: int, value: Tensor) -> HookFunction:
    def replace(z: Tensor, name: str) -> None:
        z[:, :, head] = value

    return replace


def _set_all(value: Tensor) -> HookFunction:
    return lambda x, name: value.expand_as(x)


# Patching.


def logit_difference(target: int, against: int) -> Metric:
    """Return the usual metric for patching between texts with different answers: the difference between two tokens' logits."""
    return lambda logits: logits[:, target] - logits[:, against]


@torch.no_grad()
def patch(
    network: Model,
    clean: Tensor,
    corrupt: Tensor,
    metric: Metric,
    *,
    at: str = "resid_pre",
    position: int = -1,
    on_progress: Advance = _ignore_progress,
) -> Tensor:
    """Run the model on `corrupt` with one activation patched in from `clean`, and repeat this for every place.

    Both texts are ids (1, T). Returns (patched - corrupt) / (clean - corrupt), where each term is the metric of the prediction at
    `position`. 0 means that the place does not matter, and 1 that it fully restores the prediction. With `at="z"`, a place is a
    head at all positions, and the result is (layer, head). Otherwise, a place is a position in `blocks.{i}.{at}`, for example in
    `resid_pre`, `attn_out` or `mlp_out`, and the result is (layer, position). `on_progress` receives the number of finished layers.
    Raises `InputError` if the lengths differ, the metric is the same for both texts, or the model has no such activations.
    """
    if clean.shape != corrupt.shape or len(clean) != 1:
        raise InputError(f"the texts must have the same number of tokens, not {clean.shape[-1]} and {corrupt.shape[-1]}")
    hook = "attn.z" if at == "z" else at
    names = [f"blocks.{layer}.{hook}" for layer in range(network.depth)]
    if not names or not set(names) <= set(network.hook_names()):
        raise InputError(f"a model with the {network.architecture} architecture has no activations {hook}")
    clean_logits, cache = network.run_with_cache(clean, names)
    clean_value, corrupt_value = metric(clean_logits[:, position]), metric(network(corrupt)[:, position])
    if torch.allclose(clean_value, corrupt_value, rtol=0, atol=1e-6):
        raise InputError("the model predicts the same after both texts, so there is no effect to restore")

    def measure(logits: Tensor) -> Tensor:
        return metric(logits[:, position])

    effects = []
    for layer, name in enumerate(names):
        source = cache[name]
        places = source.shape[2] if at == "z" else source.shape[1]
        values = [
            measure(_patched_logits(network, corrupt, name, source, rows, heads=at == "z"))
            for rows in torch.split(torch.arange(places), max(1, _BATCH_TOKENS // corrupt.shape[1]))
        ]
        effects.append((torch.cat(values) - corrupt_value) / (clean_value - corrupt_value))
        on_progress(layer + 1)
    return torch.stack(effects)


def _patched_logits(network: Model, corrupt: Tensor, name: str, source: Tensor, places: Tensor, *, heads: bool) -> Tensor:
    """Run one row per place. In each row, patch the head or position with the number `places[row]`. Returns (place, T, V)."""

    def replace(x: Tensor, name: str) -> None:
        for row, place in enumerate(places.tolist()):
            if heads:
                x[row, :, place] = source[0, :, place]
            else:
                x[row, place] = source[0, place]

    with network.hooks({name: replace}):
        logits: Tensor = network(corrupt.expand(len(places), -1))
    return logits
