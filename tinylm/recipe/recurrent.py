"""The `model:` sections of recurrent networks: rnn, lstm and gru, and recurrent_encoder_decoder for translation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from tinylm.recipe.base import ModelVariant
from tinylm.recipe.presets import RECURRENT_ENCODER_DECODER_PRESETS
from tinylm.recipe.values import Blocks, ContextLength, CountOrZero, Flag, ShareBelowOne, Width

Cell = Literal["rnn_tanh", "rnn_relu", "lstm", "gru"]
"""The computation of a recurrent layer, named as in torch."""
_TRAINING_VALUES: Mapping[str, tuple[Any, ...]] = {"compile": ("auto", False), "activation_checkpointing": (False,)}


class RecurrentSection(ModelVariant):
    """Keys shared by the recurrent language models."""

    training_values: ClassVar[Mapping[str, tuple[Any, ...]]] = _TRAINING_VALUES
    reads_across_documents = True

    n_layer: Blocks = 2
    """Number of recurrent layers."""
    n_embd: Width = 256
    """Width of the token embedding and of every layer."""
    context_length: ContextLength = 128
    """Number of predicted tokens in a training sequence. Gradients do not flow back to earlier tokens. Evaluation and sampling
    carry the state through any number of tokens."""
    burn_in: CountOrZero = 32
    """Number of tokens before each training sequence that are used only to compute its initial state, without a gradient, at most
    `context_length`. `0` starts each sequence with an empty state."""
    tie_embeddings: Flag = False
    """Share the weights of the token embedding with the head."""
    dropout: ShareBelowOne = 0.0
    """Variational dropout for the embedding and the output of each layer (Gal & Ghahramani 2016). All positions in a sequence share
    the same mask."""
    weight_drop: ShareBelowOne = 0.0
    """The fraction of the recurrent weights that is dropped in each micro-batch (Merity et al. 2018)."""

    @model_validator(mode="before")
    @classmethod
    def _limit_default_burn_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        length, default = values.get("context_length"), cls.model_fields["burn_in"].default
        return {"burn_in": length, **values} if type(length) is int and 0 < length < default else values

    @property
    def uses_dropout(self) -> bool:
        return self.dropout > 0 or self.weight_drop > 0

    @property
    def warmup_tokens(self) -> int:
        return self.burn_in

    @property
    def cell(self) -> Cell:
        """The computation of the layers."""
        raise NotImplementedError

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.burn_in > self.context_length:
            yield "burn_in", f"must be at most context_length {self.context_length}, not {self.burn_in}"


class RnnSection(RecurrentSection):
    """A simple recurrent network (Elman 1990)."""

    architecture: Literal["rnn"] = "rnn"
    activation: Literal["tanh", "relu"] = "tanh"
    """The activation function."""

    @property
    def cell(self) -> Cell:
        return "rnn_tanh" if self.activation == "tanh" else "rnn_relu"


class LstmSection(RecurrentSection):
    """A long short-term memory (Hochreiter & Schmidhuber 1997)."""

    architecture: Literal["lstm"] = "lstm"

    @property
    def cell(self) -> Cell:
        return "lstm"


class GruSection(RecurrentSection):
    """A gated recurrent unit (Cho et al. 2014), as in torch.nn.GRU."""

    architecture: Literal["gru"] = "gru"

    @property
    def cell(self) -> Cell:
        return "gru"


class RecurrentEncoderDecoderSection(ModelVariant):
    """A recurrent network for translation. `preset: bahdanau` has attention, and `preset: sutskever` does not."""

    presets = RECURRENT_ENCODER_DECODER_PRESETS
    objectives = ("translation",)
    training_values: ClassVar[Mapping[str, tuple[Any, ...]]] = _TRAINING_VALUES
    needs_full_window = False
    inspectable = False

    architecture: Literal["recurrent_encoder_decoder"] = "recurrent_encoder_decoder"
    preset: Literal["bahdanau", "sutskever"] = "bahdanau"
    """The preset that sets the defaults of `cell`, `n_layer`, `encoder_direction` and `attention`, as in Bahdanau et al. 2015 or
    Sutskever et al. 2014."""
    cell: Literal["lstm", "gru"]
    """The kind of layers."""
    n_layer: Blocks
    """Number of layers in the encoder, and in the decoder."""
    n_embd: Width = 256
    """Width of the embeddings and of every layer. With `encoder_direction: both`, this is the width of each direction."""
    encoder_direction: Literal["forward", "backward", "both"]
    """The direction in which the encoder reads the source sentence. `backward` starts with its last token. `both` uses a layer in
    each direction and concatenates their outputs."""
    attention: Literal["additive", "none"]
    """How the decoder reads the source sentence. `additive`: each step attends to the encoder's outputs. `none`: only through the
    encoder's last state, which is the decoder's first state."""
    context_length: ContextLength = 128
    """Maximum number of tokens in a source sentence, and in a translation. Longer training pairs are skipped."""
    tie_embeddings: Literal["all", "output", "none"] = "none"
    """Which matrices share their weights. `all`: the source embedding, the target embedding and the head. `output`: the target
    embedding and the head."""
    dropout: ShareBelowOne = 0.0
    """Variational dropout for the embeddings and the output of each layer (Gal & Ghahramani 2016). All positions in a sentence
    share the same mask."""

    @property
    def uses_dropout(self) -> bool:
        return self.dropout > 0

    @property
    def memory_width(self) -> int:
        """Width of the encoder's outputs."""
        return self.n_embd * (2 if self.encoder_direction == "both" else 1)
