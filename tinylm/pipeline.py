"""Train a model from a recipe and save it in a run folder. `tinylm train` and notebooks call the entry point `train`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from tinylm import device as devices
from tinylm.cost import step_time
from tinylm.cost.micro_batch import check_batch_divides
from tinylm.cost.parameters import estimated, flops_per_token, has_estimates
from tinylm.cost.plan import training_steps
from tinylm.data import formats, training_text
from tinylm.data.chat import PreparedChat
from tinylm.data.datasets import Dataset
from tinylm.data.prepare import PreparedText
from tinylm.data.prepared import PreparedData
from tinylm.data.training_text import TrainingText
from tinylm.errors import InputError, did_you_mean
from tinylm.evaluation.metrics import LOSS, METRICS, PERPLEXITY, Metric, Metrics, perplexity_of
from tinylm.model import lora, registry
from tinylm.model.base import Model
from tinylm.model.foreign_code import foreign_code
from tinylm.model.init_from import check_compatible, load_pretrained
from tinylm.optim import groups
from tinylm.optim.groups import Optimizers
from tinylm.processes import Processes, join_processes, lost_peer_error, threads_per_process
from tinylm.recipe import Recipe, changes
from tinylm.recipe.chat import ChatSection
from tinylm.recipe.effects import covers, safe_keys
from tinylm.recipe.schema import FileTokenizer, MuonOptimizer, flattened, require_text
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Checkpoint, Run, check_shapes, load_weights
from tinylm.samplers import samples
from tinylm.tokenizer.vocab_editing import extension
from tinylm.training import auto_settings, objectives, parallel
from tinylm.training import precision as precisions
from tinylm.training.checkpoint import CheckpointWriter, newest_complete_checkpoint, restore
from tinylm.training.counting import CountingTrainer, CountState
from tinylm.training.metrics import MetricsFile, Observer, Observers
from tinylm.training.objectives import Heldout, Objective
from tinylm.training.out_of_memory import check_training_state, keep_freed_memory
from tinylm.training.parallel import Parallel
from tinylm.training.precision import Precision
from tinylm.training.progress import check_state
from tinylm.training.resuming import check_remaining, lr_change
from tinylm.training.run_folder import locked_run_folder, remove_run, write_run
from tinylm.training.signals import StopRequest
from tinylm.training.speed import BUSY_NOTE, SpeedMonitor
from tinylm.training.tracking import Tracker, trackers
from tinylm.training.trainer import Hooks, Poll, Trainer, TrainingSetup
from tinylm.wait_policy import WAIT_POLICY

RESUME_FIXED_KEYS = ("model.architecture", "objective.name", "data.format")
"""Keys that cannot change when a run is resumed, not even with `allow_change`."""
AUTOMATIC = ("precision", "micro_batch_size", "compile")
"""Keys of `training` that can be `auto`. A resumed run keeps the values that were chosen when it started."""

Threads = int | Literal["auto"] | None


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
    """Why training ended: `done`, `time` (`stop_after`), `signal` or `callback` (`Observer.request_stop`)."""
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

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes saved with every checkpoint. They reveal a changed text or tokenizer when the run is resumed."""
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
    """Run training in one process. The main process must hold the lock on the run folder."""
    reporter = callbacks.reporter
    if job.resume:
        job = _merge_recipe(job, processes, reporter)
    tracked: list[Tracker] = []
    processes.run_on_main(lambda: tracked.extend(trackers(job.recipe, job.folder, callbacks.observer.note)))
    pretrained = _open_pretrained(job, processes, reporter)
    data = _prepare_data(job, processes, reporter)
    job = replace(job, recipe=processes.run_on_all(lambda: data.prepared.fill_in(job.recipe)))
    training_texts = processes.run_on_main(lambda: _training_texts(job, data.prepared, pretrained, reporter))
    if job.device.type == "cpu":
        _tune_cpu(job, data, processes, reporter)
    checkpoint = _find_checkpoint(job, data, processes, reporter) if job.resume else None
    network = _build_network(job, data, pretrained, fresh=checkpoint is None, processes=processes, reporter=reporter)
    settings = _resolve_settings(job, network, data, processes, reporter)
    job = replace(job, recipe=settings.recipe)
    network.compile_loss = settings.recipe.training.compile is True
    foreign = foreign_code(network)  # before parallelization, which changes the classes of modules
    components = _build_components(job, network, settings.precision, processes)
    state = None if checkpoint is None else _restore(checkpoint, job, components, reporter)
    if state is not None:
        processes.run_on_main(lambda: _announce_lr_change(job, data, state, reporter))
    _report_parallelism(job, components.parallel, reporter)
    processes.run_on_main(lambda: _write_run_folder(job, data, components, state, foreign, training_texts))
    if state is None and data.objective.metrics[0] is LOSS:
        vocab_size = data.vocab_size
        reporter.note(f"uniform guessing among {vocab_size:,} tokens has a loss of {math.log(vocab_size):.2f} (ln {vocab_size:,})")
    monitors = [*tracked, *_speed_monitors(job, data, callbacks, processes)]
    with _observers(job, int(state["step"]) if state else 0, callbacks.observer, monitors, processes) as observer:
        trainer = _build_trainer(job, data, components, observer)
        if state is not None:
            trainer.resume(state)
        trainer.progress.seconds += settings.compile_seconds
        trainer.progress.train_seconds += settings.compile_seconds
        with StopRequest(callbacks.observer.stopping) as request:
            stopped = trainer.train(request, job.stop_after)
    return _result(job, data, trainer, stopped, request.signal_number)


def _resolve_settings(
    job: TrainingJob, network: Model, data: TrainingData, processes: Processes, reporter: Reporter
) -> auto_settings.ResolvedSettings:
    """Choose a value for every `auto` setting. Models that learn by counting do not use these settings."""
    if network.model.learns_by_counting:
        return auto_settings.ResolvedSettings(job.recipe, Precision("fp32", torch.device("cpu")), 0.0)
    budget = auto_settings.Budget(data.steps, job.stop_after)
    return auto_settings.resolve(
        job.recipe, network, data.dataset, data.objective, budget, reporter, resumed=job.resume, processes=processes
    )


# The recipe when a run is resumed.


def _merge_recipe(job: TrainingJob, processes: Processes, reporter: Reporter) -> TrainingJob:
    """Check the recipe against the resumed run's recipe, and adapt it to the number of processes."""
    merged = processes.run_on_main(lambda: merge_for_resume(Run.open(job.folder), job.recipe, job.allow_change))
    return replace(job, recipe=processes.run_on_main(lambda: fit_micro_batch(merged, processes.world_size, reporter)))


def merge_for_resume(run: Run, recipe: Recipe, allowed: Sequence[str]) -> Recipe:
    """Return `recipe`, with each `auto` replaced with the value that was chosen when `run` started.

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
    recipe = _keep_filled_in(run.recipe, recipe)
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
        if not any(covers(key, name) for name in changed):
            known = flattened(recipe.as_dict())
            problem = "has not changed" if any(covers(key, name) for name in known) else "is not a key or section of the recipe"
            raise InputError(f"{key} {problem}", where="--allow-change", hint=did_you_mean(key, changed or known))
    if recipe.training.steps is not None and (checkpoints := run.checkpoints()):
        check_remaining(run, recipe, recipe.training.steps, checkpoints[-1].step, 0.0)
    safe = safe_keys(recipe)
    rejected = [
        f"{key}: {old} -> {new}" for key, (old, new) in changed.items() if not any(covers(name, key) for name in (*allowed, *safe))
    ]
    if rejected:
        listed = "\n  ".join(rejected)
        raise InputError(
            f"the recipe differs from the one that this run was trained with:\n  {listed}\n"
            "accept a change with --allow-change KEY (or SECTION), or choose another folder with --out",
            where=str(run.path),
        )
    return recipe


def _keep_filled_in(before: Recipe, recipe: Recipe) -> Recipe:
    """Keep the objective keys that were filled in from the resumed run's data, unless `recipe` sets them."""
    objective = recipe.objective
    if type(objective) is not type(before.objective):
        return recipe
    defaults = {key: type(objective).model_fields[key].default for key in objective.filled_in}
    kept = {key: getattr(before.objective, key) for key, default in defaults.items() if getattr(objective, key) == default}
    return recipe.model_copy(update={"objective": objective.model_copy(update=kept)}) if kept else recipe


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


# Data.


def _prepare_data(job: TrainingJob, processes: Processes, reporter: Reporter) -> TrainingData:
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


def _training_texts(
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


def _tune_cpu(job: TrainingJob, data: TrainingData, processes: Processes, reporter: Reporter) -> None:
    keep_freed_memory()
    if job.threads == "auto" and not job.recipe.model.learns_by_counting:
        fastest = processes.run_on_main(
            lambda: auto_settings.use_fastest_threads(
                job.recipe, data.vocab_size, data.dataset, data.objective, processes.world_size
            )
        )
        devices.set_threads(fastest)
        reporter.note(f"fastest number of CPU threads for this model: {fastest}")


# The network and its initial weights.


def _open_pretrained(job: TrainingJob, processes: Processes, reporter: Reporter) -> Run | None:
    """Open the run that `model.init_from` refers to. Returns None if the key is not set, or if the resumed run has a checkpoint.

    Raises `InputError` if the path is not a run or its network is not compatible.
    """
    if job.resume and processes.run_on_main(lambda: bool(Run(job.folder).checkpoints())):
        return None

    def open_run() -> Run | None:
        section = job.recipe.model.pretrained
        if section is None:
            return None
        run = Run.open(os.path.expanduser(section.run))
        check_compatible(job.recipe.model, run.recipe.model)
        reporter.note(f"initializing from {run.path} {run.checkpoint().name}")
        return run

    return processes.run_on_main(open_run)


def _build_network(
    job: TrainingJob, data: TrainingData, pretrained: Run | None, *, fresh: bool, processes: Processes, reporter: Reporter
) -> Model:
    """Build the network with initial weights and move it to the job's device. `fresh` means that no checkpoint will be restored."""
    check_training_state(job.recipe, data.prepared.tokenizer.vocab_size, job.device, processes.world_size)
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
    network = registry.build(recipe.model, tokenizer.vocab_size, recipe.seed, objective=recipe.objective)
    if pretrained is not None:
        same_tokenizer = pretrained.tokenizer.fingerprint == tokenizer.fingerprint
        source = pretrained.network(pretrained.checkpoint(), torch.device("cpu"))
        extended = None if same_tokenizer else extension(pretrained.tokenizer, tokenizer)
        sources = None if extended is None else extended.sources
        reinitialized = load_pretrained(network, source, same_tokenizer=same_tokenizer, sources=sources)
        if sources is not None:
            added = tokenizer.vocab_size - pretrained.tokenizer.vocab_size
            reporter.note(f"{added} control tokens added; each starts with the mean embedding of the tokens in its name")
        if reinitialized:
            reporter.note(f"initialized at random: {', '.join(reinitialized)}")
    if fresh and recipe.model.pretrained_embeddings is not None:  # a checkpoint would replace them
        _load_embeddings(network, prepared, reporter)
    if recipe.training.lora is not None:
        lora.attach(network, recipe.training.lora, recipe.seed)
        trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        if isinstance(prepared, PreparedChat):
            trained += lora.train_rows(network, prepared.encoder.added_ids)
        reporter.note(f"LoRA: training {trained:,} of {network.parameter_count():,} parameters")
    return network


def _load_embeddings(network: Model, prepared: PreparedData, reporter: Reporter) -> None:
    """Initialize the embedding from the vectors in `model.init_embeddings`."""
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
    checkpoints = CheckpointWriter(job.folder, job.recipe.checkpoint.keep, processes)
    if network.model.learns_by_counting:
        state = cast(Optimizers, CountState(network.vocab_size, cast(Any, network.model).order))
        return Components(Parallel(network, "none", processes, precision), state, precision, checkpoints)
    strategy = parallel.resolve(job.recipe.training.parallel, job.recipe, network.vocab_size, job.device, processes)
    if strategy == "fsdp" and lora.has_trained_rows(network):
        raise InputError("fsdp does not support LoRA on conversations", where="training.parallel", hint="use ddp")
    parallelized = Parallel(network, strategy, processes, precision)
    optimizers = groups.build(job.recipe.training.optimizer, network, parallelized.mesh)
    return Components(parallelized, optimizers, precision, checkpoints)


def _report_parallelism(job: TrainingJob, parallelized: Parallel, reporter: Reporter) -> None:
    training, world_size = job.recipe.training, parallelized.processes.world_size
    if world_size > 1 and parallelized.network.model.learns_by_counting:
        reporter.note(f"{world_size} processes; each counts the whole text")
    elif world_size > 1:
        reporter.note(
            f"{world_size} processes ({parallelized.name}), each with micro-batches of {training.micro_batch_size} sequences"
        )
    elif training.parallel != "auto":
        reporter.note(f"training.parallel: {training.parallel} has no effect with a single process")


def _find_checkpoint(job: TrainingJob, data: TrainingData, processes: Processes, reporter: Reporter) -> Checkpoint | None:
    """Return the newest complete checkpoint, or None. Raises `InputError` if it does not match the recipe or the text."""

    def find() -> Checkpoint | None:
        run = Run(job.folder)
        if not run.checkpoints():
            reporter.note("no checkpoint yet; starting from step 0")
            return None
        checkpoint = newest_complete_checkpoint(run, reporter)
        check_state(checkpoint.state, str(checkpoint.path))
        saved, current = checkpoint.state["fingerprints"], data.fingerprints
        if saved != current:
            from_file = isinstance(run.recipe.tokenizer, FileTokenizer)  # otherwise the tokenizer changes with the text
            changed = "tokenizer" if from_file and saved["tokenizer"] != current["tokenizer"] else "text"
            problem = f"the {changed} is not the one that this run was trained on"
            raise InputError(problem, where=str(run.path), hint="train from scratch in another folder with --out")
        check_shapes(job.recipe, data.vocab_size, checkpoint)
        same_optimizer = run.recipe.training.optimizer.name == job.recipe.training.optimizer.name
        if same_optimizer and not checkpoint.has_optimizer_state:
            hint = "initialize a new run with its weights: --set model.init_from=RUN --out FOLDER"
            raise InputError("has no optimizer state, so it cannot be resumed", where=str(checkpoint.path), hint=hint)
        check_remaining(run, job.recipe, data.steps, checkpoint.step, checkpoint.state["seconds"])
        return checkpoint

    return processes.run_on_main(find)


def _restore(checkpoint: Checkpoint, job: TrainingJob, components: Components, reporter: Reporter) -> dict[str, Any]:
    """Restore the weights and optimizer state, discard later checkpoints, and return the checkpoint's state."""
    before, name = Run(job.folder).recipe.training.optimizer.name, job.recipe.training.optimizer.name
    if before != name:
        reporter.warn(f"the optimizer changed from {before} to {name}; its state is reset")
    parallelized = components.parallel
    if parallelized.network.model.learns_by_counting:  # its size depends on the text
        load_weights(parallelized.network, checkpoint)
    state = restore(checkpoint, parallelized.network, components.optimizers, parallelized.processes, load_optimizer=before == name)
    if not components.checkpoints.discard_after(checkpoint, state["best_step"]):
        state.update(best_step=0)
    reporter.note(f"resuming after step {checkpoint.step}")
    return state


def _announce_lr_change(job: TrainingJob, data: TrainingData, state: dict[str, Any], reporter: Reporter) -> None:
    """Warn if the learning rate jumps because the training length, the schedule or the learning rate has changed."""
    before, step = Run(job.folder).recipe, int(state["step"])

    def fraction(recipe: Recipe) -> float:
        steps = training_steps(recipe.training, data.dataset.tokens_per_example, data.dataset.examples_per_epoch)
        return step / steps if steps is not None else float(state["seconds"]) / (60 * (recipe.training.minutes or 1))

    change = lr_change(before, job.recipe, (fraction(before), fraction(job.recipe)), step)
    if change is not None:
        reporter.warn(change)


def _write_run_folder(
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
    if state:
        facts["resumed_step"] = state["step"]
        training_texts = None  # written when the run started
    write_run(job.folder, job.recipe, data.prepared, facts, training_texts)


# The trainer.


@contextmanager
def _observers(
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
    try:
        history = metrics.history()
        for member in (observer, *monitors):
            member.resumed(*history)
        yield Observers([metrics, observer, *monitors])
    finally:
        metrics.close()
        for member in monitors:
            member.close()


def _speed_monitors(job: TrainingJob, data: TrainingData, callbacks: Callbacks, processes: Processes) -> list[Observer]:
    """Return a speed monitor if a single process trains on the CPU. Reports a note if the machine is busy."""
    if job.device.type != "cpu" or processes.world_size > 1:
        return []
    if WAIT_POLICY.current == "sleep":
        callbacks.reporter.note(f"{BUSY_NOTE}, so idle threads sleep instead of spinning")

    def tokens_per_second() -> float | None:
        if not has_estimates(job.recipe.model):
            return None
        step = step_time.estimate_on_cpu(job.recipe, data.vocab_size, data.steps, None)
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


def _build_trainer(job: TrainingJob, data: TrainingData, components: Components, observer: Observer) -> Trainer:
    precision, processes = components.precision, components.parallel.processes
    flops = None
    if has_estimates(job.recipe.model):
        flops = flops_per_token(estimated(job.recipe.model), data.vocab_size, job.recipe.training.lora)
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
