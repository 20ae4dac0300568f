"""A text classifier: a network without its head, pooling to one vector per text, and an output layer with one logit per label.

Legend: `B` batch, `T` time, `C` width, `L` labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinylm.errors import InputError
from tinylm.model.base import BODY, Model
from tinylm.model.functions import Dropout
from tinylm.model.stateful import StatefulModel
from tinylm.recipe.labels import ClassificationObjective

_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu_norm": nn.functional.gelu}
_INITIAL_STD = 0.02


def text_hidden(network: Model, tokens: Tensor, segments: Tensor | None) -> Tensor:
    """Ids (B, T), one text per row -> final hidden states (B, T, C).

    `segments` (B, T) is negative at the padding, which follows the text. None means that there is no padding. A causal network does
    not need a mask, because text never attends to the padding after it.
    """
    if isinstance(network, StatefulModel):  # in training mode, `hidden` returns zeros for the burn-in positions
        hidden, _ = network.continue_from(tokens, network.empty_state(len(tokens)))
        return hidden
    return network.hidden(tokens, segments=None if network.is_causal else segments)


def pool(hidden: Tensor, segments: Tensor | None, how: str) -> Tensor:
    """Hidden states (B, T, C) -> one vector per text (B, C). `how`: cls, mean or last. Padding has negative `segments`."""
    if how == "cls":
        return hidden[:, 0]
    if segments is None:
        return hidden.mean(dim=1) if how == "mean" else hidden[:, -1]
    is_text = segments >= 0
    lengths = is_text.sum(dim=1)
    if how == "last":
        last = (lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return hidden.gather(1, last)[:, 0]  # indexing with `arange` would fix the batch size of an exported graph
    return (hidden * is_text[..., None].to(hidden.dtype)).sum(dim=1) / lengths[:, None].to(hidden.dtype)


class SequenceClassifier(Model):
    """Predicts a text's label from the hidden states of `body`, whose head is removed."""

    def __init__(self, body: Model, objective: ClassificationObjective, *, seed: int | None = 0) -> None:
        """Raises `InputError` if the objective has no labels."""
        super().__init__(body.model, body.vocab_size)
        if not objective.labels:
            raise InputError("there are no labels yet", where="objective.labels", hint="train the model first")
        body.remove_head()
        self.body = body
        self._objective = objective
        width = body.input_embedding().embedding_dim
        has_norm = objective.pooler == "gelu_norm"
        bias = bool(getattr(body.model, "bias", True)) if has_norm else True
        self.pooler = nn.Linear(width, width, bias=bias) if objective.pooler != "none" else None
        self.pooler_norm = nn.LayerNorm(width, eps=getattr(body.model, "norm_eps", 1e-5), bias=bias) if has_norm else None
        self.output = nn.Linear(width, len(objective.labels))
        self.dropout = Dropout(float(getattr(body.model, "dropout", 0.0)))
        if seed is not None:
            self._initialize(torch.Generator().manual_seed(seed))

    def _initialize(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for module in (self.pooler, self.output):
                if module is not None:
                    module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * _INITIAL_STD)
                    if module.bias is not None:
                        module.bias.zero_()

    @property
    def objective(self) -> ClassificationObjective:
        return self._objective

    @property
    def pool(self) -> str:
        """The pooling method: cls, mean or last."""
        if self._objective.pool != "auto":
            return self._objective.pool
        return "last" if self.body.is_causal else "cls"

    def forward(  # type: ignore[override]  # only models that predict the next token have teachers
        self, tokens: Tensor, *, targets: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Ids (B, T), one text per row -> logits (B, L). Padding has negative `segments`."""
        if targets is not None:
            raise ValueError("a classifier does not accept `targets`; its objective computes the loss")
        self.body.recompute = self.recompute
        return self.label_logits(text_hidden(self.body, tokens, segments), segments)

    def label_logits(self, hidden: Tensor, segments: Tensor | None = None) -> Tensor:
        """Final hidden states (B, T, C) of the body -> logits (B, L). Padding has negative `segments`."""
        return self.pooled_logits(pool(hidden, segments, self.pool))

    def pooled_logits(self, vectors: Tensor) -> Tensor:
        """Pooled vectors (..., C) -> logits (..., L)."""
        if self.pooler is not None:
            vectors = self.pooler_activation(self.pooler(vectors))
        if self.pooler_norm is not None:
            vectors = self.pooler_norm(vectors)
        logits: Tensor = self.output(self.dropout(vectors))
        return logits

    def pooler_activation(self, x: Tensor) -> Tensor:
        """Apply the activation function of the pooling layer."""
        return _ACTIVATIONS[self._objective.pooler](x)

    def hidden(self, tokens: Tensor, **options: Any) -> Tensor:
        return self.body.hidden(tokens, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        raise InputError("this model predicts labels, not tokens", hint="use `tinylm classify`")

    @property
    def device(self) -> torch.device:
        return self.output.weight.device

    def compile_units(self) -> Sequence[nn.Module]:
        return self.body.compile_units()

    def compile_stacks(self) -> Sequence[nn.Module]:
        return self.body.compile_stacks()

    def muon_weights(self) -> list[str]:
        return [BODY + name for name in self.body.muon_weights()]

    def stacked_matrices(self) -> dict[str, tuple[int, ...]]:
        return {BODY + name: rows for name, rows in self.body.stacked_matrices().items()}

    def lr_multipliers(self) -> dict[str, float]:
        return {BODY + name: factor for name, factor in self.body.lr_multipliers().items()}

    def tied_weights(self) -> dict[str, str]:
        return {BODY + name: BODY + stored for name, stored in self.body.tied_weights().items()}

    def vocabulary_weights(self) -> frozenset[str]:
        return frozenset(BODY + name for name in self.body.vocabulary_weights())

    def head_weights(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.named_parameters() if not name.startswith(BODY))

    def input_embedding(self) -> nn.Embedding:
        return self.body.input_embedding()

    @property
    def depth(self) -> int:
        return self.body.depth


def without_classifier(network: Model) -> Model:
    """Return a classifier's body, or the network itself if it is not a classifier."""
    return network.body if isinstance(network, SequenceClassifier) else network
