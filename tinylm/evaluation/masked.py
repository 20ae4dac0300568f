"""Evaluate a masked language model on a text: loss and accuracy at masked tokens, and pseudo-perplexity.

Documents are evaluated independently and split into rows that fit into the context. Every evaluation replaces the same 15% of the
ordinary tokens with [MASK]. For the pseudo-perplexity (Salazar et al. 2020), the tokens are masked one at a time.

Legend: `B` rows in a batch, `T` tokens in a row, `N` masked tokens, `C` width, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tinylm.cost.memory import EVALUATION_BATCH_LOGITS, EVALUATION_BATCH_TOKENS
from tinylm.data.batch import IGNORE_INDEX
from tinylm.data.framing import Framing, batches_by_length
from tinylm.data.masking import Masking
from tinylm.data.shards import Shard
from tinylm.errors import InputError
from tinylm.evaluation.intervals import bootstrap_ratio
from tinylm.evaluation.metrics import MASKED_ACCURACY, MASKED_LOSS, Metrics, perplexity_of
from tinylm.evaluation.scoring import token_losses
from tinylm.model.base import Model, evaluation_mode
from tinylm.processes import SINGLE_PROCESS, Processes
from tinylm.recipe.encoder import Replacement
from tinylm.tokenizer import Tokenizer

RATE = 0.15
"""The fraction of the tokens that an evaluation masks."""
SEED = 15
"""The seed for choosing the masked tokens. It is the same for all runs."""
_ALWAYS_MASK = Replacement(mask=1.0, random=0.0, keep=0.0)


@dataclass(frozen=True)
class MaskedScores:
    """Sums over all masked tokens, and 95% bootstrap intervals over documents or, if there are only a few, over rows."""

    documents: int
    tokens: int
    """Number of tokens in the text."""
    bytes: int
    masked: int
    """Number of masked tokens."""
    nats: float
    correct: int
    loss_ci95: tuple[float, float]
    accuracy_ci95: tuple[float, float]

    @property
    def loss(self) -> float:
        """Nats per masked token."""
        return self.nats / self.masked

    @property
    def accuracy(self) -> float:
        """The fraction of the masked tokens for which the most likely prediction is correct."""
        return self.correct / self.masked

    @property
    def metrics(self) -> Metrics:
        """The metrics as they are logged during training."""
        return Metrics(MASKED_LOSS.name, {MASKED_LOSS.name: self.loss, MASKED_ACCURACY.name: self.accuracy})


@dataclass(frozen=True)
class Row:
    """A range of tokens [start, end) in a shard. All tokens belong to one document."""

    start: int
    end: int
    document: int


@dataclass(frozen=True)
class _Item:
    """A framed row with masks and its targets, each (T,). `row` is the index of the `Row`."""

    inputs: np.ndarray
    targets: np.ndarray
    row: int


def evaluate(
    network: Model,
    shard: Shard,
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None = None,
    pseudo: bool = False,
    processes: Processes = SINGLE_PROCESS,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> MaskedScores:
    """Score a text in evaluation mode. The network's training mode is restored afterwards.

    With `max_tokens`, score only the first tokens of the text. With `pseudo`, mask the ordinary tokens one at a time instead of
    masking 15% of them together; `pseudo_perplexity` converts the result. With several `processes`, each rank scores a share of the
    batches, and all ranks return the same result. `on_progress` receives the number of tokens read so far. It is called the same
    number of times on every rank. Raises `InputError` if no token can be masked.
    """
    rows, sums = score_rows(
        network, shard, tokenizer, max_tokens=max_tokens, pseudo=pseudo, processes=processes, on_progress=on_progress
    )
    return _result(shard, tokenizer, rows, sums)


@torch.no_grad()
def score_rows(
    network: Model,
    shard: Shard,
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None = None,
    pseudo: bool = False,
    processes: Processes = SINGLE_PROCESS,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[list[Row], np.ndarray]:
    """Like `evaluate`, but return the rows, and for each row the loss in nats, the correct predictions and the masked tokens.

    The sums have the shape (3, rows).
    """
    framing = Framing.of(tokenizer, network.model)
    rows = list(split_rows(shard, framing.room, max_tokens))
    masking = Masking.of(tokenizer, _ALWAYS_MASK)
    items = list(_masked_in_turn(shard, rows, framing, masking) if pseudo else _masked_together(shard, rows, framing, masking))
    if not items:
        raise InputError("the text has no tokens that can be masked", hint="use a longer text")
    limit = min(EVALUATION_BATCH_TOKENS, max(1, int(EVALUATION_BATCH_LOGITS / tokenizer.vocab_size / RATE)))
    batches = batches_by_length([len(item.inputs) for item in items], limit)
    nats, correct, masked = np.zeros(len(rows)), np.zeros(len(rows)), np.zeros(len(rows))
    read = 0
    with evaluation_mode(network):
        for first in range(0, len(batches), processes.world_size):
            # A sharded model needs all ranks in every forward pass, so ranks without their own batch repeat the last one.
            own = min(first + processes.rank, len(batches) - 1)
            batch = [items[index] for index in batches[own]]
            losses, hits, owners = _score(network, framing, batch)
            if own == first + processes.rank:
                np.add.at(nats, owners, losses)
                np.add.at(correct, owners, hits)
                np.add.at(masked, owners, 1)
            read += sum(len(items[index].inputs) for peer in batches[first : first + processes.world_size] for index in peer)
            on_progress(read)
    return rows, np.stack((processes.sum(nats), processes.sum(correct), processes.sum(masked)))


def split_rows(shard: Shard, room: int, max_tokens: int | None = None) -> Iterator[Row]:
    """Split each document in a shard into rows of up to `room` tokens. Stop after `max_tokens` tokens in total."""
    remaining = max_tokens if max_tokens is not None else len(shard)
    for document, (start, end) in enumerate(shard.documents()):
        for begin in range(start, end, room):
            if remaining <= 0:
                return
            row = Row(begin, min(begin + room, end, begin + remaining), document)
            remaining -= row.end - row.start
            yield row


def _masked_together(shard: Shard, rows: Sequence[Row], framing: Framing, masking: Masking) -> Iterator[_Item]:
    """Mask 15% of the tokens in each row, and yield the rows with masked tokens."""
    for index, row in enumerate(rows):
        framed = framing.frame(shard.tokens[row.start : row.end])
        inputs, targets = masking.apply(framed[None], np.array([RATE]), SEED, np.array([index]))
        if (targets >= 0).any():
            yield _Item(inputs[0], targets[0], index)


def _masked_in_turn(shard: Shard, rows: Sequence[Row], framing: Framing, masking: Masking) -> Iterator[_Item]:
    """Yield one item for each ordinary token in each row, with only that token masked."""
    for index, row in enumerate(rows):
        framed = framing.frame(shard.tokens[row.start : row.end])
        for position in np.flatnonzero(masking.ordinary[framed]):
            inputs, targets = framed.copy(), np.full(len(framed), IGNORE_INDEX, dtype=np.int64)
            inputs[position], targets[position] = masking.mask, framed[position]
            yield _Item(inputs, targets, index)


def _score(network: Model, framing: Framing, batch: Sequence[_Item]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each masked token, its loss, whether the top prediction is correct, and its row index: three arrays (N,)."""
    tokens, segments = framing.rows([item.inputs for item in batch])
    targets, _ = framing.rows([item.targets for item in batch])
    targets = np.where(segments < 0, IGNORE_INDEX, targets)
    rows, columns = np.nonzero(targets >= 0)
    device = network.device
    hidden = network.hidden(torch.from_numpy(tokens).to(device), segments=torch.from_numpy(segments).to(device))  # (B, T, C)
    logits = network.logits(hidden[torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)])  # (N, V)
    ids = torch.from_numpy(targets[rows, columns]).to(device)  # (N,)
    losses = token_losses(logits, ids).cpu().double().numpy()
    hits = (logits.argmax(dim=-1) == ids).cpu().numpy()
    return losses, hits, np.array([item.row for item in batch])[rows]


def _result(shard: Shard, tokenizer: Tokenizer, rows: Sequence[Row], sums: np.ndarray) -> MaskedScores:
    """Summarize `sums` (3, rows): the loss in nats, the correct predictions and the masked tokens in each row."""
    pieces = sums_of_pieces(rows, sums)
    lengths = tokenizer.token_byte_lengths
    return MaskedScores(
        documents=rows[-1].document + 1,
        tokens=sum(row.end - row.start for row in rows),
        bytes=int(sum(lengths[shard.tokens[row.start : row.end]].sum() for row in rows)),
        masked=int(sums[2].sum()),
        nats=float(sums[0].sum()),
        correct=int(sums[1].sum()),
        loss_ci95=bootstrap_ratio(pieces[0], pieces[2]),
        accuracy_ci95=bootstrap_ratio(pieces[1], pieces[2]),
    )


def sums_of_pieces(rows: Sequence[Row], sums: np.ndarray) -> np.ndarray:
    """Add up `sums` (n, rows) over the rows of each document, or return them unchanged if there are fewer than 50 documents."""
    documents = np.array([row.document for row in rows])
    count = int(documents.max()) + 1
    return sums if count < 50 else np.stack([np.bincount(documents, weights=values, minlength=count) for values in sums])


def pseudo_perplexity(scores: MaskedScores) -> tuple[float, tuple[float, float]]:
    """Return the pseudo-perplexity and its interval. `scores` must come from `evaluate` with `pseudo`."""
    low, high = scores.loss_ci95
    return perplexity_of(scores.loss), (math.nan if math.isnan(low) else perplexity_of(low), perplexity_of(high))
