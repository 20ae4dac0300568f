"""Convert logits to log-probabilities in nats. Evaluation, generation, training and exports use these functions.

Everything is computed in float32, or in the dtype of the logits if it is wider.

Legend: `...` any leading dimensions, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.data.batch import IGNORE_INDEX


def all_logprobs(logits: Tensor) -> Tensor:
    """Return the log-probability of every token in the vocabulary, `(..., V)`, for logits `(..., V)`."""
    return _widened(logits).log_softmax(dim=-1)


def mean_logprobs(logits: Sequence[Tensor]) -> Tensor:
    """Return the logarithm of the mean probability of every token, `(..., V)`, for the logits `(..., V)` of several models.

    This is the distribution of an ensemble. Probabilities are averaged, not logits: logsumexp of the log-probabilities, minus
    log n for n models.
    """
    total = all_logprobs(logits[0])
    for other in logits[1:]:
        total = torch.logaddexp(total, all_logprobs(other))
    return total - math.log(len(logits)) if len(logits) > 1 else total


def mean_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Return the mean probability of every token, `(..., V)`, for the logits `(..., V)` of several models.

    This is faster than `mean_logprobs`, but very small probabilities are rounded to 0.
    """
    total = _widened(logits[0]).softmax(dim=-1)
    for other in logits[1:]:
        total += _widened(other).softmax(dim=-1)
    return total.div_(len(logits)) if len(logits) > 1 else total


def ensemble_losses(losses: Sequence[np.ndarray]) -> np.ndarray:
    """Return the loss of an ensemble for each token, given the losses of its members in nats, one array of equal shape per member.

    It is the negative logarithm of the mean of exp(-loss). NaN stays NaN.
    """
    with np.errstate(invalid="ignore"):  # NaN
        combined: np.ndarray = math.log(len(losses)) - np.logaddexp.reduce([-nats for nats in losses])
    return combined


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
