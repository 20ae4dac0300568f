"""What the steps of a training run exchange: the arguments, the data and the components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tinylm.data.datasets import Dataset
from tinylm.data.prepared import PreparedData
from tinylm.optim.groups import Optimizers
from tinylm.recipe import Recipe
from tinylm.reporting import Reporter
from tinylm.training.checkpoint import CheckpointWriter
from tinylm.training.distillation import Teachers
from tinylm.training.metrics import Observer
from tinylm.training.objectives import Objective
from tinylm.training.parallel import Parallel
from tinylm.training.precision import Precision

Threads = int | Literal["auto"] | None


@dataclass(frozen=True)
class TrainingJob:
    """The arguments of `train`, with the device and the resume mode resolved."""

    recipe: Recipe
    folder: Path
    device: torch.device
    resume: bool
    overwrite: bool
    allow_change: Sequence[str]
    """Recipe keys and sections that may change when the run is resumed."""
    threads: Threads
    workers: int
    """Number of processes that encode the text."""
    stop_after: float | None
    """Stop training early after this many seconds."""


@dataclass(frozen=True)
class Callbacks:
    """The reporter receives notes during preparation, and the observer receives events during training."""

    reporter: Reporter
    observer: Observer


@dataclass(frozen=True)
class TrainingData:
    """The examples to train on, the objective, and the number of steps."""

    prepared: PreparedData
    dataset: Dataset
    objective: Objective
    steps: int | None
    """None if the recipe's `training.minutes` limits the run instead."""
    teachers: Teachers | None = None
    """The runs that are distilled."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes saved with every checkpoint. They reveal a changed text, tokenizer or teacher when the run is resumed."""
        own = {"data": self.prepared.fingerprint, "tokenizer": self.prepared.tokenizer.fingerprint}
        return own if self.teachers is None else {**own, "teachers": self.teachers.fingerprint}

    @property
    def vocab_size(self) -> int:
        return self.prepared.tokenizer.vocab_size


@dataclass(frozen=True)
class Components:
    """The network, and the objects that parallelize, update and save it."""

    parallel: Parallel
    optimizers: Optimizers
    precision: Precision
    checkpoints: CheckpointWriter
