"""Check a resumed run against the training length and learning rate schedule in its current recipe."""

from __future__ import annotations

from tinylm.errors import InputError
from tinylm.optim.schedules import lr_multiplier
from tinylm.recipe import Recipe
from tinylm.recipe.schema import LENGTHS
from tinylm.run import Run

_NOTABLE_LR_CHANGE = 1.1
"""Report a change in the learning rate if it is larger than this factor."""


def check_remaining(run: Run, recipe: Recipe, steps: int | None, done_steps: int, done_seconds: float) -> None:
    """Raise `InputError` if the run has already trained for longer than the recipe specifies.

    `steps` is the number of steps in the recipe, or None if the recipe sets `training.minutes`.
    """
    if steps is not None:
        if done_steps <= steps:
            return
        done, wanted = f"{done_steps:,} steps", f"{steps:,} steps"
    else:
        minutes = recipe.training.minutes or 0.0
        if _length(recipe) == _length(run.recipe) or done_seconds <= 60 * minutes:
            return
        done, wanted = f"{done_seconds / 60:.3g} minutes", f"{minutes:g} minutes"
    raise InputError(
        f"the run has already trained for {done}, which is more than the {wanted} in training.{_length(recipe)[0]}",
        where=str(run.path),
        hint="increase it, use an earlier checkpoint of this run with --checkpoint STEP, or train a shorter run in another folder "
        "with --out",
    )


def _length(recipe: Recipe) -> tuple[str, float]:
    """Return the key that sets the training length, and its value."""
    return next((key, value) for key in LENGTHS if (value := getattr(recipe.training, key)) is not None)


def lr_change(before: Recipe, after: Recipe, fractions: tuple[float, float], step: int) -> str | None:
    """Describe how the learning rate changes if a run continues after `step` with another recipe. None if it hardly changes.

    `fractions` are the completed fractions of the training run according to the recipes `before` and `after`.
    """
    if before.training == after.training:
        return None
    rates = [
        recipe.training.optimizer.lr * lr_multiplier(recipe.training.schedule, done, fraction / step)
        for recipe, fraction, done in (
            (before, fractions[0], fractions[0] * (step - 1) / step),
            (after, fractions[1], min(1.0, fractions[1])),
        )
    ]
    low, high = sorted(rates)
    if high <= low * _NOTABLE_LR_CHANGE or fractions[1] >= 1:
        return None
    return (
        f"the learning rate changes from {rates[0]:.3g} in step {step:,} to {rates[1]:.3g} in step {step + 1:,}: the schedule "
        f"depends on the completed fraction of the run, which changes from {min(1.0, fractions[0]):.0%} to {fractions[1]:.0%}"
    )
