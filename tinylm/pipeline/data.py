"""Prepare the data to train on, in the main process first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from tinylm.cost.micro_batch import check_batch_divides
from tinylm.cost.plan import training_steps
from tinylm.data import formats, training_text
from tinylm.data.chat import PreparedChat
from tinylm.data.datasets import Dataset
from tinylm.data.masking import MaskedWindows
from tinylm.data.mixture import Mixture
from tinylm.data.prepare import PreparedText
from tinylm.data.prepared import PreparedData
from tinylm.data.training_text import TrainingText
from tinylm.errors import InputError
from tinylm.pipeline.job import TrainingData, TrainingJob
from tinylm.processes import Processes
from tinylm.recipe.chat import DPOObjective
from tinylm.recipe.mixture import MixedSource, describe_epochs, describe_shares
from tinylm.recipe.schema import DataSection, require_text
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Run
from tinylm.samplers import check_prompts
from tinylm.training import objectives
from tinylm.training.distillation import Teachers


def prepare_data(job: TrainingJob, processes: Processes, reporter: Reporter) -> TrainingData:
    """Prepare the text and the dataset.

    Raises `InputError` if the text is too short, a sample prompt is too long, or the schedule or batch size is invalid.
    """
    recipe = job.recipe
    if not recipe.model.learns_by_counting:
        processes.run_on_main(lambda: check_batch_divides(recipe, processes.world_size))
    prepared = _prepare_on_every_machine(job, processes, reporter)
    processes.run_on_main(lambda: check_prompts(prepared.tokenizer, recipe))
    dataset = processes.run_on_all(lambda: formats.find(recipe.data).dataset(recipe, prepared))
    steps = training_steps(recipe.training, dataset.tokens_per_example, dataset.examples_per_epoch)
    warmup = recipe.training.schedule.warmup
    if steps is not None and warmup >= 1 and warmup > steps:
        raise InputError(f"{warmup} warmup steps exceed the {steps} training steps", where="training.schedule.warmup")
    if isinstance(recipe.data, DataSection) and recipe.data.mixture:
        _report_mixture(recipe.data.mixture, dataset, steps, recipe.training.global_batch_size, reporter)
    objective = objectives.build(prepared.fill_in(recipe).objective)
    return TrainingData(prepared, dataset, objective, steps)


def _report_mixture(
    mixture: Sequence[MixedSource], dataset: Dataset, steps: int | None, batch_size: int, reporter: Reporter
) -> None:
    """Report the share of each source and, if the number of steps is known, how many times it is read."""
    mixed = dataset.stream if isinstance(dataset, MaskedWindows) else dataset
    epochs = mixed.epochs(steps * batch_size) if steps is not None and isinstance(mixed, Mixture) else None
    for number, source in enumerate(describe_shares(mixture)):
        reporter.note(f"mixture: {source}" + ("" if epochs is None else f", {describe_epochs(epochs[number])}"))


def _prepare_on_every_machine(job: TrainingJob, processes: Processes, reporter: Reporter) -> PreparedData:
    """Encode the text in the main process and memory-map its tokens in all processes.

    A machine that does not share the main process's cache encodes the text itself. Raises `InputError` if its text differs.
    """
    data_format = formats.find(job.recipe.data)
    if processes.world_size == 1:
        return cast(PreparedData, data_format.prepare(job.recipe, reporter, job.workers))

    def prepare_on_main() -> tuple[Path, str, str, tuple[str, ...]]:
        prepared = data_format.prepare(job.recipe, reporter, job.workers)
        return prepared.folder, prepared.fingerprint, prepared.tokenizer.backend.to_str(), prepared.heldout_files

    folder, fingerprint, tokenizer_json, files = processes.run_on_main(prepare_on_main)
    missing = processes.local_rank == 0 and not all((folder / name).exists() for name in files)
    local_fingerprint = processes.run_on_all(
        lambda: data_format.prepare(job.recipe, SILENT, job.workers).fingerprint if missing else fingerprint
    )
    if local_fingerprint != fingerprint:
        raise InputError("the text on this machine differs from the main process's text", where="data.train")
    return cast(PreparedData, processes.run_on_all(lambda: data_format.open(job.recipe, folder, fingerprint, tokenizer_json)))


def add_teachers(
    data: TrainingData, teachers: Teachers, device: torch.device, processes: Processes, reporter: Reporter
) -> TrainingData:
    """Load the teachers in every process. Raises `InputError` if their tokenizer is not the one of the training data."""
    processes.run_on_main(lambda: teachers.check_tokenizer(data.prepared.tokenizer))
    reporter.note(teachers.note)
    objective = processes.run_on_all(lambda: teachers.objective(device))
    return replace(data, objective=objective, teachers=teachers)


def collect_training_texts(
    job: TrainingJob, data: TrainingData, pretrained: Run | None, reporter: Reporter
) -> list[TrainingText] | None:
    """Return the texts that the model is trained on, including those of the runs that it is initialized or distilled from.

    Warns if those runs' texts contain the held-out or test text. Returns None for data that is not text.
    """
    prepared = data.prepared
    if not isinstance(prepared, PreparedText | PreparedChat):
        return None
    inherited = [] if pretrained is None else training_text.inherited(pretrained.training_texts(), pretrained.name)
    if data.teachers is not None and not isinstance(data.teachers.section, DPOObjective):  # `pretrained` is its reference model
        inherited += _texts_of_teachers(data.teachers, prepared)
    if isinstance(prepared, PreparedChat):
        return [*prepared.training_texts(job.recipe.data), *inherited]
    for shard, name in ((prepared.heldout, "the held-out text"), (prepared.test, "the test text")):
        if shard is not None:
            training_text.warn(training_text.measure(inherited, shard, prepared.tokenizer), name, reporter)
    return [TrainingText(require_text(job.recipe.data).sources()["train"], prepared.ngrams, prepared.tokenizer), *inherited]


def _texts_of_teachers(teachers: Teachers, prepared: PreparedData) -> list[TrainingText]:
    """Return the texts that the teachers were trained on, without the text that this run is trained on and without repetitions."""
    texts, seen = [], {prepared.fingerprint}
    for member in teachers.ensemble.members:
        own, *earlier = training_text.inherited(member.run.training_texts(), member.run.name)
        fingerprint = member.checkpoint.state["fingerprints"].get("data")
        texts += earlier if fingerprint in seen else [own, *earlier]
        seen.add(fingerprint)
    return texts
