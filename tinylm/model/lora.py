"""LoRA, low-rank adaptation (Hu et al. 2022): train low-rank updates to the matrices of a frozen model.

`attach` freezes a network and adds LoRA weights to the chosen matrices. `merge` adds the updates to the matrices and removes the
LoRA weights. Frozen weights keep their names and are part of checkpoints, so a fine-tuned run does not need its source run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.model.base import BODY, Model
from tinylm.optim.groups import TRAINED_ROWS
from tinylm.recipe.schema import LoraSection
from tinylm.recipe.support import ANY, COMMON, Supports, check_supported

SUPPORTS: Supports = {
    **COMMON,
    **dict.fromkeys(
        (
            "attention_window",
            "attention_pattern",
            "attention_softcap",
            "embedding_scale",
            "qk_norm_joint",
            "shifted_key_heads",
            "rope_scaling",
            "rope_fraction",
            "rope_theta_local",
            "rope_pattern",
        ),
        ANY,
    ),
    "norm_position": ("pre", "post", "output", "both"),
    "feed_forward": ("gelu", "gelu_exact", "relu", "relu2", "swiglu", "geglu"),
}
"""The values of `model:` keys that `attach` supports."""
ENCODERS: Supports = {
    **SUPPORTS,
    "architecture": ("encoder",),
    **dict.fromkeys(("token_types", "head_transform", "head_bias", "norm_first_block"), ANY),
}
"""The supported values for encoders."""


class LoraLinear(nn.Linear):
    """y = W x + b + (alpha / rank) B A x with frozen W and b (section 4.1).

    A (rank, inputs) is initialized randomly, and B (outputs, rank) is initialized to zero.
    """

    def __init__(self, frozen: nn.Linear, section: LoraSection, generator: torch.Generator) -> None:
        super().__init__(frozen.in_features, frozen.out_features, bias=frozen.bias is not None, device="meta")
        self.weight, self.bias = frozen.weight, frozen.bias
        self.section = section
        self.scale = section.alpha / section.rank
        bound = 1 / math.sqrt(self.in_features)
        uniform = torch.rand((section.rank, self.in_features), generator=generator, device=generator.device)
        device = frozen.weight.device
        self.lora_a = nn.Parameter((uniform * 2 - 1).mul_(bound).to(device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, section.rank, device=device))

    def forward(self, input: Tensor) -> Tensor:
        update = F.linear(F.linear(input, self.lora_a), self.lora_b)
        return F.linear(input, self.weight, self.bias) + self.scale * update

    def merged(self) -> nn.Linear:
        """Return a plain linear layer that computes the same function."""
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        with torch.no_grad():
            plain.weight = nn.Parameter(self.weight + self.scale * self.lora_b @ self.lora_a)
        plain.bias = self.bias
        return plain


def attach(network: Model, section: LoraSection, seed: int = 0) -> None:
    """Freeze every parameter of `network` and add LoRA weights to the target matrices in its blocks, in place.

    A classifier's output layers stay trainable. Raises `InputError` if the network has a part that LoRA does not support.
    """
    check_supported(network.model, ENCODERS if network.model.bidirectional else SUPPORTS, "LoRA", "training.lora")
    generator = torch.Generator().manual_seed(seed)
    network.requires_grad_(False)
    for name, module in list(network.named_modules()):
        in_block = name.removeprefix(BODY).startswith("blocks.")
        if isinstance(module, nn.Linear) and in_block and name.endswith(section.targets):
            network.set_submodule(name, LoraLinear(module, section, generator))
    if network.objective is not None:  # a classifier's output layers are not pretrained
        for name in network.head_weights():
            network.get_parameter(name).requires_grad_(True)


def train_rows(network: Model, ids: Sequence[int]) -> int:
    """Also train the embedding and head rows of these tokens, for example of new control tokens.

    A new token's row starts as the mean of other rows. If it stayed frozen, the token could never be the most likely next token.
    The other rows do not change: their gradients are set to zero, and `TRAINED_ROWS` disables weight decay. Returns the number of
    trained values.
    """
    kept = torch.zeros(network.vocab_size, 1)
    kept[list(ids)] = 1.0
    tables = {network.input_embedding().weight, network.output_embedding().weight}
    for table in tables:
        table.requires_grad_(True)
        table.register_hook(lambda gradient: gradient * kept.to(gradient))  # type: ignore[no-untyped-call]
        setattr(table, TRAINED_ROWS, len(ids))
    return sum(len(ids) * table.shape[1] for table in tables)


def has_trained_rows(network: nn.Module) -> bool:
    """Return whether `train_rows` was called on the network."""
    return any(hasattr(parameter, TRAINED_ROWS) for parameter in network.parameters())


def section_of(network: nn.Module) -> LoraSection | None:
    """Return the section that was passed to `attach`, or None for a network without LoRA."""
    return next((module.section for module in network.modules() if isinstance(module, LoraLinear)), None)


def merge(network: nn.Module) -> None:
    """Add the LoRA updates to the matrices in place, remove the LoRA weights, and unfreeze every parameter."""
    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLinear):
            network.set_submodule(name, module.merged())
    network.requires_grad_(True)
