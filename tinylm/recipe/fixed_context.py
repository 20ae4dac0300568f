"""The `model:` sections of models that predict from a fixed number of tokens: feed_forward and ngram."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from tinylm.recipe.base import ModelVariant
from tinylm.recipe.values import ContextLength, Flag, ShareBelowOne, SmallCount, Thresholds, Width


class FeedForwardSection(ModelVariant):
    """A network that predicts each token from a fixed number of preceding tokens (Bengio et al. 2003).

    Predictions never depend on earlier documents.
    """

    reads_across_documents = False

    architecture: Literal["feed_forward"] = "feed_forward"
    window: SmallCount = 12
    """Number of tokens that a prediction depends on."""
    n_embd: Width = 32
    """Width of the token embedding with `input: embedding`."""
    n_hidden: Width = 256
    """Number of hidden units."""
    input: Literal["embedding", "one_hot", "number"] = "embedding"
    """How a token is represented: by a learned embedding, a one-hot vector, or its id scaled to a number between -1 and 1."""
    direct: Flag = False
    """Also connect the input directly to the output."""
    dropout: ShareBelowOne = 0.0
    """Dropout probability for the hidden units."""
    context_length: ContextLength = 128
    """Number of predicted tokens in a training sequence. Each is predicted from the `window` tokens before it."""

    @property
    def uses_dropout(self) -> bool:
        return self.dropout > 0

    @property
    def warmup_tokens(self) -> int:
        return self.window - 1

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.window > self.context_length:
            yield "window", f"must be at most context_length {self.context_length}, not {self.window}"
        if self.direct and self.input == "one_hot":
            yield "direct", "cannot be combined with input: one_hot, because there would be window * vocab_size^2 direct weights"
        default = type(self).model_fields["n_embd"].default
        if self.input != "embedding" and self.n_embd != default:
            yield "n_embd", f"needs input: embedding, not {self.input}"


class NgramSection(ModelVariant):
    """An n-gram model with interpolated modified Kneser-Ney smoothing (Chen & Goodman 1999). No n-gram crosses a document boundary.

    Training counts the n-grams in the training text once, from the beginning, so it cannot be longer than one epoch. A step counts
    `global_batch_size` chunks of `context_length` tokens.
    """

    training_keys = ("steps", "tokens", "epochs", "minutes", "global_batch_size", "log_every")
    learns_by_counting = True
    reads_across_documents = False
    needs_full_window = False

    architecture: Literal["ngram"] = "ngram"
    order: SmallCount = 5
    """The maximum length of an n-gram, including the token that it predicts."""
    prune: Thresholds = (0,)
    """Thresholds by order: n-grams with at most this many occurrences are removed. The last threshold also applies to longer
    n-grams. For example, `[0, 0, 1]` removes all 3-grams and longer n-grams that occur once. The first threshold must be 0."""
    context_length: ContextLength = 4096
    """Number of tokens in a chunk of the training text. It does not change the model."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.prune[0] != 0:
            yield "prune", "must begin with 0, because 1-grams are never removed"
        elif any(later < earlier for earlier, later in pairwise(self.prune)):
            yield "prune", "the numbers must not decrease"
        elif len(self.prune) > max(self.order, 1):
            yield "prune", f"has more thresholds than the order {self.order}"
