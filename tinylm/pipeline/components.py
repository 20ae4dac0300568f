"""Choose the automatic settings, build what parallelizes, updates and saves the network, and write the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from tinylm import device as devices
from tinylm.data.training_text import TrainingText
from tinylm.errors import InputError
from tinylm.model import lora
from tinylm.model.base import Model
from tinylm.optim import groups
from tinylm.optim.groups import Optimizers
from tinylm.pipeline.job import Components, TrainingData, TrainingJob
from tinylm.processes import Processes
from tinylm.reporting import Reporter
from tinylm.training import auto_settings, parallel
from tinylm.training import precision as precisions
from tinylm.training.checkpoint import CheckpointWriter
from tinylm.training.counting import CountState
from tinylm.training.out_of_memory import keep_freed_memory
from tinylm.training.parallel import Parallel
from tinylm.training.precision import Precision
from tinylm.training.run_folder import remove_run, write_run


def tune_cpu(job: TrainingJob, data: TrainingData, processes: Processes, reporter: Reporter) -> None:
    keep_freed_memory()
    if job.threads == "auto" and not job.recipe.model.learns_by_counting:
        fastest = processes.run_on_main(
            lambda: auto_settings.use_fastest_threads(
                job.recipe, data.vocab_size, data.dataset, data.objective, processes.world_size
            )
        )
        devices.set_threads(fastest)
        reporter.note(f"fastest number of CPU threads for this model: {fastest}")


def resolve_settings(
    job: TrainingJob, network: Model, data: TrainingData, processes: Processes, reporter: Reporter
) -> auto_settings.ResolvedSettings:
    """Choose a value for every `auto` setting. Models that learn by counting do not use these settings."""
    if network.model.learns_by_counting:
        return auto_settings.ResolvedSettings(job.recipe, Precision("fp32", torch.device("cpu")), 0.0)
    budget = auto_settings.Budget(data.steps, job.stop_after)
    return auto_settings.resolve(
        job.recipe, network, data.dataset, data.objective, budget, reporter, resumed=job.resume, processes=processes
    )


def build_components(job: TrainingJob, network: Model, precision: Precision, processes: Processes) -> Components:
    checkpoints = CheckpointWriter(job.folder, job.recipe.checkpoint.keep, processes)
    if network.model.learns_by_counting:
        state = cast(Optimizers, CountState(network.vocab_size, cast(Any, network.model).order))
        return Components(Parallel(network, "none", processes, precision), state, precision, checkpoints)
    strategy = parallel.resolve(job.recipe, network.vocab_size, job.device, processes)
    if strategy == "fsdp" and lora.has_trained_rows(network):
        raise InputError("fsdp does not support LoRA on conversations", where="training.parallel", hint="use ddp")
    parallelized = Parallel(network, strategy, processes, precision)
    optimizers = groups.build(job.recipe.training.optimizer, network, parallelized.mesh)
    if job.recipe.training.ema is not None:
        optimizers.keep_average(network, job.recipe.training.ema)
    return Components(parallelized, optimizers, precision, checkpoints)


def report_parallelism(job: TrainingJob, components: Components, reporter: Reporter) -> None:
    parallelized = components.parallel
    if components.checkpoints.transfer.needed:
        reporter.note("the machines do not share the run folder, so checkpoints are sent over the network")
        if job.recipe.checkpoint.mirror is None:
            reporter.warn("if another machine becomes the main one, the run starts from scratch; set checkpoint.mirror")
    training, world_size = job.recipe.training, parallelized.processes.world_size
    if world_size > 1 and parallelized.network.model.learns_by_counting:
        reporter.note(f"{world_size} processes; each counts the whole text")
    elif world_size > 1:
        reporter.note(
            f"{world_size} processes ({parallelized.name}), each with micro-batches of {training.micro_batch_size} sequences"
        )
    elif training.parallel != "auto":
        reporter.note(f"training.parallel: {training.parallel} has no effect with a single process")


def write_run_folder(
    job: TrainingJob,
    data: TrainingData,
    components: Components,
    state: dict[str, Any] | None,
    foreign: Sequence[str],
    training_texts: Sequence[TrainingText] | None,
) -> None:
    """Write all files except checkpoints and metrics. `state` is the resumed checkpoint's state, or None for a new run."""
    if job.overwrite:
        remove_run(job.folder)
    components.checkpoints.prepare()
    parallelized = components.parallel
    facts = {
        "device": devices.describe(job.device),
        "processes": parallelized.processes.world_size,
        "parallel": parallelized.name,
        "mfu_relative_to": precisions.peak_source(components.precision),
        "foreign_code": list(foreign),
    }
    if data.teachers is not None:
        facts["teachers"] = data.teachers.describe()
    if state:
        facts["resumed_step"] = state["step"]
        training_texts = None  # written when the run started
    write_run(job.folder, job.recipe, data.prepared, facts, training_texts)
