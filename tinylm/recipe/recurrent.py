"""The `model:` sections of recurrent networks: rnn, lstm and gru."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from tinylm.recipe.base import ModelVariant
from tinylm.recipe.values import Blocks, ContextLength, CountOrZero, Flag, ShareBelowOne, Width


class RecurrentSection(ModelVariant):
    """The keys of all recurrent networks."""

    training_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {"compile": ("auto", False), "activation_checkpointing": (False,)}
    reads_across_documents = True
    gates: ClassVar[int]
    """Number of matrices in each weight of a layer."""

    n_layer: Blocks = 2
    """Number of recurrent layers."""
    n_embd: Width = 256
    """Width of the token embedding and of every layer."""
    context_length: ContextLength = 128
    """Number of tokens that a training sequence predicts. Gradients do not flow back to earlier tokens. Evaluation and sampling
    carry the state over any number of tokens."""
    burn_in: CountOrZero = 32
    """Number of tokens before each training sequence that only compute its first state, without a gradient. 0 starts each sequence
    with an empty state."""
    tie_embeddings: Flag = False
    """Use the weights of the token embedding as those of the head."""
    dropout: ShareBelowOne = 0.0
    """Variational dropout of the embedding and of the output of each layer (Gal & Ghahramani 2016): a sequence has the same mask at
    all positions."""
    weight_drop: ShareBelowOne = 0.0
    """The share of the recurrent weights that are dropped in each micro-batch (Merity et al. 2018)."""

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
    """A gated recurrent unit (Cho et al. 2014), in the variant of torch.nn.GRU."""

    gates = 3

    architecture: Literal["gru"] = "gru"
