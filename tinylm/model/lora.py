"""Low-rank adaptation (Hu et al. 2022): a trained model stays as it is, and small additions to its matrices are learned.

`attach` freezes a network and puts an addition beside the chosen matrices; `merge` adds them in, so that what is left is a plain
network again. Weights keep their names: a checkpoint holds the frozen ones too and needs no other run.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import LoraSection, ModelSection


class LoraLinear(nn.Linear):
    """y = W x + b + (alpha / rank) B A x, with W and b frozen (section 4.1): A (rank, inputs) at random, B (outputs, rank) zero."""

    def __init__(self, frozen: nn.Linear, section: LoraSection, generator: torch.Generator) -> None:
        super().__init__(frozen.in_features, frozen.out_features, bias=frozen.bias is not None, device="meta")
        self.weight, self.bias = frozen.weight, frozen.bias
        self.section = section
        self.scale = section.alpha / section.rank
        bound = 1 / math.sqrt(self.in_features)
        start = torch.rand((section.rank, self.in_features), generator=generator, device=generator.device)
        device = frozen.weight.device
        self.lora_a = nn.Parameter((start * 2 - 1).mul_(bound).to(device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, section.rank, device=device))

    def forward(self, input: Tensor) -> Tensor:
        added = F.linear(F.linear(input, self.lora_a), self.lora_b)
        return F.linear(input, self.weight, self.bias) + self.scale * added

    def merged(self) -> nn.Linear:
        """The same layer as one matrix."""
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        with torch.no_grad():
            plain.weight = nn.Parameter(self.weight + self.scale * self.lora_b @ self.lora_a)
        plain.bias = self.bias
        return plain


def attach(network: nn.Module, section: LoraSection, seed: int = 0) -> None:
    """Freeze every parameter and give the blocks' target matrices an addition that starts at nothing."""
    generator = torch.Generator().manual_seed(seed)
    network.requires_grad_(False)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("blocks.") and name.endswith(section.targets):
            network.set_submodule(name, LoraLinear(module, section, generator))


def blank(model: ModelSection, vocab_size: int, section: LoraSection | None) -> Transformer:
    """A network whose weights are yet to be filled in, with the additions that `section` describes."""
    network = Transformer(model, vocab_size, seed=None)
    if section is not None:
        attach(network, section)
    return network


def section_of(network: nn.Module) -> LoraSection | None:
    """What `attach` was told, or None for a plain network."""
    return next((module.section for module in network.modules() if isinstance(module, LoraLinear)), None)


def merge(network: nn.Module) -> None:
    """Add every addition to its matrix; the network is as if it had never had any, and its parameters are free again."""
    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLinear):
            network.set_submodule(name, module.merged())
    network.requires_grad_(True)
