"""Starting weights. Every preset starts from a normal distribution scaled by a rule that is stated here.

gpt2 and llama: standard deviation 0.02, in the projections that end a residual branch divided by sqrt(2 * layers)
(Radford et al. 2019). With `zero_init_outputs`: matrices get 0.5 / sqrt(inputs), those projections start at zero, and an
untied head near zero, so that the first loss is log of the vocabulary. An untied embedding that a norm follows starts at 1; n-gram
and value embeddings start small, as additions.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from tinylm.recipe.schema import ModelSection


def initialize(network: nn.Module, model: ModelSection, generator: torch.Generator) -> None:
    """Fill every parameter, in the order of their names' definition, from `generator` (on the CPU)."""
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
            _normal(module.weight, std, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            main = name == "embedding" and model.embedding_norm and not model.tie_embeddings
            _normal(module.weight, 1.0 if main else 0.02, generator)


def _normal(weight: torch.Tensor, std: float, generator: torch.Generator) -> None:
    with torch.no_grad():
        if std == 0:
            weight.zero_()
        else:
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
