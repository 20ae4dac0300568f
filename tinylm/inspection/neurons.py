"""Find where in a text each feed-forward neuron is most active.

Legend: `B` windows, `T` tokens in a window, `F` neurons, `K` ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.model.base import Model
from tinylm.model.hooks import ActivationCache


@dataclass(frozen=True)
class TopActivations:
    """Where neurons are most active, highest activation first. All tensors have the shape (neuron, rank)."""

    values: Tensor
    windows: Tensor
    """Index of the window."""
    positions: Tensor
    """Position in the window."""


@torch.no_grad()
def top_activations(
    network: Model,
    windows: Tensor,
    layer: int,
    neurons: Tensor | None = None,
    *,
    count: int = 5,
    cache: ActivationCache | None = None,
) -> TopActivations:
    """Find where the neurons in a layer are most active in windows of token ids (window, position).

    The activation is `mlp.post`, the input to the layer's output projection. `neurons` (neuron,) selects neurons; the default is
    all neurons. To skip the forward pass, pass a `cache` with the activations for these windows. Raises `InputError` if the model
    has no such layer.
    """
    name = neuron_name(network, layer)
    if cache is None:
        _, cache = network.run_with_cache(windows, [name])
    activations = cache[name].flatten(0, 1)  # (B T, F)
    if neurons is not None:
        activations = activations[:, neurons]
    top = activations.topk(min(count, len(activations)), dim=0)
    places = top.indices.T
    return TopActivations(top.values.T, places // windows.shape[1], places % windows.shape[1])


def neuron_name(network: Model, layer: int) -> str:
    """Return the hook point of a layer's neurons. Raises `InputError` if the model has no such layer."""
    name = f"blocks.{layer}.mlp.post"
    if name not in network.hook_names():
        raise InputError(f"a model with the {network.architecture} architecture has no feed-forward layer {layer}")
    return name
