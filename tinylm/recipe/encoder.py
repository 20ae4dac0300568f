"""The encoder: its `model:` section, and the `masked_lm` objective."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import model_validator

from tinylm.recipe.base import ObjectiveVariant, Section
from tinylm.recipe.presets import ENCODER_PRESETS
from tinylm.recipe.transformer import TransformerSection
from tinylm.recipe.values import CountOrZero, Flag, MaskRates, Share

CONTROL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
"""The control tokens that are added to a tokenizer learned for an encoder."""
MASK = "[MASK]"
"""The text that marks a token to predict in a prompt. It does not depend on the tokenizer."""
_SHORTEST_CONTEXT = 3


class EncoderSection(TransformerSection):
    """A transformer encoder, in which every position attends to all positions. The `bert` preset matches BertModel.

    Each text is wrapped in [CLS] and [SEP], which are added as control tokens to a learned tokenizer. `attention_window` is
    the number of positions on each side, including the position itself.
    """

    presets = ENCODER_PRESETS
    objectives = ("masked_lm", "classification")
    bidirectional = True

    architecture: Literal["encoder"] = "encoder"
    preset: Literal["modern", "bert"] = "modern"
    """The preset that sets the defaults of the other keys."""
    norm_first_block: Flag = True
    """Normalize the input of the first block's attention. ModernBERT sets this to false, because its embedding is already
    normalized."""
    token_types: CountOrZero
    """Number of token type embeddings (BERT's segments), one of which is added to each token embedding. Text has type 0."""
    head_transform: Flag
    """Apply a linear layer, an activation and a norm before the head, as in BERT. The activation is `feed_forward` if that is
    `gelu` or `relu`, and `gelu_exact` otherwise."""
    head_bias: Flag
    """Use a learned bias in the head."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if not self.norm_first_block and self.norm_position not in ("pre", "both"):
            yield "norm_first_block", f"needs norm_position pre or both, not {self.norm_position}"
        if self.context_length < _SHORTEST_CONTEXT:
            yield "context_length", f"must be at least {_SHORTEST_CONTEXT}: [CLS], one token and [SEP]"


class Replacement(Section):
    """What replaces a masked token. The fractions must add up to 1."""

    mask: Share = 0.8
    """The fraction that becomes [MASK]."""
    random: Share = 0.1
    """The fraction that becomes a random token."""
    keep: Share = 0.1
    """The fraction that stays unchanged."""

    @model_validator(mode="after")
    def _check_sum(self) -> Replacement:
        if abs(self.mask + self.random + self.keep - 1) > 1e-6:
            raise ValueError(f"mask, random and keep must add up to 1, not {self.mask + self.random + self.keep:g}")
        return self


class MaskedLMObjective(ObjectiveVariant):
    """Predict masked tokens from the tokens on both sides (Devlin et al. 2019).

    Which tokens are masked depends only on the seed and the position in the data order. Control tokens are never masked. Every
    evaluation masks the same 15% of the held-out tokens.
    """

    name: Literal["masked_lm"] = "masked_lm"
    rate: MaskRates = (0.15,)
    """The fraction of tokens to predict. With two values, it changes linearly from the first to the second during training."""
    replace: Replacement = Replacement()
    """What replaces a token to predict."""
