"""The `model:` sections of transformers with one stack of blocks: decoder and encoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tinylm.recipe.arithmetic import divisors
from tinylm.recipe.base import InitFrom, ModelVariant, Section
from tinylm.recipe.presets import DECODER_PRESETS
from tinylm.recipe.values import (
    AttentionPattern,
    Blocks,
    ContextLength,
    Count,
    CountOrZero,
    Epsilon,
    Factor,
    Flag,
    OptionalCount,
    OptionalPath,
    OptionalPositive,
    OptionalShareBelowOne,
    OptionalWidth,
    Orders,
    Positive,
    RopePattern,
    ShareAboveZero,
    ShareBelowOne,
    Width,
)


def expand_init_from(value: object) -> object:
    """Expand the short form `init_from: RUN` to `init_from: {run: RUN}`."""
    return {"run": value} if isinstance(value, str) else value


class LinearRopeScaling(Section):
    """Divide all positions by a factor (Chen et al. 2023)."""

    type: Literal["linear"]
    factor: Positive
    """The factor by which the context was extended."""


class Llama3RopeScaling(Section):
    """Divide the low frequencies by a factor, as Llama 3.1 does."""

    type: Literal["llama3"]
    factor: Positive
    """The factor by which the context was extended."""
    original_context: Count
    """The context length before the extension."""
    low_freq_factor: Positive = 1.0
    """Frequencies with fewer rotations than this in the original context are divided by `factor`."""
    high_freq_factor: Positive = 4.0
    """Frequencies with more rotations than this in the original context are unchanged. Those in between are interpolated."""


class YarnRopeScaling(Section):
    """YaRN (Peng et al. 2023): divide the low frequencies by a factor, and scale the attention scores."""

    type: Literal["yarn"]
    factor: Positive
    """The factor by which the context was extended."""
    original_context: Count
    """The context length before the extension."""
    beta_fast: Positive = 32.0
    """Frequencies with more rotations than this in the original context are unchanged."""
    beta_slow: Positive = 1.0
    """Frequencies with fewer rotations than this in the original context are divided by `factor`."""
    attention_factor: OptionalPositive = None
    """The scale of the rotated queries and keys. `null` means `0.1 ln(factor) + 1`."""
    truncate: Flag = True
    """Round the bounds computed from `beta_fast` and `beta_slow` to whole dimensions."""


RopeScaling = Annotated[LinearRopeScaling | Llama3RopeScaling | YarnRopeScaling, Field(discriminator="type")]


class TransformerSection(ModelVariant):
    """Keys shared by all transformers with one stack of blocks."""

    preset: str
    n_layer: Blocks = 6
    """Number of blocks."""
    n_head: Width = 6
    """Number of attention heads in each block."""
    n_kv_head: OptionalWidth = None
    """Number of key/value heads, for grouped-query attention (Ainslie et al. 2023). `null` means `n_head`."""
    n_embd: Width = 384
    """Width of the residual stream."""
    head_dim: OptionalWidth = None
    """Width of an attention head. `null` means `n_embd / n_head`."""
    context_length: ContextLength = 256
    """Number of tokens in a training sequence, and the maximum number of tokens the model attends to."""
    attention_window: OptionalCount = None
    """Number of positions that each position attends to, including itself, in local blocks (Beltagy et al. 2020; see
    `attention_pattern`). `null` means all earlier positions."""
    attention_pattern: AttentionPattern = ("local",)
    """The pattern of local blocks, which use `attention_window`. It repeats over the blocks: with `[local, local, global]`, every
    third block attends to all earlier positions."""
    norm: Literal["layernorm", "rmsnorm"]
    """The kind of normalization layer."""
    norm_position: Literal["pre", "post", "output", "both"]
    """Where norms are applied. `pre`: to the input of each attention and feed-forward layer. `post`: to each residual sum.
    `output`: to the output of each layer before it is added (OLMo 2). `both`: to the input and the output (Gemma 2). With all
    values except `post`, a norm is also applied to the input of the head."""
    norm_eps: Epsilon
    """The epsilon added under the square root of a norm."""
    norm_gain: Flag
    """Multiply the output of norms by a learned gain."""
    position: Literal["learned", "sinusoidal", "rope", "none"]
    """How positions are encoded: by a learned or sinusoidal embedding, by rotating queries and keys (`rope`), or not at all."""
    rope_theta: OptionalPositive = None
    """The base of the rotary frequencies with `position: rope`. `null` means 10000."""
    rope_theta_local: OptionalPositive = None
    """The base of the rotary frequencies, without `rope_scaling`, in local blocks (Gemma 3; see `attention_pattern`). `null` means
    `rope_theta`."""
    rope_scaling: RopeScaling | None = None
    """How rotary frequencies are scaled for a longer context. `null` means no scaling."""
    rope_fraction: ShareAboveZero = 1.0
    """The fraction of each head's dimensions to rotate (GPT-NeoX)."""
    rope_pattern: RopePattern = ("rope",)
    """The pattern of blocks that use rotary positions. It repeats over the blocks: with `[rope, rope, none]`, every third block
    does not encode positions (SmolLM3)."""
    feed_forward: Literal["gelu", "gelu_exact", "relu", "relu2", "silu", "swiglu", "geglu", "geglu_exact"]
    """The activation of the feed-forward layers. `gelu` is GPT-2's tanh approximation, and `gelu_exact` is the exact function.
    `swiglu`, `geglu` and `geglu_exact` are the gated variants of SiLU, `gelu` and `gelu_exact` (Shazeer 2020)."""
    feed_forward_multiple: Factor
    """The hidden width of the feed-forward layers as a multiple of `n_embd`, rounded to the nearest multiple of 8."""
    n_inner: OptionalWidth = None
    """The hidden width of the feed-forward layers. `null` means that `feed_forward_multiple` determines it."""
    bias: Flag
    """Use a learned bias in linear layers and layer norms."""
    tie_embeddings: Flag
    """Share the weights of the token embedding with the head."""
    qk_norm: Flag
    """Apply an RMS norm to the queries and keys of each head, before rotation."""
    qk_norm_joint: Flag = False
    """Normalize the queries of all heads together, and the keys of all heads together (OLMo 2). If false, normalize each head
    separately."""
    qk_gain: Flag = True
    """Multiply the output of `qk_norm` by a learned gain."""
    shifted_key_heads: CountOrZero = 0
    """Number of key heads in each block that use the key of the previous position, so that attention to a position depends on the
    token before it. A single block can then continue a sequence that occurred before, for which two blocks are otherwise needed
    (Olsson et al. 2022)."""
    embedding_norm: Flag
    """Normalize the token embedding before the first block."""
    embedding_scale: Positive = 1.0
    """Multiply the token embedding by this factor (Gemma)."""
    zero_init_outputs: Flag
    """Initialize the output projections of attention and feed-forward layers to zero, so that every block starts as the identity.
    The head starts near zero, and other matrices have a standard deviation of 0.5 / sqrt(inputs)."""
    ngram_embeddings: Orders = ()
    """Values of n, such as `[2, 3]`. For each n, a hashed embedding of the last n tokens is added to the token embedding (Pagnoni
    et al. 2024). `[]` means none."""
    ngram_rows: Count = 16384
    """Number of rows in the embedding table for each n."""
    ngram_width: Width = 32
    """Width of the n-gram embedding tables."""
    ngram_dropout: ShareBelowOne = 0.0
    """The fraction of n-gram embeddings to drop in training. Without dropout, the tables quickly memorize a small text."""
    value_embeddings: CountOrZero = 0
    """Add a token embedding to the attention values in this many blocks at the start and at the end (Zhou et al. 2024)."""
    value_residual: Flag = False
    """Mix the first block's attention values into those of later blocks with a learned weight (Zhou et al. 2024)."""
    embedding_shortcut: Flag = False
    """Use a learned mix of the residual stream and the embedding as the input of every block."""
    parallel_residual: Flag = False
    """Compute the attention and feed-forward layers in parallel from the same input, and add both outputs (GPT-NeoX)."""
    dropout: ShareBelowOne = 0.0
    """Dropout probability for the embedding and for the output of each attention and feed-forward layer."""
    attention_dropout: OptionalShareBelowOne = None
    """Dropout probability for the attention weights. `null` means the value of `dropout`. Attention dropout doubles the attention
    time on a CPU."""
    attention_softcap: OptionalPositive = None
    """Soft cap for the attention scores before the softmax (Gemma 2). It slows down attention. `null` means no cap."""
    logit_softcap: OptionalPositive = None
    """Soft cap c for the logits, which become `c * tanh(logits / c)`. `null` means no cap."""
    init_embeddings: OptionalPath = None
    """Initialize the token embedding with these vectors: a folder from `tinylm embed train`, or a file in a supported format."""
    freeze_embeddings: Flag = False
    """Do not train the token embedding that `init_embeddings` loads."""
    init_from: Annotated[InitFrom | None, BeforeValidator(expand_init_from)] = None
    """The run whose weights are loaded: `init_from: RUN`, or `init_from: {run: RUN, head: off}`."""

    @property
    def uses_dropout(self) -> bool:
        return self.dropout > 0 or self.attention_dropout_p > 0 or (self.ngram_dropout > 0 and bool(self.ngram_embeddings))

    @property
    def pretrained(self) -> InitFrom | None:
        return self.init_from

    @property
    def pretrained_embeddings(self) -> str | None:
        return self.init_embeddings

    @property
    def attention_dropout_p(self) -> float:
        """The probability of attention dropout: `attention_dropout` if it is set, else `dropout`."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def feed_forward_width(self) -> int:
        return self.n_inner or max(8, 8 * round(self.feed_forward_multiple * self.n_embd / 8))

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layers multiply their values by a gate."""
        return self.feed_forward in ("swiglu", "geglu", "geglu_exact")

    def is_local(self, layer: int) -> bool:
        """Whether a block (counted from 0) is local according to attention_pattern."""
        return self.attention_pattern[layer % len(self.attention_pattern)] == "local"

    def window_of(self, layer: int) -> int | None:
        """Return the attention window of a block (counted from 0), or None if it attends to all earlier positions."""
        return self.attention_window if self.is_local(layer) else None

    def uses_rope(self, layer: int) -> bool:
        """Whether a block (counted from 0) rotates its queries and keys."""
        return self.position == "rope" and self.rope_pattern[layer % len(self.rope_pattern)] == "rope"

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.init_from is not None and self.init_embeddings is not None:
            yield "init_embeddings", "cannot be combined with init_from, which already loads an embedding"
        if self.head_dim is None and self.n_embd % self.n_head:
            nearest = min(divisors(self.n_embd), key=lambda heads: abs(heads - self.n_head))
            yield "n_head", f"the width n_embd {self.n_embd} is not divisible by {self.n_head} heads ({nearest} heads would work)"
        elif self.position == "rope" and self.head_width % 2:
            width = "n_embd / n_head" if self.head_dim is None else "head_dim"
            yield "n_head", f"rope needs an even head width, and {width} is {self.head_width}"
        if self.n_head % self.kv_heads:
            yield "n_kv_head", f"n_head {self.n_head} is not divisible by {self.kv_heads} key/value heads"
        if self.position == "sinusoidal" and self.n_embd % 2:
            yield "n_embd", f"sinusoidal positions need an even width, not {self.n_embd}"
        yield from self._rope_problems()
        if self.norm_position in ("output", "both") and self.parallel_residual:
            yield "parallel_residual", f"cannot be combined with norm_position: {self.norm_position}"
        if self.qk_norm_joint and not self.qk_norm:
            yield "qk_norm_joint", "needs qk_norm"
        if self.shifted_key_heads > self.kv_heads:
            yield "shifted_key_heads", f"must be at most {self.kv_heads}, the number of key/value heads"
        if self.attention_window is None and self.attention_pattern != ("local",):
            yield "attention_pattern", "needs attention_window"
        if self.freeze_embeddings and self.init_embeddings is None:
            yield "freeze_embeddings", "needs init_embeddings"
        elif self.freeze_embeddings and self.tie_embeddings:
            yield "freeze_embeddings", "cannot be combined with tie_embeddings, which also uses them as the head's weights"

    def _rope_problems(self) -> Iterator[tuple[str, str]]:
        if self.position != "rope":
            for key, field in type(self).model_fields.items():
                if key.startswith("rope_") and getattr(self, key) != field.default:
                    yield key, f"needs position: rope, not {self.position}"
        elif int(self.head_width // 2 * self.rope_fraction) == 0:
            yield "rope_fraction", f"rotates none of the {self.head_width} dimensions of a head"
        if self.rope_theta_local is not None and self.attention_window is None:
            yield "rope_theta_local", "needs attention_window"


class DecoderSection(TransformerSection):
    """A transformer decoder. `preset` sets the defaults of the other keys, each of which can also be set separately.

    With `init_from`, keys that are not set take that run's values, and its tokenizer is used unless another one is set.
    """

    presets = DECODER_PRESETS

    architecture: Literal["decoder"] = "decoder"
    preset: Literal["modern", "gpt2", "llama"] = "modern"
    """The preset that sets the defaults of the other keys."""
    head_bias: Flag = False
    """Use a learned bias in the head (Phi)."""
