"""Distillation: the model learns to predict the mean probabilities of trained models, in addition to the next token.

The teachers are fixed. They run in evaluation mode, without gradients, on the same micro-batches as the model, and their
probabilities are computed for a few rows at a time, so no distribution is ever stored. `Teachers` also loads the reference model of
direct preference optimization (`tinylm.training.dpo`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tinylm.data.batch import Batch
from tinylm.ensemble import Ensemble, teacher_runs
from tinylm.errors import InputError
from tinylm.evaluation.scoring import mean_probabilities
from tinylm.model import registry
from tinylm.model.base import Model
from tinylm.model.stateful import StatefulModel
from tinylm.paths import sha256
from tinylm.recipe import Recipe
from tinylm.recipe.chat import ChatSection, DPOObjective
from tinylm.recipe.schema import CausalLMObjective, DataSection, ObjectiveVariant
from tinylm.run import Run
from tinylm.tokenizer import Tokenizer
from tinylm.training.dpo import DPO
from tinylm.training.objectives import CausalLM, Objective


class Distillation(CausalLM):
    """Next-token prediction with teachers (Hinton et al. 2015).

    The loss is (1 - w) times the cross-entropy plus w times the Kullback-Leibler divergence from the mean distribution of the
    teachers to the model's distribution, where w is `weight`.
    """

    def __init__(self, teachers: Sequence[Model], weight: float) -> None:
        """`teachers` must be in evaluation mode, on the device of the model, and have its vocabulary."""
        self._teachers = teachers
        self._weight = weight

    def loss_sum(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the loss, the cross-entropy and the divergence, (3,), in nats. Only the loss has a gradient."""
        teacher = _MicroBatchTeacher(self._teachers, batch, self._weight)
        sums: Tensor = network(batch.inputs, targets=batch.targets, segments=batch.segments, teacher=teacher)
        return sums


class _MicroBatchTeacher:
    """The mean distribution of the teachers for one micro-batch. It is a `tinylm.model.functions.Teacher`."""

    def __init__(self, teachers: Sequence[Model], batch: Batch, weight: float) -> None:
        self.weight = weight
        self._device = batch.inputs.device
        with torch.no_grad():
            self._hidden = [(teacher, _hidden(teacher, batch)) for teacher in teachers]

    @torch.no_grad()
    def probabilities(self, rows: slice) -> Tensor:
        """Return the probabilities (rows, V) at some positions of the micro-batch."""
        return mean_probabilities([teacher.logits(hidden[rows]).to(self._device) for teacher, hidden in self._hidden])


def _hidden(teacher: Model, batch: Batch) -> Tensor:
    """Return the hidden states (B T, C) of a teacher, which may be on another device than the batch: n-gram models use the CPU."""
    segments = None if batch.segments is None else batch.segments.to(teacher.device)
    return teacher.hidden(batch.inputs.to(teacher.device), segments=segments).flatten(0, 1)


@dataclass(frozen=True)
class Teachers:
    """The fixed models of an objective, opened but not loaded: the runs to distill, or the reference model of `dpo`."""

    ensemble: Ensemble
    section: CausalLMObjective | DPOObjective

    @classmethod
    def open(cls, recipe: Recipe, folder: Path) -> Teachers | None:
        """Open the fixed models of a recipe. Returns None if there are none. `folder` is the run folder of the model to train.

        Raises `InputError` if a run does not exist, cannot teach this model or has another tokenizer than the other teachers.
        """
        runs, objective = teacher_runs(recipe), recipe.objective
        if not runs or not isinstance(objective, CausalLMObjective | DPOObjective):
            return None
        for run in runs:
            _check_teacher(run, recipe, folder)
        return cls(Ensemble.of(runs), objective)

    @property
    def key(self) -> str:
        """The recipe key that names the runs."""
        return _key(self.section)

    @property
    def note(self) -> str:
        """What the models are used for."""
        names = ", ".join(member.name for member in self.ensemble.members)
        if isinstance(self.section, DPOObjective):
            return f"the reference model is {names} (model.init_from)"
        return f"distilling {names} with a weight of {self.section.teacher_weight:g} (objective.teacher_weight)"

    @property
    def fingerprint(self) -> str:
        """The hashes of the teachers' weights. It does not depend on the order or the paths of the teachers."""
        return " ".join(sorted(sha256(member.checkpoint.path / "model.safetensors") for member in self.ensemble.members))

    def describe(self) -> list[dict[str, object]]:
        """Return the entries for environment.json."""
        return [
            {**member.as_dict(), "sha256": sha256(member.checkpoint.path / "model.safetensors")} for member in self.ensemble.members
        ]

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise `InputError` if the teachers' tokenizer has other content than the student's."""
        teacher = self.ensemble.members[0]
        if teacher.run.tokenizer.fingerprint != tokenizer.fingerprint:
            hint = f"set tokenizer.path: {teacher.run.path / 'tokenizer.json'}"
            if teacher.run.chat_encoder is None and isinstance(self.section, DPOObjective):
                hint = "fine-tune it on conversations first (data.format: chat)"
            problem = f"the tokenizer of {teacher.path} differs from this run's, so the model cannot learn its probabilities"
            raise InputError(problem, where=self.key, hint=hint)

    def objective(self, device: torch.device) -> Objective:
        """Load the models to `device`, and return the objective that uses them."""
        networks = [member.run.network(member.checkpoint, device).requires_grad_(False) for member in self.ensemble.members]
        if isinstance(self.section, DPOObjective):
            return DPO(self.section.beta, networks[0])
        return Distillation(networks, self.section.teacher_weight)


def _key(section: ObjectiveVariant) -> str:
    return "model.init_from" if isinstance(section, DPOObjective) else "objective.teacher"


def _check_teacher(run: Run, recipe: Recipe, folder: Path) -> None:
    """Raise `InputError` if a run cannot teach the model of `recipe`, which is trained in `folder`."""
    teacher, where = run.recipe, f"{_key(recipe.objective)}: {run.path}"
    if run.path.resolve() == folder.resolve():
        raise InputError("a run cannot be its own teacher", where=where, hint="choose another folder with --out")
    if not isinstance(teacher.objective, CausalLMObjective | DPOObjective):
        problem = f"was trained with the {teacher.objective.name} objective, so it does not predict the next token"
        raise InputError(problem, where=where, hint="a teacher must be trained with causal_lm")
    needed = recipe.model.context_length + recipe.model.warmup_tokens
    unlimited = issubclass(registry.network_class(teacher.model), StatefulModel)
    if not unlimited and teacher.model.context_length < needed:
        raise InputError(
            f"has a context length of {teacher.model.context_length}, but the model is trained on sequences of {needed} tokens",
            where=where,
            hint=f"set model.context_length to at most {teacher.model.context_length - recipe.model.warmup_tokens}",
        )
    separates = isinstance(recipe.data, ChatSection) or (isinstance(recipe.data, DataSection) and recipe.data.document_mask)
    if separates and teacher.model.reads_across_documents:
        problem = f"the {teacher.model.architecture} architecture cannot separate the documents in a sequence"
        raise InputError(problem, where=where, hint="set data.document_mask: off, or choose another teacher")
