"""The `model:` sections of recurrent networks: rnn, lstm and gru."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from tinylm.recipe.base import ModelVariant
from tinylm.recipe.values import Blocks, ContextLength, CountOrZero, Flag, ShareBelowOne, Width


class RecurrentSection(ModelVariant):
    """Keys shared by all recurrent networks."""

    training_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {"compile": ("auto", False), "activation_checkpointing": (False,)}
    reads_across_documents = True
    gates: ClassVar[int]
    """Number of matrices that each layer weight stacks."""

    n_layer: Blocks = 2
    """Number of recurrent layers."""
    n_embd: Width = 256
    """Width of the token embedding and of every layer."""
    context_length: ContextLength = 128
    """Number of predicted tokens in a training sequence. Gradients do not flow back to earlier tokens. Evaluation and sampling
    carry the state through any number of tokens."""
    burn_in: CountOrZero = 32
    """Number of tokens before each training sequence that are used only to compute its initial state, without a gradient. `0`
    starts each sequence with an empty state."""
    tie_embeddings: Flag = False
    """Share the weights of the token embedding with the head."""
    dropout: ShareBelowOne = 0.0
    """Variational dropout for the embedding and the output of each layer (Gal & Ghahramani 2016). All positions in a sequence share
    the same mask."""
    weight_drop: ShareBelowOne = 0.0
    """The fraction of the recurrent weights that is dropped in each micro-batch (Merity et al. 2018)."""

    @property
    def uses_dropout(self) -> bool:
        return self.dropout > 0 or self.weight_drop > 0

    @property
    def warmup_tokens(self) -> int:
        return self.burn_in

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.burn_in > self.context_length:
            yield "burn_in", f"must be at most context_length {self.context_length}, not {self.burn_in}"


class RnnSection(RecurrentSection):
    """A simple recurrent network (Elman 1990)."""

    gates = 1

    architecture: Literal["rnn"] = "rnn"
    activation: Literal["tanh", "relu"] = "tanh"
    """The activation function."""


class LstmSection(RecurrentSection):
    """A long short-term memory (Hochreiter & Schmidhuber 1997)."""

    gates = 4

    architecture: Literal["lstm"] = "lstm"


class GruSection(RecurrentSection):
    """A gated recurrent unit (Cho et al. 2014), as in torch.nn.GRU."""

    gates = 3

    architecture: Literal["gru"] = "gru"
