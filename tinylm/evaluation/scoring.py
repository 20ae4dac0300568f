"""Convert logits to log-probabilities in nats. Evaluation, generation, training and exports use these functions.

Everything is computed in float32, or in the dtype of the logits if it is wider.

Legend: `...` any leading dimensions, `V` vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tinylm.data.batch import IGNORE_INDEX


def all_logprobs(logits: Tensor) -> Tensor:
    """Return the log-probability of every token in the vocabulary, `(..., V)`, for logits `(..., V)`."""
    return _widened(logits).log_softmax(dim=-1)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy loss of each target, `(...)`, for logits `(..., V)` and targets `(...)`; 0 for negative targets."""
    ids = targets.long()
    losses = F.cross_entropy(
        _widened(logits).flatten(0, -2),
        ids.masked_fill(ids < 0, IGNORE_INDEX).flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return losses.view(targets.shape)


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probability of each id, `(...)`, for logits `(..., V)` and ids `(...)`; 0 for negative ids."""
    return -token_losses(logits, ids)


def top_logprobs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ids and log-probabilities of the `count` most likely tokens, each `(..., count)`, most likely first.

    Returns fewer tokens if the vocabulary is smaller.
    """
    top = all_logprobs(logits).topk(min(count, logits.shape[-1]), dim=-1)
    return top.indices, top.values


def _widened(logits: Tensor) -> Tensor:
    return logits.float() if logits.itemsize < 4 else logits
