"""Initial weights. Each matrix is drawn from a normal distribution with one of these standard deviations:

- Linear layers by default (gpt2, llama): 0.02, divided by sqrt(2 * layers) in the last projection of each residual branch
  (Radford et al. 2019).
- Linear layers with `zero_init_outputs`: 0.5 / sqrt(inputs), but 0 in the last projection of each residual branch and 0.001 in an
  untied head, which makes the initial loss close to log(vocabulary size).
- Embeddings: 0.02, or 1 for an untied token embedding that is followed by a norm. N-gram and value embeddings start small
  because they are added to other vectors.

Biases start at zero.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from tinylm.recipe.schema import TransformerSection


def initialize(network: nn.Module, model: TransformerSection, generator: torch.Generator) -> None:
    """Initialize every linear layer and embedding in `network`, in the order of `named_modules`. `generator` must be on the CPU."""
    residual_scale = 1 / math.sqrt(2 * model.n_layer)
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            ends_branch = name.endswith("output")
            if model.zero_init_outputs:
                std = 0.0 if ends_branch else 0.5 / math.sqrt(module.in_features)
            else:
                std = 0.02 * (residual_scale if ends_branch else 1.0)
            if name == "head" and model.zero_init_outputs:
                std = 0.001
            _init_normal(module.weight, std, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            normed = name == "embedding" and model.embedding_norm and not model.tie_embeddings
            _init_normal(module.weight, 1.0 if normed else 0.02, generator)


def _init_normal(weight: torch.Tensor, std: float, generator: torch.Generator) -> None:
    with torch.no_grad():
        if std == 0:
            weight.zero_()
        else:
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
