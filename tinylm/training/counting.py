"""Training by counting: each step counts the n-grams in the next part of the text. There are no gradients.

Checkpoints store the counts in place of an optimizer state, so that a resumed run continues counting. Every process counts the
whole text, because merging the counts from several processes would take about as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from time import perf_counter
from typing import cast

import numpy as np
import torch
from torch import Tensor

from tinylm.data.datasets import ConsecutiveParts
from tinylm.data.kneser_ney import NgramCounts, count_part, smooth
from tinylm.data.order import fingerprint
from tinylm.errors import InputError
from tinylm.model.ngram_model import Ngram
from tinylm.training.feed import Feed
from tinylm.training.pending import PendingStep, StepResult
from tinylm.training.trainer import Hooks, Trainer, TrainingSetup

_PREFIX = "counts/"


class CountState:
    """The counts so far. It has the same methods as `Optimizers` for saving and restoring."""

    def __init__(self, vocab_size: int, order: int) -> None:
        self._vocab_size, self._order = vocab_size, order
        self.counts: NgramCounts | None = None
        """None before the first step."""

    def add(self, part: NgramCounts) -> None:
        """Add the counts of another part of the text."""
        self.counts = part if self.counts is None else self.counts.merged(part)

    def state(self) -> dict[str, Tensor]:
        """Return the counts as tensors. Each tensor is the concatenation of the arrays for all orders."""
        assert self.counts is not None
        arrays = {
            "keys": np.concatenate((np.zeros(0, dtype=np.int64), *self.counts.keys)),
            "counts": np.concatenate(self.counts.counts),
            "sizes": np.array([len(counts) for counts in self.counts.counts]),
        }
        return {_PREFIX + name: torch.from_numpy(array) for name, array in arrays.items() if len(array)}

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Do nothing, because the model has no weights to average."""
        return nullcontext()

    def empty_state(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Allocate tensors to load saved counts into."""
        return {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace the counts. Raises `ValueError` if they do not match the vocabulary and the order."""
        arrays = {name.removeprefix(_PREFIX): tensor.numpy() for name, tensor in state.items()}
        sizes, keys = arrays["sizes"].tolist(), arrays.get("keys", np.zeros(0, dtype=np.int64))
        if len(sizes) != self._order or sizes[0] != self._vocab_size or sum(sizes) != len(arrays["counts"]):
            raise ValueError("the counts do not match the order and the vocabulary")
        ends = np.cumsum(sizes)
        counts = tuple(arrays["counts"][end - size : end] for size, end in zip(sizes, ends, strict=True))
        key_ends = ends[1:] - sizes[0]
        self.counts = NgramCounts(
            self._vocab_size, tuple(keys[end - size : end] for size, end in zip(sizes[1:], key_ends, strict=True)), counts
        )


class CountingTrainer(Trainer):
    """A `Trainer` for n-gram models. `setup.optimizers` must be a `CountState`."""

    def __init__(self, setup: TrainingSetup, hooks: Hooks) -> None:
        """Raises `InputError` if the recipe sets more steps than it takes to count the text once."""
        super().__init__(setup, hooks)
        assert isinstance(setup.dataset, ConsecutiveParts)
        self._parts = setup.dataset
        self._ngrams = cast(Ngram, setup.parallel.network)
        self._state = cast(CountState, setup.optimizers)
        self._last_span = (0, 0)
        batch = setup.recipe.training.global_batch_size
        available = -(-self._parts.examples_per_epoch // batch)
        if setup.steps is not None and setup.steps > available:
            raise InputError(
                f"counting the whole text takes {available} steps, but the recipe sets {setup.steps}",
                where="training",
                hint="use epochs: 1 to count the whole text once",
            )

    def train_step(self, feed: Feed) -> None:
        """Count the n-grams in the next part of the text."""
        start, progress, batch = perf_counter(), self.progress, self.setup.recipe.training.global_batch_size
        first, last = self._last_span = self._parts.span(progress.cursor, batch)
        hashed = fingerprint(self._parts.examples(progress.cursor, batch)["tokens"])
        self._state.add(count_part(self._parts.shard, first, last, self._ngrams.vocab_size, self._ngrams.model.order))
        progress.step += 1
        progress.cursor += batch
        progress.tokens += last - first
        results = torch.tensor([0.0, 0.0, 1.0])  # the loss is computed when the step is logged
        self._pending_steps.append(PendingStep.start(progress.step, progress.cursor, hashed, results))
        progress.train_seconds += perf_counter() - start

    def _log(self, result: StepResult) -> None:
        """Smooth the counts for evaluations and checkpoints, and log the loss on the text that was counted last."""
        start = perf_counter()
        assert self._state.counts is not None
        self._ngrams.set_tables(smooth(self._state.counts, self._parts.shard.end_of_text, self._ngrams.model.prune))
        loss = self._loss(*self._last_span)
        self.progress.train_loss = loss
        self.progress.train_seconds += perf_counter() - start
        super()._log(replace(result, loss=loss))

    def _loss(self, first: int, last: int) -> float:
        """Return the mean loss in nats over the tokens [first, last) of the text."""
        context = self._ngrams.model.order - 1
        tokens = np.asarray(self._parts.shard.tokens[max(0, first - context) : last], dtype=np.int64)
        preceding = np.minimum(np.arange(len(tokens)), context)
        scored = max(first, 1) - max(0, first - context)
        return float(-np.log(self._ngrams.tables.token_probabilities(tokens, preceding)[scored:]).mean())

    def _learning_rate(self) -> float:
        return 0.0

    def _completed_fraction(self) -> float:
        """With `training.minutes`, the run also ends once the whole text has been counted."""
        fraction = super()._completed_fraction()
        return max(fraction, self.progress.cursor / self._parts.examples_per_epoch) if self.setup.steps is None else fraction
