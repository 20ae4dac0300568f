"""Train a model from a recipe and save it in a run folder. `tinylm train` and notebooks call the entry point `train`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from tinylm import device as devices
from tinylm.cost.micro_batch import check_batch_divides
from tinylm.cost.parameters import flops_per_token, has_estimates
from tinylm.cost.plan import training_steps
from tinylm.data import datasets
from tinylm.data.datasets import Dataset
from tinylm.data.prepare import PreparedData, open_prepared, prepare
from tinylm.errors import InputError, did_you_mean
from tinylm.evaluation.metrics import LOSS, METRICS, PERPLEXITY, Metric, Metrics, perplexity_of
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.model import lora, registry
from tinylm.model.base import Model
from tinylm.model.init_from import check_compatible, load_pretrained
from tinylm.optim import groups
from tinylm.optim.groups import Optimizers
from tinylm.processes import Processes, join_processes, lost_peer_error, threads_per_process
from tinylm.recipe import Recipe, changes
from tinylm.recipe.schema import FileTokenizer, MuonOptimizer, flattened
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Checkpoint, Run, check_shapes
from tinylm.training import auto_settings, objectives, parallel
from tinylm.training import precision as precisions
from tinylm.training.checkpoint import CheckpointWriter, newest_complete_checkpoint, restore
from tinylm.training.metrics import MetricsFile, Observer, Observers
from tinylm.training.objectives import Heldout, Objective
from tinylm.training.out_of_memory import keep_freed_memory
from tinylm.training.parallel import Parallel
from tinylm.training.precision import Precision
from tinylm.training.run_folder import locked_run_folder, remove_run, write_run
from tinylm.training.signals import StopRequest
from tinylm.training.trainer import Hooks, Poll, Trainer, TrainingSetup

RESUME_SAFE_KEYS = ("name", "training.log_every", "training.parallel", "training.guards.", "checkpoint.", "sampling.")
"""Keys and sections that may change when a run is resumed, because they do not change the trained model."""
RESUME_FIXED_KEYS = ("model.architecture", "objective.name", "data.format")
"""Keys that cannot change when a run is resumed, not even with `allow_change`."""
RESUME_SAFE_KEYS_WITHOUT_DROPOUT = ("training.compile", "training.micro_batch_size")
"""Additional keys that may change if the model has no dropout. They change dropout masks; other effects are only rounding."""
AUTOMATIC = ("precision", "micro_batch_size", "compile")
"""Keys of `training` that may be `auto`. A resumed run keeps the values that were chosen when it started."""

Threads = int | Literal["auto"] | None


@dataclass(frozen=True)
class TrainResult:
    """The result of a run. `train_loss` is in nats per target."""

    run: str
    step: int
    steps: int
    tokens: int
    train_loss: float | None
    metrics: dict[str, float | None]
    """Results of the last held-out evaluation by metric name, primary metric first. None if training stopped before one."""
    best_step: int
    best_value: float | None
    """The primary metric of the best checkpoint."""
    seconds: float
    train_seconds: float
    tokens_per_second: float
    parameters: int
    device: str
    precision: str
    peak_memory_bytes: int | None
    stopped: str
    """`done`, `time` or `signal`."""
    signal_number: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the document that `tinylm train --json` prints. The key of a metric is `val_` plus its name."""
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


@dataclass(frozen=True)
class TrainingJob:
    """The arguments of `train`, resolved: what to train, where, and on which hardware."""

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
    """Seconds after which training stops early."""


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

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes saved with every checkpoint, to detect that the text or tokenizer changed before a resume."""
        return {"data": self.prepared.fingerprint, "tokenizer": self.prepared.tokenizer.fingerprint}

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
    observer: Observer | None = None,
) -> TrainResult:
    """Train the model of `recipe` in the run folder `folder`. Under a launcher such as torchrun, every process makes the same call.

    If the folder already contains a run, `resume` or `overwrite` is required. `resume` continues from its newest complete
    checkpoint. The recipe may then differ from the original one only in keys that do not change the model, and in those listed in
    `allow_change`. `threads` is the number of CPU threads, or `auto` to measure which number is fastest; None uses one per core.
    `workers` is the number of processes that encode the text. After `stop_after` seconds, the run is saved and stopped.

    Raises `InputError` for invalid input and `WorkError` if training fails.
    """
    folder = Path(folder)
    target = devices.resolve(device)
    devices.set_threads(threads if isinstance(threads, int) else threads_per_process())
    with join_processes(target) as processes, ExitStack() as stack:
        target = processes.run_on_all(lambda: processes.device(target))
        callbacks = Callbacks(reporter, observer or Observer()) if processes.is_main else Callbacks(SILENT, Observer())
        processes.run_on_main(lambda: stack.enter_context(locked_run_folder(folder, resume=resume, overwrite=overwrite)))
        resume = resume and (folder / "recipe.yaml").exists()
        job = TrainingJob(recipe, folder, target, resume, overwrite, allow_change, threads, workers, stop_after)
        try:
            return _train(job, callbacks, processes)
        except RuntimeError as error:
            raise (lost_peer_error(error) if processes.world_size > 1 else None) or error from None


def _train(job: TrainingJob, callbacks: Callbacks, processes: Processes) -> TrainResult:
    """Do the work of one process. The run folder must be locked."""
    reporter = callbacks.reporter
    if job.resume:
        job = _merge_recipe(job, processes, reporter)
    pretrained = _open_pretrained(job, processes, reporter)
    data = _prepare_data(job, processes, reporter)
    if job.device.type == "cpu":
        _tune_cpu(job, data, processes, reporter)
    checkpoint = _find_checkpoint(job, data, processes, reporter) if job.resume else None
    network = _build_network(job, data, pretrained, fresh=checkpoint is None, processes=processes, reporter=reporter)
    budget = auto_settings.Budget(data.steps, job.stop_after)
    settings = auto_settings.resolve(
        job.recipe, network, data.dataset, data.objective, budget, reporter, resumed=job.resume, processes=processes
    )
    job = replace(job, recipe=settings.recipe)
    network.compile_loss = settings.recipe.training.compile is True
    components = _build_components(job, network, settings.precision, processes)
    state = None if checkpoint is None else _restore(checkpoint, job, components, reporter)
    _report_parallelism(job, components.parallel, reporter)
    processes.run_on_main(lambda: _write_run_folder(job, data, components, state))
    with _observers(job, int(state["step"]) if state else 0, callbacks.observer, processes) as observer:
        trainer = _build_trainer(job, data, components, observer)
        if state is not None:
            trainer.resume(state)
        trainer.progress.seconds += settings.compile_seconds
        trainer.progress.train_seconds += settings.compile_seconds
        with StopRequest(callbacks.observer.stopping) as request:
            stopped = trainer.train(request, job.stop_after)
    return _result(job, trainer, stopped, request.signal_number)


# The recipe when a run is resumed.


def _merge_recipe(job: TrainingJob, processes: Processes, reporter: Reporter) -> TrainingJob:
    """Check the recipe against the resumed run's recipe, and adapt it to the number of processes."""
    merged = processes.run_on_main(lambda: merge_for_resume(Run.open(job.folder), job.recipe, job.allow_change))
    return replace(job, recipe=processes.run_on_main(lambda: fit_micro_batch(merged, processes.world_size, reporter)))


def merge_for_resume(run: Run, recipe: Recipe, allowed: Sequence[str]) -> Recipe:
    """Return `recipe`, with each `auto` replaced by the value that was chosen when `run` started.

    Raises `InputError` if `recipe` differs from the run's recipe in a key that is neither `allowed` nor safe to change.
    """
    chosen = {
        key: getattr(run.recipe.training, key)
        for key in AUTOMATIC
        if getattr(recipe.training, key) == "auto" and f"training.{key}" not in allowed
    }
    before, optimizer = run.recipe.training.optimizer, recipe.training.optimizer
    if isinstance(before, MuonOptimizer) and isinstance(optimizer, MuonOptimizer) and optimizer.newton_schulz_dtype == "auto":
        chosen["optimizer"] = optimizer.model_copy(update={"newton_schulz_dtype": before.newton_schulz_dtype})
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update=chosen)})
    changed = changes(run.recipe, recipe)
    for key in RESUME_FIXED_KEYS:
        if key in changed:
            before_value, value = changed[key]
            raise InputError(
                f"{key} cannot change from {before_value} to {value} when a run is resumed",
                where=str(run.path),
                hint="choose another folder with --out",
            )
    for key in allowed:
        if not any(_covers(key, name) for name in changed):
            known = flattened(recipe.as_dict())
            problem = "has not changed" if any(_covers(key, name) for name in known) else "is not a key or section of the recipe"
            raise InputError(f"{key} {problem}", where="--allow-change", hint=did_you_mean(key, changed or known))
    safe = RESUME_SAFE_KEYS if recipe.model.uses_dropout else (*RESUME_SAFE_KEYS, *RESUME_SAFE_KEYS_WITHOUT_DROPOUT)
    refused = [
        f"{key}: {old} -> {new}" for key, (old, new) in changed.items() if not any(_covers(name, key) for name in (*allowed, *safe))
    ]
    if refused:
        listed = "\n  ".join(refused)
        raise InputError(
            f"the recipe differs from the one that this run was trained with:\n  {listed}\n"
            "accept a change with --allow-change KEY (or SECTION), or choose another folder with --out",
            where=str(run.path),
        )
    return recipe


def fit_micro_batch(recipe: Recipe, world_size: int, reporter: Reporter) -> Recipe:
    """Adapt the micro-batch size of a resumed recipe to the number of processes, which may have changed.

    The new size divides each process's share of the global batch. Raises `InputError` if a different micro-batch size is needed and
    would change the dropout masks.
    """
    micro, share = recipe.training.micro_batch_size, recipe.training.global_batch_size // world_size
    if micro == "auto" or not share or share % micro == 0 or recipe.training.global_batch_size % world_size:
        return recipe
    fitting = next(size for size in range(micro, 0, -1) if share % size == 0)
    if recipe.model.uses_dropout:
        raise InputError(
            f"{micro} does not divide the {share} sequences of each process, and a different size changes the dropout masks",
            where="training.micro_batch_size",
            hint=f"accept that with --set training.micro_batch_size={fitting} --allow-change training.micro_batch_size",
        )
    reporter.note(f"micro-batch size {fitting} instead of {micro}: each of {world_size} processes computes {share} sequences")
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"micro_batch_size": fitting})})


def _covers(name: str, key: str) -> bool:
    """Whether `name` is the key or a section that contains it."""
    return key == name or key.startswith(name.rstrip(".") + ".")


# Data.


def _prepare_data(job: TrainingJob, processes: Processes, reporter: Reporter) -> TrainingData:
    """Prepare the text and the dataset. Raises `InputError` if the text is too short or the schedule or batch size is invalid."""
    recipe = job.recipe
    processes.run_on_main(lambda: check_batch_divides(recipe, processes.world_size))
    prepared = _prepare_on_every_machine(job, processes, reporter)
    processes.run_on_main(lambda: _check_length(recipe, prepared))
    dataset = datasets.build(recipe.data, prepared.train, recipe.model.context_length, recipe.seed)
    steps = training_steps(recipe.training, recipe.model.context_length, len(prepared.train))
    return TrainingData(prepared, dataset, objectives.build(recipe.objective), steps)


def _prepare_on_every_machine(job: TrainingJob, processes: Processes, reporter: Reporter) -> PreparedData:
    """Encode the text in the main process and memory-map its tokens in all processes.

    A machine that does not share the main process's cache encodes the text itself. Raises `InputError` if its text differs.
    """
    data, tokenizer = job.recipe.data, job.recipe.tokenizer
    if processes.world_size == 1:
        return prepare(data, tokenizer, reporter, job.workers)

    def prepare_on_main() -> tuple[Path, str, str]:
        prepared = prepare(data, tokenizer, reporter, job.workers)
        return prepared.folder, prepared.fingerprint, prepared.tokenizer.backend.to_str()

    folder, fingerprint, tokenizer_json = processes.run_on_main(prepare_on_main)
    missing = processes.local_rank == 0 and not (folder / "heldout.json").exists()
    local_fingerprint = processes.run_on_all(
        lambda: prepare(data, tokenizer, SILENT, job.workers).fingerprint if missing else fingerprint
    )
    if local_fingerprint != fingerprint:
        raise InputError("the text on this machine differs from that of the main process", where="data.train")
    return processes.run_on_all(lambda: open_prepared(folder, fingerprint, tokenizer_json))


def _check_length(recipe: Recipe, prepared: PreparedData) -> None:
    """Raise `InputError` if the text is shorter than one sequence, or if training is shorter than its warmup."""
    context, warmup = recipe.model.context_length, recipe.training.schedule.warmup
    datasets.build(recipe.data, prepared.train, context, recipe.seed)  # raises if the text is too short
    steps = training_steps(recipe.training, context, len(prepared.train))
    if steps is not None and warmup >= 1 and warmup > steps:
        raise InputError(f"{warmup} warmup steps exceed the {steps} training steps", where="training.schedule.warmup")


def _tune_cpu(job: TrainingJob, data: TrainingData, processes: Processes, reporter: Reporter) -> None:
    keep_freed_memory()
    if job.threads == "auto":
        fastest = processes.run_on_main(
            lambda: auto_settings.use_fastest_threads(
                job.recipe, data.vocab_size, data.dataset, data.objective, processes.world_size
            )
        )
        devices.set_threads(fastest)
        reporter.note(f"fastest number of CPU threads for this model: {fastest}")


# The network and its initial weights.


def _open_pretrained(job: TrainingJob, processes: Processes, reporter: Reporter) -> Run | None:
    """Open the run of `model.init_from`. Returns None if that key is not set, or if the resumed run has a checkpoint.

    Raises `InputError` if the path is not a run, or if its network is not compatible.
    """
    if job.resume and processes.run_on_main(lambda: bool(Run(job.folder).checkpoints())):
        return None

    def open_run() -> Run | None:
        section = job.recipe.model.pretrained
        if section is None:
            return None
        run = Run.open(Path(section.run).expanduser())
        check_compatible(job.recipe.model, run.recipe.model)
        reporter.note(f"initializing from {run.path} {run.checkpoint().name}")
        return run

    return processes.run_on_main(open_run)


def _build_network(
    job: TrainingJob, data: TrainingData, pretrained: Run | None, *, fresh: bool, processes: Processes, reporter: Reporter
) -> Model:
    """Build the network with initial weights and move it to the job's device. `fresh` means that no checkpoint will be restored."""
    network = processes.run_on_all(lambda: _initialize_network(job.recipe, data.prepared, pretrained, reporter, fresh=fresh))
    network = network.to(job.device)
    network.recompute = job.recipe.training.activation_checkpointing
    network.compile_loss = job.recipe.training.compile is not False
    return network


def _initialize_network(
    recipe: Recipe, prepared: PreparedData, pretrained: Run | None, reporter: Reporter, *, fresh: bool
) -> Model:
    """Build a network with random or pretrained weights, and with LoRA matrices if the recipe has `training.lora`."""
    tokenizer = prepared.tokenizer
    network = registry.build(recipe.model, tokenizer.vocab_size, recipe.seed)
    if pretrained is not None:
        same_tokenizer = pretrained.tokenizer.fingerprint == tokenizer.fingerprint
        source = pretrained.network(pretrained.checkpoint(), torch.device("cpu"))
        reinitialized = load_pretrained(network, source, same_tokenizer=same_tokenizer)
        if reinitialized:
            reporter.note(f"initialized at random: {', '.join(reinitialized)}")
    if fresh and recipe.model.pretrained_embeddings is not None:  # a checkpoint would replace them
        _load_embeddings(network, prepared, reporter)
    if recipe.training.lora is not None:
        lora.attach(network, recipe.training.lora, recipe.seed)
        trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        reporter.note(f"LoRA: training {trained:,} of {network.parameter_count():,} parameters")
    return network


def _load_embeddings(network: Model, prepared: PreparedData, reporter: Reporter) -> None:
    """Initialize the embedding from the vectors of `model.init_embeddings`."""
    from tinylm.embedding import formats
    from tinylm.embedding.init_from_vectors import initialize_from_vectors

    source, embedding = str(network.model.pretrained_embeddings), network.input_embedding()
    initialized = initialize_from_vectors(embedding, formats.read(Path(source)), prepared.tokenizer)
    averaged = " (averaged over the words that contain them)" if initialized.from_words else ""
    reporter.note(
        f"embeddings: {initialized.tokens:,} of {initialized.vocab_size:,} tokens initialized from {source}{averaged}, "
        f"{'trained further' if embedding.weight.requires_grad else 'frozen'}"
    )


# Parallelism, optimizers and checkpoints.


def _build_components(job: TrainingJob, network: Model, precision: Precision, processes: Processes) -> Components:
    strategy = parallel.resolve(job.recipe.training.parallel, job.recipe, network.vocab_size, job.device, processes)
    parallelized = Parallel(network, strategy, processes, precision)
    optimizers = groups.build(job.recipe.training.optimizer, network, parallelized.mesh)
    checkpoints = CheckpointWriter(job.folder, job.recipe.checkpoint.keep, processes)
    return Components(parallelized, optimizers, precision, checkpoints)


def _report_parallelism(job: TrainingJob, parallelized: Parallel, reporter: Reporter) -> None:
    training, world_size = job.recipe.training, parallelized.processes.world_size
    if world_size > 1:
        reporter.note(
            f"{world_size} processes ({parallelized.name}), each with micro-batches of {training.micro_batch_size} sequences"
        )
    elif training.parallel != "auto":
        reporter.note(f"training.parallel: {training.parallel} has no effect with a single process")


def _find_checkpoint(job: TrainingJob, data: TrainingData, processes: Processes, reporter: Reporter) -> Checkpoint | None:
    """Find the newest complete checkpoint, if there is one. Raises `InputError` if it does not match the recipe or the text."""

    def find() -> Checkpoint | None:
        run = Run(job.folder)
        if not run.checkpoints():
            reporter.note("no checkpoint yet: starting at step 0")
            return None
        checkpoint = newest_complete_checkpoint(run, reporter)
        saved, current = checkpoint.state["fingerprints"], data.fingerprints
        if saved != current:
            from_file = isinstance(run.recipe.tokenizer, FileTokenizer)  # otherwise the tokenizer changes with the text
            changed = "tokenizer" if from_file and saved["tokenizer"] != current["tokenizer"] else "text"
            problem = f"the {changed} is not the one that this run was trained on"
            raise InputError(problem, where=str(run.path), hint="train from scratch in another folder with --out")
        check_shapes(job.recipe, data.vocab_size, checkpoint)
        return checkpoint

    return processes.run_on_main(find)


def _restore(checkpoint: Checkpoint, job: TrainingJob, components: Components, reporter: Reporter) -> dict[str, Any]:
    """Restore the weights and optimizer state, discard later checkpoints, and return the checkpoint's state."""
    before, name = Run(job.folder).recipe.training.optimizer.name, job.recipe.training.optimizer.name
    if before != name:
        reporter.warn(f"the optimizer changed from {before} to {name}; its state is reset")
    parallelized = components.parallel
    state = restore(checkpoint, parallelized.network, components.optimizers, parallelized.processes, load_optimizer=before == name)
    if not components.checkpoints.discard_after(checkpoint, state["best_step"]):
        state.update(best_step=0)
    reporter.note(f"resuming after step {checkpoint.step}")
    return state


def _write_run_folder(job: TrainingJob, data: TrainingData, components: Components, state: dict[str, Any] | None) -> None:
    """Write all files except checkpoints and metrics. `state` is the state of the resumed checkpoint, if there is one."""
    if job.overwrite:
        remove_run(job.folder)
    components.checkpoints.prepare()
    parallelized = components.parallel
    facts = {
        "device": devices.describe(job.device),
        "processes": parallelized.processes.world_size,
        "parallel": parallelized.name,
        "mfu_relative_to": precisions.peak_source(components.precision),
    }
    write_run(job.folder, job.recipe, data.prepared, {**facts, "resumed_step": state["step"]} if state else facts)


# The trainer.


@contextmanager
def _observers(job: TrainingJob, resumed_step: int, observer: Observer, processes: Processes) -> Iterator[Observer]:
    """Yield the user's observer. In the main process, every event is first written to the log files of the run folder."""
    if not processes.is_main:
        yield observer
        return
    continue_on_failure = job.recipe.checkpoint.on_failure == "continue"
    metrics = MetricsFile(job.folder, resumed_step, _note_once(observer) if continue_on_failure else None)
    try:
        observer.resumed(*metrics.history())
        yield Observers([metrics, observer])
    finally:
        metrics.close()


def _note_once(observer: Observer) -> Callable[[str], None]:
    """Return a function that forwards its first message to the observer and ignores later messages."""
    noted = False

    def note(problem: str) -> None:
        nonlocal noted
        if not noted:
            observer.note(f"{problem}; training continues (checkpoint.on_failure: continue)")
        noted = True

    return note


def _build_trainer(job: TrainingJob, data: TrainingData, components: Components, observer: Observer) -> Trainer:
    precision, processes = components.precision, components.parallel.processes
    model, flops = job.recipe.model, None
    if has_estimates(model):
        flops = flops_per_token(model, data.vocab_size, job.recipe.training.lora)
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
    return Trainer(setup, _hooks(job, data, components.parallel, observer))


def _hooks(job: TrainingJob, data: TrainingData, parallelized: Parallel, observer: Observer) -> Hooks:
    recipe, prepared = job.recipe, data.prepared

    def evaluate_heldout(poll: Poll) -> Metrics:
        heldout = Heldout(prepared, recipe.evaluation, parallelized.processes, poll)
        return data.objective.evaluate(parallelized.network, heldout)

    def generate_samples() -> Iterator[tuple[str, str]]:
        section = recipe.sampling
        options = SamplingOptions(section.max_new_tokens, section.temperature, section.top_k)
        with parallelized.full_network() as network:
            if network is not None:
                for prompt in section.prompts:
                    yield prompt, generate(network, prepared.tokenizer, prompt, options, seed=recipe.seed)[0].text

    return Hooks(evaluate_heldout, generate_samples, prepared.tokenizer.decode, observer)


def _result(job: TrainingJob, trainer: Trainer, stopped: str, signal_number: int | None) -> TrainResult:
    progress, setup = trainer.progress, trainer.setup
    return TrainResult(
        run=str(job.folder),
        step=progress.step,
        steps=setup.steps if setup.steps is not None else progress.step,
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
