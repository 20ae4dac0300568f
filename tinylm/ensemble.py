"""Ensembles: several trained models that are used as one, by averaging the probabilities that they predict.

`Ensemble.of` checks that the models can be averaged. `tinylm.evaluation` averages the probabilities of the target tokens or of the
labels, and `tinylm.generation` those of the next token. A single model is an ensemble with one member. This module does not import
torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinylm.errors import InputError
from tinylm.recipe import Recipe
from tinylm.recipe.chat import DPOObjective
from tinylm.recipe.labels import ClassificationObjective
from tinylm.recipe.schema import CausalLMObjective
from tinylm.run import Checkpoint, Run

SEPARATOR = "+"
"""Separates the members of an ensemble in its name: `runs/a+runs/b`."""


@dataclass(frozen=True)
class Member:
    """A model in an ensemble: one checkpoint of a run."""

    run: Run
    checkpoint: Checkpoint

    @property
    def path(self) -> str:
        """The path of the run folder."""
        return str(self.run.path)

    @property
    def name(self) -> str:
        return f"{self.path} {self.checkpoint.name}"

    def as_dict(self) -> dict[str, object]:
        return {"run": self.path, "checkpoint": self.checkpoint.name, "step": self.checkpoint.step}


@dataclass(frozen=True)
class Ensemble:
    """One or more language models with the same tokenizer, or classifiers with the same labels. All have the same weight."""

    members: tuple[Member, ...]

    @classmethod
    def of(cls, runs: Sequence[Run], checkpoints: Sequence[str] = ()) -> Ensemble:
        """Combine `runs`, each with the same checkpoint, or several checkpoints of a single run.

        `checkpoints` contains `best`, `last` or steps. If it is empty, each run's default checkpoint is used. Raises `InputError`
        if a checkpoint does not exist, if a member occurs twice, or if the members cannot be averaged: they must all be language
        models whose tokenizers have the same content, or all classifiers with the same labels.
        """
        if len(runs) > 1 and len(checkpoints) > 1:
            raise InputError(
                "several checkpoints require a single run",
                where="--checkpoint",
                hint="pass checkpoint folders instead: --run RUN/checkpoints/STEP",
            )
        chosen: Sequence[str | None] = checkpoints or (None,)
        members = tuple(Member(run, run.checkpoint(which)) for run in runs for which in chosen)
        first, seen = members[0], set[Path]()
        for member in members:
            folder = member.checkpoint.path.resolve()
            if folder in seen:
                raise InputError("is in the ensemble twice", where=member.name, hint="pass each checkpoint once")
            seen.add(folder)
            if len(members) > 1:
                _check_averages(first, member)
        return cls(members)

    @classmethod
    def open(cls, name: str) -> Ensemble:
        """Open a run, a checkpoint folder, or an ensemble of several that are separated by `+`."""
        paths = [name] if Path(name).exists() else name.split(SEPARATOR)
        return cls.of([Run.open(path) for path in paths])

    @property
    def runs(self) -> list[Run]:
        """The run of each member."""
        return [member.run for member in self.members]

    @property
    def is_single(self) -> bool:
        return len(self.members) == 1

    @property
    def name(self) -> str:
        """The paths of the run folders, separated by `+`. If a run occurs twice, the paths of its checkpoint folders."""
        paths = [member.path for member in self.members]
        names = (
            member.path if paths.count(member.path) == 1 else str(member.run.path / "checkpoints" / member.checkpoint.name)
            for member in self.members
        )
        return SEPARATOR.join(names)

    @property
    def checkpoint(self) -> str:
        """The names of the checkpoints, separated by `+`."""
        return SEPARATOR.join(member.checkpoint.name for member in self.members)

    @property
    def context_length(self) -> int:
        """The smallest context length of the members."""
        return min(run.recipe.model.context_length for run in self.runs)


def teacher_runs(recipe: Recipe) -> list[Run]:
    """Open the runs whose models stay fixed during training: those to distill, or the reference model of `dpo`.

    Raises `InputError` if one of them cannot be opened.
    """
    paths = recipe.objective.teacher if isinstance(recipe.objective, CausalLMObjective) else ()
    if isinstance(recipe.objective, DPOObjective) and recipe.model.pretrained is not None:
        paths = (recipe.model.pretrained.run,)
    return [Run.open(os.path.expanduser(path)) for path in paths]


def _check_averages(first: Member, member: Member) -> None:
    """Raise `InputError` if the probabilities of two models cannot be averaged."""
    expected, objective = first.run.recipe.objective, member.run.recipe.objective
    for each, path in ((expected, first.path), (objective, member.path)):
        if not isinstance(each, CausalLMObjective | DPOObjective | ClassificationObjective):
            problem = f"was trained with the {each.name} objective, so it cannot be part of an ensemble"
            raise InputError(problem, where=path, hint="ensembles consist of language models or of classifiers")
    theirs = objective.labels if isinstance(objective, ClassificationObjective) else None
    ours = expected.labels if isinstance(expected, ClassificationObjective) else None
    if theirs != ours:
        problem = "does not predict the same labels as" if ours and theirs else "is not the same kind of model as"
        hint = "all members must be language models, or classifiers with the same labels"
        raise InputError(f"{problem} {first.path}", where=member.path, hint=hint)
    if theirs is None and member.run.tokenizer.fingerprint != first.run.tokenizer.fingerprint:
        raise InputError(
            f"its tokenizer differs from that of {first.path}, so the probabilities of their tokens cannot be averaged",
            where=member.path,
            hint="train the runs with the same tokenizer: set `tokenizer.path` in the recipe",
        )
