"""Mix several datasets: each one supplies a given share of the examples, spread evenly over the data order.

The shares can change linearly during training. All arithmetic is exact, so the order is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm

import numpy as np

from tinylm.cost.plan import training_steps
from tinylm.data import datasets
from tinylm.data.batch import IGNORE_INDEX
from tinylm.data.datasets import Dataset, Examples
from tinylm.data.framing import PADDING
from tinylm.data.prepare import PreparedText
from tinylm.errors import InputError
from tinylm.recipe import Recipe
from tinylm.recipe.mixture import MixtureShares
from tinylm.recipe.schema import ModelVariant, require_text


class Order:
    """Assigns each position in a mixture's data order to one of the datasets.

    The number of examples that dataset k should have supplied by time t is the integral of its share up to t, and N_k(t) is this
    number, rounded. Between the times t and t + 1, the datasets whose N_k increases supply one example each, in their order. The
    sum of N_k(t) over K datasets differs from t by at most K / 2, so the times that belong to a position are found directly, and
    before each position, the number of examples of a dataset differs from the exact number by at most (K + 3) / 2.
    """

    def __init__(self, shares: MixtureShares, total: int | None) -> None:
        """`total` is the number of examples in the training run, after which the shares remain constant.

        It is required if the shares change.
        """
        assert total is not None or not shares.change
        self._total = total if shares.change else None
        self._unit = lcm(*(share.denominator for share in (*shares.first, *shares.last)))
        self._first, self._last = ([int(share * self._unit) for share in moment] for moment in (shares.first, shares.last))

    def __len__(self) -> int:
        """Return the number of datasets."""
        return len(self._first)

    def _due(self, time: int) -> list[int]:
        """Return N_k for each dataset."""
        if self._total is None:
            return [(2 * first * time + self._unit) // (2 * self._unit) for first in self._first]
        inside, after = min(time, self._total), max(time - self._total, 0)
        scale = 2 * self._total * self._unit
        due = []
        for first, last in zip(self._first, self._last, strict=True):
            exact = 2 * self._total * (first * inside + last * after) + (last - first) * inside * inside
            due.append((2 * exact + scale) // (2 * scale))
        return due

    def counts(self, position: int) -> list[int]:
        """Return the number of examples that each dataset supplies before a position."""
        time = self._time(position)
        counts, following = self._due(time), self._due(time + 1)
        for number in range(len(self)):
            if sum(counts) < position:
                counts[number] = following[number]
        return counts

    def _time(self, position: int) -> int:
        """Return the last time at which no more than `position` examples are due."""
        time = max(0, position - len(self))
        while sum(self._due(time + 1)) <= position:
            time += 1
        return time

    def datasets(self, start: int, count: int) -> np.ndarray:
        """Return the number of the dataset that supplies each of the examples [start, start + count)."""
        time = self._time(start)
        due, chosen = self._due(time), list[int]()
        skipped = start - sum(due)
        while len(chosen) < skipped + count:
            time += 1
            following = self._due(time)
            chosen += [number for number in range(len(self)) if following[number] > due[number]]
            due = following
        return np.array(chosen[skipped : skipped + count])


class Mixture:
    """The examples of several datasets in one data order.

    Each dataset keeps its own order and starts its next epoch when all of its examples have been read. Examples of different
    lengths are padded. Where only some datasets have `targets` and `segments`, they are added: every token in an example of the
    others is a target, and the example is one segment.
    """

    def __init__(self, datasets: Sequence[Dataset], shares: MixtureShares, examples_per_epoch: int) -> None:
        """`examples_per_epoch` is the number of examples that count as one epoch of the mixture."""
        self._datasets = tuple(datasets)
        self.shares = shares
        self.examples_per_epoch = examples_per_epoch
        tokens = [share * dataset.tokens_per_example for share, dataset in zip(shares.mean, self._datasets, strict=True)]
        self.tokens_per_example = float(sum(tokens))
        self._order = None if shares.change else Order(shares, None)
        self._arrays = list(dict.fromkeys(name for dataset in self._datasets for name in dataset.examples(0, 1)))

    def set_total(self, examples: int | None) -> None:
        """Set the number of examples in the training run. This is required before reading examples if the shares change."""
        self._order = Order(self.shares, examples)

    @property
    def order(self) -> Order:
        if self._order is None:
            raise ValueError("the shares change during training, so `set_total` must be called first")
        return self._order

    def epochs(self, position: int) -> list[float]:
        """Return how many times each dataset has been read before a position."""
        counts = self.order.counts(position)
        return [count / dataset.examples_per_epoch for count, dataset in zip(counts, self._datasets, strict=True)]

    def examples(self, start: int, count: int) -> Examples:
        """Return the examples at positions [start, start + count)."""
        chosen, first = self.order.datasets(start, count), self.order.counts(start)
        parts = []
        for number, dataset in enumerate(self._datasets):
            rows = np.flatnonzero(chosen == number)
            if len(rows):
                parts.append((rows, dataset.examples(first[number], len(rows))))
        parts = [(rows, _with_arrays(examples, self._arrays)) for rows, examples in parts]
        mixed = {}
        for name in self._arrays:
            length = max(examples[name].shape[1] for _, examples in parts)
            mixed[name] = np.full((count, length), _FILLER.get(name, PADDING), dtype=np.int64)
            for rows, examples in parts:
                mixed[name][rows, : examples[name].shape[1]] = examples[name]
        return mixed


_FILLER = {"targets": IGNORE_INDEX}


def _with_arrays(examples: Examples, names: Sequence[str]) -> Examples:
    """Add the arrays in `names` that the examples lack."""
    tokens = examples["tokens"]
    default = {"targets": tokens[:, 1:], "segments": np.zeros_like(tokens)}
    return {name: examples[name] if name in examples else default[name] for name in names}


def build(recipe: Recipe, prepared: PreparedText, model: ModelVariant) -> Dataset:
    """Build the dataset of windows for a text or, with several sources, for a mixture of texts.

    An epoch of a mixture has as many windows as an epoch of all its sources together. Raises `InputError` if a text is shorter than
    one window.
    """
    data = require_text(recipe.data)
    spans = prepared.spans.get("train", ())
    if not spans:
        return datasets.build(data, prepared.train, model, recipe.seed)
    streams = []
    for item, span in zip(data.mixture, spans, strict=True):
        try:
            streams.append(datasets.build(data, span.of(prepared.train), model, recipe.seed))
        except InputError as error:
            raise InputError(f"{item.name}: {error.message}", where=error.where, hint=error.hint) from None
    return Mixture(streams, MixtureShares.of(data.mixture), sum(stream.examples_per_epoch for stream in streams))


def planned_examples(recipe: Recipe, dataset: Dataset) -> int | None:
    """Return the number of examples in the training run, or None if its length is limited by time."""
    steps = training_steps(recipe.training, dataset.tokens_per_example, dataset.examples_per_epoch)
    return None if steps is None else steps * recipe.training.global_batch_size
