"""Prepare the data to train on, in the main process first."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from tinylm.cost.micro_batch import check_batch_divides
from tinylm.cost.plan import training_steps
from tinylm.data import formats, training_text
from tinylm.data.chat import PreparedChat
from tinylm.data.prepare import PreparedText
from tinylm.data.prepared import PreparedData
from tinylm.data.training_text import TrainingText
from tinylm.errors import InputError
from tinylm.pipeline.job import TrainingData, TrainingJob
from tinylm.processes import Processes
from tinylm.recipe.chat import ChatSection
from tinylm.recipe.schema import require_text
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Run
from tinylm.training import objectives


def prepare_data(job: TrainingJob, processes: Processes, reporter: Reporter) -> TrainingData:
    """Prepare the text and the dataset. Raises `InputError` if the text is too short or the schedule or batch size is invalid."""
    recipe = job.recipe
    if not recipe.model.learns_by_counting:
        processes.run_on_main(lambda: check_batch_divides(recipe, processes.world_size))
    prepared = _prepare_on_every_machine(job, processes, reporter)
    dataset = processes.run_on_all(lambda: formats.find(recipe.data).dataset(recipe, prepared))
    steps = training_steps(recipe.training, dataset.tokens_per_example, dataset.examples_per_epoch)
    warmup = recipe.training.schedule.warmup
    if steps is not None and warmup >= 1 and warmup > steps:
        raise InputError(f"{warmup} warmup steps exceed the {steps} training steps", where="training.schedule.warmup")
    objective = objectives.build(prepared.fill_in(recipe).objective)
    return TrainingData(prepared, dataset, objective, steps)


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


def collect_training_texts(
    job: TrainingJob, prepared: PreparedData, pretrained: Run | None, reporter: Reporter
) -> list[TrainingText] | None:
    """Return the texts that the model is trained on, including those of the run that `model.init_from` refers to.

    Warns if that run's texts contain the held-out or test text. Returns None for data that is not text.
    """
    if not isinstance(prepared, PreparedText | PreparedChat):
        return None
    inherited = [] if pretrained is None else training_text.inherited(pretrained.training_texts(), pretrained.name)
    if isinstance(prepared, PreparedChat):
        assert isinstance(job.recipe.data, ChatSection)
        return [*prepared.training_texts(job.recipe.data), *inherited]
    for shard, name in ((prepared.heldout, "the held-out text"), (prepared.test, "the test text")):
        if shard is not None:
            training_text.warn(training_text.measure(inherited, shard, prepared.tokenizer), name, reporter)
    return [TrainingText(require_text(job.recipe.data).train, prepared.ngrams, prepared.tokenizer), *inherited]
