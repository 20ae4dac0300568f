"""Evaluate a model's loss on the answers in conversations. Every answer token is scored once, including end-of-turn tokens.

Legend: `B` conversations in a batch, `T` input tokens in the longest conversation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tinylm.cost.memory import EVALUATION_BATCH_TOKENS
from tinylm.data.batch import IGNORE_INDEX
from tinylm.data.chat import EncodedConversations, Fitted, fit
from tinylm.data.framing import batches_by_length
from tinylm.errors import InputError
from tinylm.evaluation.metrics import BITS_PER_BYTE, LOSS, Metrics
from tinylm.evaluation.scoring import token_losses
from tinylm.model.base import Model, evaluation_mode
from tinylm.processes import SINGLE_PROCESS, Processes


@dataclass(frozen=True)
class AnswerScores:
    """The result of an evaluation: sums over all answer tokens."""

    conversations: int
    skipped: int
    """Number of conversations whose last answer does not fit into the context."""
    tokens: int
    """Number of scored tokens, including end-of-turn tokens."""
    bytes: int
    """Size of the answers in UTF-8."""
    nats: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)

    @property
    def metrics(self) -> Metrics:
        """The metrics that are logged during training."""
        return Metrics(LOSS.name, {LOSS.name: self.loss, BITS_PER_BYTE.name: self.bits_per_byte})


@torch.no_grad()
def evaluate(
    network: Model,
    conversations: EncodedConversations,
    token_byte_lengths: np.ndarray,
    *,
    max_tokens: int | None = None,
    processes: Processes = SINGLE_PROCESS,
    on_progress: Callable[[int], None] = lambda count: None,
) -> AnswerScores:
    """Score the answers in all conversations. With `max_tokens`, stop after the conversation that reaches this total.

    Conversations are truncated to the context length as in training. With several processes, each rank scores some of the
    batches, and all ranks return the same result. Raises `InputError` if no conversation has an answer that fits into the context.
    """
    context = network.model.context_length
    fitted: list[Fitted] = []
    skipped = count = 0
    for index in range(len(conversations)):
        if max_tokens is not None and count >= max_tokens and fitted:
            break
        item = fit(conversations[index], conversations.shard.end_of_text, context)
        count += 0 if item is None else len(item.ids)
        if item is None:
            skipped += 1
        else:
            fitted.append(item)
    if not fitted:
        raise InputError("no conversation has an answer that fits into the context", where="model.context_length")
    batches = batches_by_length([len(item.ids) for item in fitted], max(EVALUATION_BATCH_TOKENS, context))
    nats, done = np.zeros(len(batches)), 0
    with evaluation_mode(network):
        for first in range(0, len(batches), processes.world_size):
            # A sharded model needs all ranks in every forward pass, so ranks without their own batch repeat the last one.
            own = min(first + processes.rank, len(batches) - 1)
            batch_nats = _nats(network, [fitted[index] for index in batches[own]])
            if own == first + processes.rank:
                nats[own] = batch_nats
            done += sum(len(fitted[index].ids) for peer in batches[first : first + processes.world_size] for index in peer)
            on_progress(done)
    learned = np.concatenate([item.ids[item.learned] for item in fitted])
    total = float(processes.sum(nats).sum())
    return AnswerScores(len(fitted), skipped, len(learned), int(token_byte_lengths[learned].sum()), total)


def _nats(network: Model, members: Sequence[Fitted]) -> float:
    """Return the summed loss of the answers in a batch, in nats.

    Padding comes after each conversation, so causal attention keeps it from affecting the scored positions.
    """
    width = max(len(item.ids) for item in members) - 1
    inputs = np.zeros((len(members), width), dtype=np.int64)  # (B, T)
    targets = np.full((len(members), width), IGNORE_INDEX, dtype=np.int64)
    for row, item in enumerate(members):
        length = len(item.ids) - 1
        inputs[row, :length], targets[row, :length] = item.ids[:-1], item.targets(mask_prompt=True)
    logits = network(torch.from_numpy(inputs).to(network.device))
    return float(token_losses(logits, torch.from_numpy(targets).to(network.device)).double().sum())
