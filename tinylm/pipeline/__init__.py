"""Train a model from a recipe and save it in a run folder. `tinylm train` and notebooks call the entry point `train`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tinylm import device as devices
from tinylm.evaluation.metrics import LOSS, METRICS, PERPLEXITY, Metric, Metrics, perplexity_of
from tinylm.model.foreign_code import foreign_code
from tinylm.pipeline.components import build_components, report_parallelism, resolve_settings, tune_cpu, write_run_folder
from tinylm.pipeline.data import add_teachers, collect_training_texts, prepare_data
from tinylm.pipeline.job import Callbacks, Threads, TrainingData, TrainingJob
from tinylm.pipeline.network import build_network, open_pretrained
from tinylm.pipeline.resume import announce_lr_change, find_checkpoint, merge_recipe, restore_checkpoint
from tinylm.pipeline.trainer_setup import build_trainer, observers, speed_monitors
from tinylm.processes import Processes, join_processes, lost_peer_error, threads_per_process
from tinylm.recipe import Recipe
from tinylm.reporting import SILENT, Reporter
from tinylm.training.distillation import Teachers
from tinylm.training.metrics import Observer, Observers
from tinylm.training.mirror import mirrors, synchronize
from tinylm.training.run_folder import locked_run_folder
from tinylm.training.signals import StopRequest
from tinylm.training.tracking import trackers
from tinylm.training.trainer import Trainer


@dataclass(frozen=True)
class TrainResult:
    """The result of a run. `train_loss` is in nats per target."""

    run: str
    step: int
    steps: int
    """Planned number of steps. If `training.minutes` limits the run and it was stopped early, this is an estimate."""
    fraction_done: float
    """Completed fraction of the run: 1 unless it was stopped early."""
    limited_by_time: bool
    """Whether `training.minutes` limits the run."""
    vocab_size: int
    tokens: int
    train_loss: float | None
    metrics: dict[str, float | None]
    """Results of the last held-out evaluation by metric name, primary metric first. Values are None if there was no evaluation."""
    best_step: int
    best_value: float | None
    """The value of the primary metric at the best checkpoint."""
    seconds: float
    train_seconds: float
    tokens_per_second: float
    parameters: int
    device: str
    precision: str
    peak_memory_bytes: int | None
    stopped: str
    """Why training ended: `done`, `patience` (`evaluation.patience`), `time` (`stop_after`), `signal` or `callback`
    (`Observer.request_stop`)."""
    signal_number: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the document that `tinylm train --json` prints. A metric's key is `val_` plus its name."""
        document: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "metrics":
                document |= {METRICS[name].key: number for name, number in value.items()}
            elif field.name == "best_value":
                document[f"best_{METRICS[next(iter(self.metrics))].key}"] = value
            elif field.name != "signal_number":
                document[field.name] = value
        return document


def train(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_change: Sequence[str] = (),
    device: str = "auto",
    threads: Threads = None,
    workers: int = 1,
    stop_after: float | None = None,
    reporter: Reporter = SILENT,
    observer: Observer | Sequence[Observer] | None = None,
) -> TrainResult:
    """Train the model of `recipe` in the run folder `folder`. Under a launcher such as torchrun, every process makes the same call.

    If the folder already contains a run, `resume` or `overwrite` is required. `resume` continues from its newest complete
    checkpoint. The recipe may then differ from the original one only in keys that do not change the model, and in those listed in
    `allow_change`. `threads` is the number of CPU threads, or `auto` to measure which number is fastest; None uses one per core.
    `workers` is the number of processes that encode the text. After `stop_after` seconds, the run is saved and stopped. `observer`
    is one observer or several, which receive the events of the main process, in order.

    Raises `InputError` for invalid input and `WorkError` if training fails.
    """
    folder = Path(folder)
    target = devices.resolve(device)
    devices.set_threads(threads if isinstance(threads, int) else threads_per_process())
    with join_processes(target) as processes, ExitStack() as stack:
        target = processes.run_on_all(lambda: processes.device(target))
        receiver = Observers(observer) if isinstance(observer, Sequence) else observer or Observer()
        callbacks = Callbacks(reporter, receiver) if processes.is_main else Callbacks(SILENT, Observer())
        processes.run_on_main(lambda: stack.enter_context(locked_run_folder(folder, resume=resume, overwrite=overwrite)))
        processes.run_on_main(lambda: synchronize(recipe, folder, reporter, resume=resume, overwrite=overwrite))
        resume = processes.run_on_main(lambda: resume and (folder / "recipe.yaml").exists())
        job = TrainingJob(recipe, folder, target, resume, overwrite, allow_change, threads, workers, stop_after)
        try:
            return _train(job, callbacks, processes)
        except RuntimeError as error:
            raise (lost_peer_error(error) if processes.world_size > 1 else None) or error from None


def _train(job: TrainingJob, callbacks: Callbacks, processes: Processes) -> TrainResult:
    """Run training in one process. The main process must hold the lock on the run folder."""
    reporter = callbacks.reporter
    if job.resume:
        job = merge_recipe(job, processes, reporter)
    monitors: list[Observer] = []
    processes.run_on_main(lambda: monitors.extend(trackers(job.recipe, job.folder, callbacks.observer.note)))
    processes.run_on_main(lambda: monitors.extend(mirrors(job.recipe, job.folder, callbacks.observer.note)))
    pretrained = open_pretrained(job, processes, reporter)
    teachers = processes.run_on_all(lambda: Teachers.open(job.recipe, job.folder))
    data = prepare_data(job, processes, reporter)
    if teachers is not None:
        data = add_teachers(data, teachers, job.device, processes, reporter)
    job = replace(job, recipe=processes.run_on_all(lambda: data.prepared.fill_in(job.recipe)))
    training_texts = processes.run_on_main(lambda: collect_training_texts(job, data, pretrained, reporter))
    if job.device.type == "cpu":
        tune_cpu(job, data, processes, reporter)
    checkpoint = find_checkpoint(job, data, processes, reporter) if job.resume else None
    network = build_network(job, data, pretrained, fresh=checkpoint is None, processes=processes, reporter=reporter)
    settings = resolve_settings(job, network, data, processes, reporter)
    job = replace(job, recipe=settings.recipe)
    network.compile_loss = settings.recipe.training.compile is not False
    foreign = foreign_code(network)  # before parallelization, which changes the classes of modules
    components = build_components(job, network, settings.precision, processes)
    state = None if checkpoint is None else restore_checkpoint(checkpoint, job, components, reporter)
    if state is not None:
        processes.run_on_main(lambda: announce_lr_change(job, data, state, reporter))
    report_parallelism(job, components, reporter)
    processes.run_on_main(lambda: write_run_folder(job, data, components, state, foreign, training_texts))
    if state is None and data.objective.metrics[0] is LOSS:
        vocab_size = data.vocab_size
        reporter.note(f"uniform guessing among {vocab_size:,} tokens has a loss of {math.log(vocab_size):.2f} (ln {vocab_size:,})")
    monitors += speed_monitors(job, data, callbacks, processes)
    with observers(job, int(state["step"]) if state else 0, callbacks.observer, monitors, processes) as observer:
        trainer = build_trainer(job, data, components, observer)
        if state is not None:
            trainer.resume(state)
        trainer.progress.seconds += settings.compile_seconds
        trainer.progress.train_seconds += settings.compile_seconds
        with StopRequest(callbacks.observer.stopping) as request:
            stopped = trainer.train(request, job.stop_after)
    return _result(job, data, trainer, stopped, request.signal_number)


def _result(job: TrainingJob, data: TrainingData, trainer: Trainer, stopped: str, signal_number: int | None) -> TrainResult:
    progress, setup = trainer.progress, trainer.setup
    return TrainResult(
        run=str(job.folder),
        step=progress.step,
        steps=setup.steps if setup.steps is not None else round(progress.step / max(trainer.fraction_done, 1e-9)),
        fraction_done=trainer.fraction_done,
        limited_by_time=setup.steps is None,
        vocab_size=data.vocab_size,
        tokens=progress.tokens,
        train_loss=progress.train_loss,
        metrics=_final_metrics(progress.metrics, setup.objective.metrics),
        best_step=progress.best_step,
        best_value=progress.best_value,
        seconds=progress.seconds,
        train_seconds=progress.train_seconds,
        tokens_per_second=progress.tokens / max(progress.train_seconds, 1e-9),
        parameters=setup.parallel.network.parameter_count(),
        device=str(job.device),
        precision=setup.precision.name,
        peak_memory_bytes=devices.peak_memory_bytes(job.device),
        stopped=stopped,
        signal_number=signal_number if stopped == "signal" else None,
    )


def _final_metrics(metrics: Metrics | None, defined: Sequence[Metric]) -> dict[str, float | None]:
    """Return the value of each metric by name. If the primary metric is the loss, the perplexity is added after it."""
    values: dict[str, float | None] = {}
    for metric in defined:
        values[metric.name] = None if metrics is None else metrics[metric.name]
        if metric is defined[0] is LOSS:
            values[PERPLEXITY.name] = None if metrics is None else perplexity_of(metrics[LOSS.name])
    return values
