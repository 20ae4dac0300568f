"""Compute the loss of a translation model on sentence pairs, without label smoothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tinylm.data.batch import IGNORE_INDEX, Batch
from tinylm.data.bucketed_pairs import PADDING, padded
from tinylm.data.framing import batches_by_length
from tinylm.evaluation.scoring import token_losses
from tinylm.model.base import Model, evaluation_mode
from tinylm.model.sequence_to_sequence import START

_BATCH_TOKENS = 4096


def pair_batch(sources: np.ndarray, targets: np.ndarray) -> Batch:
    """Make a batch of pairs. `sources` and `targets` contain ids with special tokens and `PADDING`, (pairs, length).

    The decoder's input is the target shifted by one position. `segments` marks the padding only for counting tokens. The decoder
    does not need a mask, because the padding follows all targets.
    """
    source, target = torch.from_numpy(sources), torch.from_numpy(targets)
    inputs = torch.cat((torch.full((len(target), 1), START), target[:, :-1].clamp_min(0)), dim=1)
    return Batch(
        inputs=inputs,
        targets=target.masked_fill(target == PADDING, IGNORE_INDEX),
        segments=torch.where(target == PADDING, PADDING, 0),
        source=source.clamp_min(0),
        source_segments=torch.where(source == PADDING, PADDING, 0),
    )


def pair_losses(network: torch.nn.Module, batch: Batch) -> Tensor:
    """Return the loss of each target token in nats, (pairs, time). It is zero where the target is padding."""
    logits = network(batch.inputs, source=batch.source, source_segments=batch.source_segments)
    return token_losses(logits, batch.targets)


@torch.no_grad()
def losses_of_pairs(
    network: Model,
    sources: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """Return the summed loss of each pair in nats, (pairs,). The ids include special tokens. Sources and targets longer than the
    context are truncated.

    `on_progress` is called after every batch with the number of target tokens so far.
    """
    limit = network.model.context_length
    sources, targets = [ids[:limit] for ids in sources], [ids[:limit] for ids in targets]
    nats, tokens = np.zeros(len(sources)), 0
    with evaluation_mode(network):
        for indexes in batches_by_length([len(s) + len(t) for s, t in zip(sources, targets, strict=True)], _BATCH_TOKENS):
            batch = pair_batch(padded([sources[i] for i in indexes]), padded([targets[i] for i in indexes])).to(network.device)
            nats[indexes] = pair_losses(network, batch).double().sum(dim=1).cpu().numpy()
            tokens += batch.target_count
            on_progress(tokens)
    return nats
