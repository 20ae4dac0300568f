"""Build the trainer with its observers and hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tinylm.cost import step_time
from tinylm.cost.network import network_cost
from tinylm.cost.parameters import has_estimates
from tinylm.data.datasets import example_size
from tinylm.evaluation.metrics import Metrics
from tinylm.pipeline.job import Callbacks, Components, TrainingData, TrainingJob
from tinylm.processes import Processes
from tinylm.recipe.schema import DecoderSection
from tinylm.samplers import samples
from tinylm.training import precision as precisions
from tinylm.training.counting import CountingTrainer
from tinylm.training.metrics import MetricsFile, Observer, Observers
from tinylm.training.objectives import Heldout
from tinylm.training.parallel import Parallel
from tinylm.training.speed import BUSY_NOTE, SpeedMonitor
from tinylm.training.trainer import Hooks, Poll, Trainer, TrainingSetup
from tinylm.wait_policy import WAIT_POLICY


@contextmanager
def observers(
    job: TrainingJob, resumed_step: int, observer: Observer, monitors: Sequence[Observer], processes: Processes
) -> Iterator[Observer]:
    """Yield the user's observer. In the main process, every event is first written to the log files in the run folder.

    `monitors` receive the main process's events after the user's observer.
    """
    if not processes.is_main:
        yield observer
        return
    continue_on_failure = job.recipe.checkpoint.on_failure == "continue"
    metrics = MetricsFile(job.folder, resumed_step, _note_once(observer) if continue_on_failure else None)
    members = Observers([metrics, observer, *monitors])
    try:
        members.resumed(*metrics.history())
        yield members
    finally:
        members.close()


def speed_monitors(job: TrainingJob, data: TrainingData, callbacks: Callbacks, processes: Processes) -> list[Observer]:
    """Return a speed monitor if a single process trains on the CPU. Reports a note if the machine is busy."""
    if job.device.type != "cpu" or processes.world_size > 1:
        return []
    if WAIT_POLICY.current == "sleep":
        callbacks.reporter.note(f"{BUSY_NOTE}, so idle threads sleep instead of spinning")

    def tokens_per_second() -> float | None:
        if not isinstance(job.recipe.model, DecoderSection):  # the estimates for other architectures are less accurate
            return None
        step = step_time.estimate_on_cpu(job.recipe, data.vocab_size, data.steps, None, example_size(data.dataset))
        if data.teachers is not None:
            teachers = [run.recipe.model for run in data.teachers.ensemble.runs]
            step = step_time.with_teachers(step, job.recipe, data.vocab_size, teachers)
        return job.recipe.training.global_batch_size * data.dataset.tokens_per_example / step.step_seconds

    return [SpeedMonitor(WAIT_POLICY, callbacks.observer.note, tokens_per_second)]


def _note_once(observer: Observer) -> Callable[[str], None]:
    """Return a function that forwards its first message to the observer and ignores later messages."""
    noted = False

    def note(problem: str) -> None:
        nonlocal noted
        if not noted:
            observer.note(f"{problem}; training continues (checkpoint.on_failure: continue)")
        noted = True

    return note


def build_trainer(job: TrainingJob, data: TrainingData, components: Components, observer: Observer) -> Trainer:
    precision, processes = components.precision, components.parallel.processes
    flops = None
    if has_estimates(job.recipe.model):
        network = network_cost(job.recipe, data.vocab_size, example_size(data.dataset))
        flops = network.flops(job.recipe.training.lora) / network.size.tokens
    setup = TrainingSetup(
        recipe=job.recipe,
        parallel=components.parallel,
        optimizers=components.optimizers,
        objective=data.objective,
        dataset=data.dataset,
        steps=data.steps,
        precision=precision,
        flops_per_token=flops,
        peak_flops=processes.run_on_main(lambda: precisions.peak_flops(precision)),
        checkpoints=components.checkpoints,
        fingerprints=data.fingerprints,
    )
    trainer = CountingTrainer if components.parallel.network.model.learns_by_counting else Trainer
    return trainer(setup, _hooks(job, data, components.parallel, observer))


def _hooks(job: TrainingJob, data: TrainingData, parallelized: Parallel, observer: Observer) -> Hooks:
    recipe, prepared = job.recipe, data.prepared

    def evaluate_heldout(poll: Poll) -> Metrics:
        heldout = Heldout(prepared, recipe.evaluation, parallelized.processes, poll)
        return data.objective.evaluate(parallelized.network, heldout)

    def generate_samples() -> Iterator[tuple[str, str]]:
        with parallelized.full_network() as network:
            if network is not None:
                yield from samples(network, prepared.tokenizer, recipe)

    return Hooks(evaluate_heldout, generate_samples, prepared.tokenizer.decode, observer)
