"""`SequenceToSequence`: the interface through which training, evaluation and `tinylm translate` use a network for translation.

Legend: `B` batch, `S` source time, `T` target time, `C` width, `N` targets, `R` rows, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tinylm.cost.memory import loss_chunk_rows
from tinylm.errors import InputError
from tinylm.model.base import Model
from tinylm.model.functions import select_targets
from tinylm.recipe.schema import ModelVariant

START = -1
"""The id at the position before the first target token. It has no row in the embedding."""
ROW_MULTIPLE = 16
"""If the number of rows is a multiple of this, a matrix product computes each row in the same way for any number of rows."""


class TargetState(Protocol):
    """The state of partial translations, one per row.

    Every sentence has the same number of rows, which is 1 at first. The rows of the first sentence come first. Rows of padding can
    follow the last one.
    """

    def keep_sources(self, sources: Sequence[int]) -> None:
        """Keep only the source sentences at these indices, in this order. Call `select_rows` next."""

    def select_rows(self, rows: Tensor, rows_per_source: int) -> None:
        """Replace the rows with copies of the rows at these indices (R,). A row's copies belong to the same sentence."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append ids (R,), one per row. Return the logits (R, V) of the next token."""


class SequenceToSequence(Model):
    """A `Model` that predicts a target sequence from a source sequence."""

    def __init__(self, model: ModelVariant, vocab_size: int, *, seed: int | None = 0, source_vocab_size: int | None = None) -> None:
        """`seed`: see `Model`. `source_vocab_size` defaults to `vocab_size`, which is the size of the target vocabulary."""
        super().__init__(model, vocab_size, seed=seed)

    def hidden(
        self,
        tokens: Tensor,
        *,
        n_last: int | None = None,
        segments: Tensor | None = None,
        source: Tensor | None = None,
        source_segments: Tensor | None = None,
    ) -> Tensor:
        """Target ids (B, T) that begin with `START` -> final hidden states (B, T, C), the input of `logits`.

        `source` (B, S) is required. `source_segments` (B, S) is negative at the padding, which follows the sentence. Raises
        `InputError` if `source` is None.
        """
        raise NotImplementedError

    def target_state(self, sources: Sequence[Tensor], length: int) -> TargetState:
        """Encode source sentences, each of ids (S,). Return a state with one row per sentence, without tokens.

        The sentences are padded to `length` before or after they are encoded. A sentence's encoding does not depend on the others.
        """
        raise NotImplementedError

    def attention_weights(self, source: Tensor, tokens: Tensor) -> Tensor:
        """Source ids (S,) and target ids (T,) that begin with `START` -> the decoder's attention weights (heads, T, S).

        Raises `InputError` if the model has no attention.
        """
        raise InputError(f"a model with the {self.architecture} architecture has no attention to the source text")

    def forward(  # type: ignore[override]  # only models that predict the next token have teachers
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        segments: Tensor | None = None,
        source: Tensor | None = None,
        source_segments: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Target ids (B, T) -> logits (B, T, V), or, with `targets` (B, T), the summed loss in nats (a scalar).

        With targets, the head runs only at positions whose target is not negative. `label_smoothing`: the fraction of the
        target probability that is spread uniformly over the vocabulary.
        """
        if targets is not None:
            tokens, targets, segments, source, source_segments = _rows_with_targets(
                tokens, targets, segments, source, source_segments
            )
        hidden = self.hidden(tokens, segments=segments, source=source, source_segments=source_segments)
        if targets is None:
            return self.logits(hidden)
        hidden, ids = select_targets(hidden, targets)  # (N, C), (N,)
        rows = loss_chunk_rows(self.vocab_size, on_gpu=hidden.device.type != "cpu")
        if len(ids) <= rows:
            return self._loss(hidden, ids, label_smoothing)
        chunks = zip(torch.split(hidden, rows), torch.split(ids, rows), strict=True)
        losses = [checkpoint(self._loss, part, part_ids, label_smoothing, use_reentrant=False) for part, part_ids in chunks]
        return torch.stack(losses).sum()

    def _loss(self, hidden: Tensor, ids: Tensor, label_smoothing: float) -> Tensor:
        logits = self.logits(hidden).float()
        return F.cross_entropy(logits, ids, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing)

    def _required(self, source: Tensor | None) -> Tensor:
        """Return `source`. Raises `InputError` if it is None."""
        if source is None:
            problem = f"a model with the {self.architecture} architecture needs a source text"
            raise InputError(problem, hint="use `tinylm translate`")
        return source


def _rows_with_targets(
    tokens: Tensor, targets: Tensor, segments: Tensor | None, source: Tensor | None, source_segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Drop the rows without targets. If there are none with targets, return the first row with its padding unmasked, because
    attention to an empty source is undefined."""
    used = (targets >= 0).any(dim=1)
    if bool(used.all()):
        return tokens, targets, segments, source, source_segments
    rows = used.nonzero().squeeze(1)
    if not len(rows):
        first = slice(0, 1)
        return tokens[first], targets[first], None, None if source is None else source[first], None
    segments, source, source_segments = (None if each is None else each[rows] for each in (segments, source, source_segments))
    return tokens[rows], targets[rows], segments, source, source_segments
