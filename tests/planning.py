"""Plans of small recipes, for the tests of `tinylm.cost`."""

from __future__ import annotations

from typing import Any

from tinylm.cost.cpu import Processor
from tinylm.cost.plan import Plan, make_plan
from tinylm.recipe import Recipe, loads

IDLE = Processor(350e9, 27e9, 14e9, cores=2, has_amx=True)
"""The machine that the constants of `tinylm.cost.cpu` were fitted to."""
WITHOUT_AMX = Processor(350e9, 27e9, 14e9, cores=2, has_amx=False)


def recipe(*settings: str) -> Recipe:
    """A recipe of 10 steps with these overrides."""
    return loads("data: {train: a.txt}\ntraining: {steps: 10}\n", settings, check_files=False)


def plan(*settings: str, **options: Any) -> Plan:
    """The plan of `recipe(*settings)` with 1,000 tokens in the vocabulary and 100,000 in the training text."""
    return make_plan(recipe(*settings), 1000, 100_000, **{"processor": IDLE, **options})
