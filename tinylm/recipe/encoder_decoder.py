"""The `model:` section of the encoder-decoder, whose decoder attends to the encoder's hidden states (Vaswani et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from tinylm.recipe.arithmetic import divisors
from tinylm.recipe.base import InitFrom, ModelVariant
from tinylm.recipe.encoder import EncoderSection
from tinylm.recipe.presets import ENCODER_DECODER_PRESETS
from tinylm.recipe.transformer import DecoderSection, TransformerSection, expand_init_from
from tinylm.recipe.values import (
    Blocks,
    ContextLength,
    Epsilon,
    Factor,
    Flag,
    OptionalPositive,
    OptionalShareBelowOne,
    OptionalWidth,
    ShareBelowOne,
    Width,
)


class EncoderDecoderSection(ModelVariant):
    """A transformer for translation. The `transformer` preset matches MarianMTModel.

    The keys have the same meaning as in the decoder architecture. They apply to the blocks of both the encoder and the decoder.
    """

    presets = ENCODER_DECODER_PRESETS
    objectives = ("translation",)
    training_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {"lora": (None,)}
    needs_full_window = False

    architecture: Literal["encoder_decoder"] = "encoder_decoder"
    preset: Literal["modern", "transformer"] = "modern"
    """The preset that sets the defaults of the other keys."""
    n_layer: Blocks = 6
    """Number of encoder blocks."""
    n_decoder_layer: OptionalWidth = None
    """Number of decoder blocks. `null` means `n_layer`."""
    n_head: Width = 8
    """Number of attention heads in each block."""
    n_kv_head: OptionalWidth = None
    """Number of key/value heads, for grouped-query attention. `null` means `n_head`."""
    n_embd: Width = 256
    """Width of the residual stream."""
    head_dim: OptionalWidth = None
    """Width of an attention head. `null` means `n_embd / n_head`."""
    context_length: ContextLength = 128
    """Maximum number of tokens in a source sentence, and in a translation. Longer training pairs are skipped."""
    norm: Literal["layernorm", "rmsnorm"]
    """The kind of normalization layer."""
    norm_position: Literal["pre", "post", "output", "both"]
    """Where norms are applied. `pre`: to the input of each attention and feed-forward layer. `post`: to each residual sum.
    `output`: to the output of each layer before it is added. `both`: to the input and the output. With all values except `post`, a
    norm is also applied to the input of the head."""
    norm_eps: Epsilon
    """The epsilon added under the square root of a norm."""
    norm_gain: Flag
    """Multiply the output of norms by a learned gain."""
    position: Literal["learned", "sinusoidal", "rope", "none"]
    """How positions are encoded. `sinusoidal` uses Marian's layout, in which all sines precede all cosines. `rope` rotates the
    queries and keys of self-attention."""
    rope_theta: OptionalPositive = None
    """The base of the rotary frequencies with `position: rope`. `null` means 10000."""
    feed_forward: Literal["gelu", "gelu_exact", "relu", "relu2", "silu", "swiglu", "geglu"]
    """The activation of the feed-forward layers."""
    feed_forward_multiple: Factor
    """The hidden width of the feed-forward layers as a multiple of `n_embd`, rounded to the nearest multiple of 8."""
    n_inner: OptionalWidth = None
    """The hidden width of the feed-forward layers. `null` means that `feed_forward_multiple` determines it."""
    bias: Flag
    """Use a learned bias in linear layers and layer norms."""
    head_bias: Flag
    """Use a learned bias in the head."""
    tie_embeddings: Literal["all", "output", "none"]
    """Which matrices share their weights. `all`: the source embedding, the target embedding and the head. `output`: the target
    embedding and the head."""
    scale_embeddings: Flag
    """Multiply embeddings by the square root of `n_embd`."""
    learned_start: Flag
    """Use a learned vector as the embedding before the first target token. If false, use zeros, as in Marian."""
    qk_norm: Flag
    """Apply an RMS norm to the queries and keys of each head."""
    embedding_norm: Flag
    """Normalize embeddings before the first block."""
    zero_init_outputs: Flag
    """Initialize the output projections of attention and feed-forward layers to zero."""
    dropout: ShareBelowOne
    """Dropout probability for the embeddings and for the output of each attention and feed-forward layer."""
    attention_dropout: OptionalShareBelowOne
    """Dropout probability for the attention weights. `null` means the value of `dropout`."""
    logit_softcap: OptionalPositive = None
    """Soft cap c for the logits, which become `c * tanh(logits / c)`. `null` means no cap."""
    init_from: Annotated[InitFrom | None, BeforeValidator(expand_init_from)] = None
    """The run whose weights are loaded: `init_from: RUN`, or `init_from: {run: RUN, head: off}`."""

    @property
    def uses_dropout(self) -> bool:
        return self.dropout > 0 or bool(self.attention_dropout)

    @property
    def pretrained(self) -> InitFrom | None:
        return self.init_from

    @property
    def decoder_layers(self) -> int:
        return self.n_decoder_layer or self.n_layer

    @property
    def encoder(self) -> EncoderSection:
        """The section that configures the encoder stack."""
        values = self._stack_values(self.n_layer)
        return EncoderSection(**values, tie_embeddings=False, token_types=0, head_transform=False, head_bias=False)

    @property
    def decoder(self) -> DecoderSection:
        """The section that configures the decoder stack."""
        return DecoderSection(**self._stack_values(self.decoder_layers), tie_embeddings=self.tie_embeddings != "none")

    def _stack_values(self, layers: int) -> dict[str, Any]:
        own = {"architecture", "preset", "n_layer", "tie_embeddings", "init_from"}
        shared = [key for key in type(self).model_fields if key in TransformerSection.model_fields and key not in own]
        scale = math.sqrt(self.n_embd) if self.scale_embeddings else 1.0
        return {**{key: getattr(self, key) for key in shared}, "n_layer": layers, "embedding_scale": scale}

    def problems(self) -> Iterator[tuple[str, str]]:
        heads = self.n_head
        if self.head_dim is None and self.n_embd % heads:
            nearest = min(divisors(self.n_embd), key=lambda number: abs(number - heads))
            yield "n_head", f"the width n_embd {self.n_embd} is not divisible by {heads} heads ({nearest} heads would work)"
            return
        yield from ((key, problem) for key, problem in self.encoder.problems() if key in type(self).model_fields)
