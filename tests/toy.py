"""An architecture and an objective outside the library, for tests that extend the recipe schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from tinylm.recipe import ModelVariant, ObjectiveVariant
from tinylm.recipe.values import Count, ShareBelowOne


class ToySection(ModelVariant):
    """A model with a few states."""

    objectives = ("toy_lm", "causal_lm")

    architecture: Literal["toy"] = "toy"
    context_length: Count = 16
    """Number of tokens in a training sequence."""
    n_states: Count = 4
    """Number of states in the toy model."""
    forgetting: ShareBelowOne = 0.0
    """The share of states that the toy model forgets in each step."""

    @property
    def uses_dropout(self) -> bool:
        return self.forgetting > 0

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.n_states > self.context_length:
            yield "n_states", f"{self.n_states} states exceed the context_length {self.context_length}"


class ToyObjective(ObjectiveVariant):
    """Predict some tokens from others."""

    name: Literal["toy_lm"] = "toy_lm"
    share: ShareBelowOne = 0.15
    """The share of tokens that the toy objective predicts."""
