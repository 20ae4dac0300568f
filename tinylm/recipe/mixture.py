"""Mixtures: several sources in `data.train`, each with a weight, and the share of the training sequences that each one has."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Tag

from tinylm.recipe.base import Section
from tinylm.recipe.values import MixtureWeight, Sources


class MixedSource(Section):
    """One source of a mixture. A mixture is a list of these sections in `data.train`."""

    source: Sources
    """The text. A list of SOURCEs is concatenated."""
    weight: MixtureWeight = 1.0
    """The share of the training sequences that come from this source is its weight divided by the sum of all weights. With two
    numbers, `[first, last]`, the share changes linearly during training, from the share that the first numbers give to the share
    that the last numbers give."""

    @property
    def name(self) -> str:
        """The name of the source in messages and metrics."""
        return ", ".join(self.source)

    @property
    def weights(self) -> tuple[float, float]:
        """The weights at the beginning and at the end of training."""
        return self.weight if isinstance(self.weight, tuple) else (self.weight, self.weight)


def _choose(value: object) -> str:
    mixed = isinstance(value, (list, tuple)) and any(isinstance(item, (dict, MixedSource)) for item in value)
    return "mixture" if mixed else "sources"


def _expand_item(value: object) -> object:
    """Expand the short form `b.txt` in a mixture to `{source: b.txt}`."""
    return {"source": value} if isinstance(value, str) else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_ITEM = Annotated[MixedSource, BeforeValidator(_expand_item)]
TrainingSources = Annotated[
    Annotated[Sources, Tag("sources")] | Annotated[tuple[_ITEM, ...], BeforeValidator(_as_tuple), Tag("mixture")],
    Discriminator(_choose),
]
"""A SOURCE, a list of SOURCEs to concatenate, or a list of `MixedSource` sections."""


def mixture_of(train: Sequence[Any]) -> tuple[MixedSource, ...]:
    """Return the sources of a mixture, or an empty tuple if `data.train` is not a mixture."""
    return tuple(item for item in train if isinstance(item, MixedSource))


def flat_sources(train: Sequence[Any]) -> tuple[str, ...]:
    """Return all SOURCEs in `data.train`, in order."""
    return tuple(source for item in train for source in (item.source if isinstance(item, MixedSource) else (item,)))


def mixture_problems(train: Sequence[Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield each problem of a mixture as (key path inside `data.train`, message)."""
    mixture = mixture_of(train)
    first: dict[str, int] = {}
    for index, item in enumerate(mixture):
        for source in item.source:
            place = source if source == "-" or ":" in source else os.path.normpath(os.path.expanduser(source))
            if place in first:
                yield (index, "source"), f"{source} is also in data.train[{first[place]}] (list every source once)"
            else:
                first[place] = index
    for number, moment in enumerate(("beginning", "end")):
        if mixture and not any(item.weights[number] for item in mixture):
            yield (), f"all weights are 0 at the {moment} of training (at least one source must have a weight above 0)"


@dataclass(frozen=True)
class MixtureShares:
    """The share of the training examples that comes from each source. In between, each share changes linearly."""

    first: tuple[Fraction, ...]
    """The shares at the beginning of training. Their sum is 1."""
    last: tuple[Fraction, ...]
    """The shares at the end of training. Their sum is 1."""

    @classmethod
    def of(cls, mixture: Sequence[MixedSource]) -> MixtureShares:
        """Return the shares for the weights in a recipe, exactly as they are written there: 0.1 is one tenth."""
        return cls(*(_normalized([item.weights[moment] for item in mixture]) for moment in (0, 1)))

    @classmethod
    def constant(cls, weights: Sequence[float]) -> MixtureShares:
        """Return shares that do not change during training."""
        shares = _normalized(weights)
        return cls(shares, shares)

    @property
    def change(self) -> bool:
        """Whether the shares change during training."""
        return self.first != self.last

    @property
    def mean(self) -> tuple[Fraction, ...]:
        """The share of each source over the whole training run."""
        return tuple((first + last) / 2 for first, last in zip(self.first, self.last, strict=True))


def _normalized(weights: Sequence[float]) -> tuple[Fraction, ...]:
    exact = [Fraction(repr(weight)) for weight in weights]
    return tuple(weight / sum(exact) for weight in exact)


def describe_shares(mixture: Sequence[MixedSource]) -> list[str]:
    """Return the share of the training sequences of each source, for example `67% from a.txt`, or `67% to 33% from a.txt`."""
    shares = MixtureShares.of(mixture)
    described = []
    for item, first, last in zip(mixture, shares.first, shares.last, strict=True):
        amount = f"{float(first):.1%}" if first == last else f"{float(first):.1%} to {float(last):.1%}"
        described.append(f"{amount} of the sequences from {item.name}")
    return described


def describe_epochs(epochs: float) -> str:
    """Return how often a source is read, for example `which is read 7.3 times`."""
    if epochs > 1:
        return f"which is read {epochs:.1f} times"
    return f"of which {epochs:.0%} is read" if epochs < 1 else "which is read once"
