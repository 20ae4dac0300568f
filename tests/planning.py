"""Plans for small recipes, used by the tests of `tinylm.cost`."""

from __future__ import annotations

from typing import Any

from tinylm.cost.cpu import Processor
from tinylm.cost.plan import Plan, make_plan
from tinylm.recipe import Recipe, loads

IDLE = Processor(350e9, 27e9, 14e9, cores=2, has_amx=True)
"""The machine on which the constants in `tinylm.cost.cpu` were measured, without other load."""
WITHOUT_AMX = Processor(350e9, 27e9, 14e9, cores=2, has_amx=False)


def recipe(*settings: str) -> Recipe:
    """Return a recipe for 10 steps with the overrides `settings`."""
    return loads("data: {train: a.txt}\ntraining: {steps: 10}\n", settings, check_files=False)


def plan(*settings: str, **options: Any) -> Plan:
    """Return the plan for `recipe(*settings)`, a vocabulary of 1,000 tokens and 100,000 training tokens."""
    return make_plan(recipe(*settings), 1000, 100_000, **{"processor": IDLE, **options})
