"""The whole way: a recipe and a folder in, a trained and measured run out. What `tinylm train` does, callable from a notebook."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tinylm import device as devices
from tinylm.cost import plan as planning
from tinylm.data.batches import Batches
from tinylm.data.prepare import Prepared, prepare, reopened
from tinylm.errors import InputError, did_you_mean
from tinylm.evaluation.perplexity import Perplexity, evaluate
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.model import lora
from tinylm.model.init_from import check_parts, load_pretrained
from tinylm.model.transformer import Transformer
from tinylm.optim import groups
from tinylm.processes import Processes, joined, lost_peer, threads_of_each
from tinylm.recipe import Recipe, changes
from tinylm.recipe.schema import FileTokenizer, MuonOptimizer, flattened
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Checkpoint, Run, check_shapes
from tinylm.training import automatic, parallel
from tinylm.training import precision as precisions
from tinylm.training.checkpoint import CheckpointWriter, newest_whole, restore
from tinylm.training.metrics import MetricsFile, Observer, Observers
from tinylm.training.out_of_memory import keep_freed_memory
from tinylm.training.parallel import Parallel
from tinylm.training.run_folder import claimed, remove_run, write_run
from tinylm.training.signals import StopRequest
from tinylm.training.trainer import Poll, Trainer

RESUME_SAFE_KEYS = ("name", "training.log_every", "training.parallel", "training.guards.", "checkpoint.", "sampling.")
"""Keys (or sections) that may change on resuming: they do not change the model."""
RESUME_SAFE_KEYS_WITHOUT_DROPOUT = ("training.compile", "training.micro_batch_size")
"""They change a model by rounding, but dropout altogether: the micro-batch and the compiler decide what is drawn."""
AUTOMATIC = ("precision", "micro_batch_size", "compile")
"""Keys of `training` whose `auto` is decided once: a resumed run keeps what was decided."""


@dataclass(frozen=True)
class TrainResult:
    """The names are the keys of `tinylm train --json`; losses in nats per token."""

    run: str
    step: int
    steps: int
    tokens: int
    train_loss: float | None
    val_loss: float | None
    val_perplexity: float | None
    val_bits_per_byte: float | None
    best_step: int
    best_val_loss: float | None
    seconds: float
    train_seconds: float
    tokens_per_second: float
    parameters: int
    device: str
    precision: str
    peak_memory_bytes: int | None
    stopped: str
    signal_number: int | None = None


def train(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_change: Sequence[str] = (),
    device: str = "auto",
    threads: int | Literal["auto"] | None = None,
    workers: int = 1,
    stop_after: float | None = None,
    reporter: Reporter = SILENT,
    observer: Observer | None = None,
) -> TrainResult:
    """Train `recipe` into the run folder `folder`; every process of a launcher such as torchrun calls it alike.

    A folder that is not empty needs `resume` (go on from its newest whole checkpoint; only keys and sections in `allow_change`
    and harmless ones may differ) or `overwrite` (begin anew). `threads` on a CPU: how many, or `auto` for the fastest; None: one
    per core. `workers`: processes that encode the text. `stop_after` seconds ends early, saved. Raises `InputError` for what the
    user can mend and `WorkError` when the training fails.
    """
    folder = Path(folder)
    target = devices.resolve(device)
    devices.set_threads(threads if isinstance(threads, int) else threads_of_each())
    with joined(target) as processes, ExitStack() as stack:
        target = processes.run_on_all(lambda: processes.device(target))
        if processes.count > 1:
            reporter, observer = (reporter, observer) if processes.main else (SILENT, None)
        processes.run_on_main(lambda: stack.enter_context(claimed(folder, resume=resume, overwrite=overwrite)))
        try:
            return _train(
                recipe,
                folder,
                target,
                processes,
                resume=resume and (folder / "recipe.yaml").exists(),
                overwrite=overwrite,
                allow_change=allow_change,
                threads=threads,
                workers=workers,
                stop_after=stop_after,
                reporter=reporter,
                observer=observer or Observer(),
            )
        except RuntimeError as error:
            raise (lost_peer(error) if processes.count > 1 else None) or error from None


def _train(
    recipe: Recipe,
    folder: Path,
    target: torch.device,
    processes: Processes,
    *,
    resume: bool,
    overwrite: bool,
    allow_change: Sequence[str],
    threads: int | Literal["auto"] | None,
    workers: int,
    stop_after: float | None,
    reporter: Reporter,
    observer: Observer,
) -> TrainResult:
    """What every process of a training does, once the folder is theirs."""
    if resume:
        recipe = processes.run_on_main(lambda: merge_for_resume(Run.open(folder), recipe, allow_change, reporter))
        recipe = processes.run_on_main(lambda: fit_micro_batch(recipe, processes.count, reporter))
    begun = resume and processes.run_on_main(lambda: bool(Run(folder).checkpoints()))
    source = None if begun else processes.run_on_main(lambda: _source(recipe, reporter))
    processes.run_on_main(lambda: planning.split_over(recipe, processes.count))
    prepared = _prepared(recipe, processes, reporter, workers)
    processes.run_on_main(lambda: _check_length(recipe, prepared))
    batches = Batches(prepared.train.tokens, recipe.model.context_length, recipe.seed)
    steps = planning.training_steps(recipe.training, recipe.model.context_length, len(prepared.train))
    if target.type == "cpu":
        keep_freed_memory()
        if threads == "auto":
            chosen = processes.run_on_main(
                lambda: automatic.use_fastest_threads(recipe, prepared.tokenizer.vocab_size, batches, processes.count)
            )
            devices.set_threads(chosen)
            reporter.note(f"{chosen} CPU threads are fastest for this model")
    fingerprints = {"data": prepared.fingerprint, "tokenizer": prepared.tokenizer.fingerprint}
    start = processes.run_on_main(lambda: _newest(Run(folder), recipe, prepared, fingerprints, reporter)) if resume else None
    network = processes.run_on_all(lambda: _network(recipe, source, prepared, reporter, fresh=start is None)).to(target)
    network.recompute = recipe.training.activation_checkpointing
    decided = automatic.decide(recipe, network, batches, steps, reporter, stop_after, resumed=resume, processes=processes)
    recipe, precision = decided.recipe, decided.precision
    together = parallel.resolve(recipe.training.parallel, recipe, network.vocab_size, target, processes)
    shared = Parallel(network, together, processes, precision)
    optimizers = groups.build(recipe.training.optimizer, network, network.stacked_matrices(), shared.mesh)
    checkpoints = CheckpointWriter(folder, recipe.checkpoint.keep, processes)
    state = None
    if start is not None:
        state = _restored(start, Run(folder), recipe, network, optimizers, checkpoints, processes, reporter)
    if processes.count > 1:
        reporter.note(f"{processes.count} processes, {together}, {recipe.training.micro_batch_size} sequences at a time in each")
    elif recipe.training.parallel != "auto":
        reporter.note(f"one process: there is nothing for training.parallel: {recipe.training.parallel} to spread")

    def write_folder() -> None:
        if overwrite:
            remove_run(folder)
        checkpoints.prepare()
        facts = {"device": devices.describe(target), "processes": processes.count, "parallel": together}
        write_run(folder, recipe, prepared, {**facts, "resumed_step": state["step"]} if state else facts)

    processes.run_on_main(write_folder)
    observers = [observer]
    if processes.main:
        going_on = recipe.checkpoint.on_failure == "continue"
        metrics = MetricsFile(folder, int(state["step"]) if state else 0, _told_once(observer) if going_on else None)
        observer.earlier(*metrics.history())
        observers.insert(0, metrics)
    lengths = prepared.tokenizer.token_byte_lengths

    def measure(network: Transformer, poll: Poll) -> Perplexity:
        return evaluate(
            network,
            prepared.heldout,
            lengths,
            context=recipe.model.context_length,
            stride=recipe.evaluation.stride,
            max_tokens=recipe.evaluation.max_tokens,
            device=target,
            bootstrap=False,
            share=processes,
            advance=poll,
        )

    def write(network: Transformer, prompt: str) -> str:
        section = recipe.sampling
        options = SamplingOptions(section.max_new_tokens, section.temperature, section.top_k)
        return generate(network, prepared.tokenizer, prompt, options, seed=recipe.seed)[0].text

    trainer = Trainer(
        recipe,
        shared,
        optimizers,
        batches,
        steps=steps,
        micro_batch_size=int(recipe.training.micro_batch_size),
        precision=precision,
        flops_per_token=planning.flops_per_token(recipe.model, prepared.tokenizer.vocab_size, recipe.training.lora),
        peak_flops=processes.run_on_main(lambda: precisions.matmul_flops(precision)),
        checkpoints=checkpoints,
        fingerprints=fingerprints,
        evaluate=measure,
        write=write,
        read=prepared.tokenizer.decode,
        observer=Observers(observers),
    )
    if state is not None:
        trainer.resume(state)
    trainer.progress.seconds += decided.start_up_seconds
    trainer.progress.train_seconds += decided.start_up_seconds
    try:
        with StopRequest(observer.stopping) as request:
            observer.phase("first step")
            stopped = trainer.train(request, stop_after)
    finally:
        if processes.main:
            metrics.close()
    return _result(folder, trainer, stopped, request.signal_number, target)


def _source(recipe: Recipe, reporter: Reporter) -> Run | None:
    """The run of `model.init_from`. Raises `InputError` when it is none, or its model is made of other parts."""
    given = recipe.model.init_from
    if given is None:
        return None
    source = Run.open(Path(given.run).expanduser())
    check_parts(recipe.model, source.recipe.model)
    reporter.note(f"starting from {source.path} {source.checkpoint().name}")
    return source


def _network(recipe: Recipe, source: Run | None, prepared: Prepared, reporter: Reporter, *, fresh: bool) -> Transformer:
    """What is trained: from chance, or from the weights of `source`; with low-rank additions where the recipe says so.

    Given embeddings are only read for a `fresh` training: a checkpoint has its own.
    """
    tokenizer = prepared.tokenizer
    network = Transformer(recipe.model, tokenizer.vocab_size, seed=recipe.seed)
    if source is not None:
        same = source.tokenizer.fingerprint == tokenizer.fingerprint
        anew = load_pretrained(network, source.network(source.checkpoint(), torch.device("cpu")), same_tokenizer=same)
        if anew:
            reporter.note(f"starting anew: {', '.join(anew)}")
    if fresh and recipe.model.init_embeddings is not None:
        _start_embeddings(network, prepared, reporter)
    if recipe.training.lora is not None:
        lora.attach(network, recipe.training.lora, recipe.seed)
        trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        reporter.note(f"LoRA: {trained:,} of {network.parameter_count():,} numbers are trained")
    return network


def _start_embeddings(network: Transformer, prepared: Prepared, reporter: Reporter) -> None:
    """What `model.init_embeddings` asks for; a checkpoint that is gone on from has its own embedding."""
    from tinylm.embedding import formats, reuse

    model = network.model
    found = reuse.start_from(network.embedding, formats.read(Path(str(model.init_embeddings))), prepared.tokenizer)
    how = "averaged over their pieces, " if found.from_words else ""
    reporter.note(
        f"embeddings: {found.tokens:,} of {found.vocab_size:,} tokens begin from {model.init_embeddings}, {how}"
        f"{'frozen' if model.freeze_embeddings else 'learning on'}"
    )


def _prepared(recipe: Recipe, processes: Processes, reporter: Reporter, workers: int) -> Prepared:
    """The tokens: made by the main process, and again on machines that cannot see its cache; mapped by all."""
    if processes.count == 1:
        return prepare(recipe.data, recipe.tokenizer, reporter, workers)

    def handed_on() -> tuple[Path, str, str]:
        prepared = prepare(recipe.data, recipe.tokenizer, reporter, workers)
        return prepared.folder, prepared.fingerprint, prepared.tokenizer.backend.to_str()

    folder, fingerprint, tokenizer = processes.run_on_main(handed_on)
    absent = processes.local_rank == 0 and not (folder / "heldout.json").exists()
    there = processes.run_on_all(
        lambda: prepare(recipe.data, recipe.tokenizer, SILENT, workers).fingerprint if absent else fingerprint
    )
    if there != fingerprint:
        raise InputError("the text is not the one the other machines read", where="data.train")
    return processes.run_on_all(lambda: reopened(folder, fingerprint, tokenizer))


def _check_length(recipe: Recipe, prepared: Prepared) -> None:
    """What the recipe alone cannot tell: whether its text and its steps are long enough. Raises `InputError`."""
    context, warmup = recipe.model.context_length, recipe.training.schedule.warmup
    Batches(prepared.train.tokens, context, recipe.seed)
    steps = planning.training_steps(recipe.training, context, len(prepared.train))
    if steps is not None and warmup >= 1 and warmup > steps:
        raise InputError(f"{warmup} steps of warm-up are more than the {steps} of training", where="training.schedule.warmup")


def _told_once(observer: Observer) -> Callable[[str], None]:
    """Says the first thing that it is told."""
    said = False

    def refused(what: str) -> None:
        nonlocal said
        if not said:
            observer.note(f"{what}; going on without it (checkpoint.on_failure: continue)")
        said = True

    return refused


def merge_for_resume(run: Run, recipe: Recipe, allowed: Sequence[str], reporter: Reporter) -> Recipe:
    """The recipe to go on with: the new one, where it differs from the run's only in what may change."""
    kept = {
        key: getattr(run.recipe.training, key)
        for key in AUTOMATIC
        if getattr(recipe.training, key) == "auto" and f"training.{key}" not in allowed
    }
    before, optimizer = run.recipe.training.optimizer, recipe.training.optimizer
    if isinstance(before, MuonOptimizer) and isinstance(optimizer, MuonOptimizer) and optimizer.newton_schulz_dtype == "auto":
        kept["optimizer"] = optimizer.model_copy(update={"newton_schulz_dtype": before.newton_schulz_dtype})
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update=kept)})
    changed = changes(run.recipe, recipe)
    for key in allowed:
        if not any(_covers(key, name) for name in changed):
            known = flattened(recipe.as_dict())
            why = "is the same as before" if any(_covers(key, name) for name in known) else "is no key or section of the recipe"
            raise InputError(f"{key} {why}", where="--allow-change", hint=did_you_mean(key, changed or known))
    harmless = RESUME_SAFE_KEYS if recipe.model.uses_dropout else (*RESUME_SAFE_KEYS, *RESUME_SAFE_KEYS_WITHOUT_DROPOUT)
    refused = [
        f"{key}: {old} -> {new}"
        for key, (old, new) in changed.items()
        if not any(_covers(name, key) for name in (*allowed, *harmless))
    ]
    if refused:
        listed = "\n  ".join(refused)
        raise InputError(
            f"the recipe is not the one this run was trained with:\n  {listed}\n"
            "--allow-change KEY, or SECTION, takes a change over; without it, train into another folder with --out",
            where=str(run.path),
        )
    return recipe


def fit_micro_batch(recipe: Recipe, processes: int, reporter: Reporter) -> Recipe:
    """A resumed recipe whose micro-batch divides the share of each of so many processes, which may be others than it began with."""
    micro, share = recipe.training.micro_batch_size, recipe.training.global_batch_size // processes
    if micro == "auto" or not share or share % micro == 0 or recipe.training.global_batch_size % processes:
        return recipe
    fitting = next(size for size in range(micro, 0, -1) if share % size == 0)
    if recipe.model.uses_dropout:
        raise InputError(
            f"{micro} does not divide the {share} sequences of each of {processes} processes, and another draws other dropout",
            where="training.micro_batch_size",
            hint=f"--set training.micro_batch_size={fitting} --allow-change training.micro_batch_size does that",
        )
    reporter.note(f"{fitting} sequences at a time instead of {micro}: each of {processes} processes computes {share}")
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"micro_batch_size": fitting})})


def _covers(name: str, key: str) -> bool:
    """Whether `name` is the key, or a section that it lies in."""
    return key == name or key.startswith(name.rstrip(".") + ".")


def _newest(run: Run, recipe: Recipe, prepared: Prepared, fingerprints: dict[str, str], reporter: Reporter) -> Checkpoint | None:
    """The newest whole checkpoint, which must be of this text and fit the recipe; None when there is none yet."""
    if not run.checkpoints():
        reporter.note("no checkpoint yet: beginning at step 0")
        return None
    checkpoint = newest_whole(run, reporter)
    if checkpoint.state["fingerprints"] != fingerprints:
        given = isinstance(run.recipe.tokenizer, FileTokenizer)
        changed = "tokenizer" if given and checkpoint.state["fingerprints"]["tokenizer"] != fingerprints["tokenizer"] else "text"
        raise InputError(f"the {changed} is not the one this run was trained on", where=str(run.path), hint="train anew with --out")
    check_shapes(recipe, prepared.tokenizer.vocab_size, checkpoint)
    return checkpoint


def _restored(
    checkpoint: Checkpoint,
    run: Run,
    recipe: Recipe,
    network: Transformer,
    optimizers: groups.Optimizers,
    checkpoints: CheckpointWriter,
    processes: Processes,
    reporter: Reporter,
) -> dict[str, Any]:
    """The state of a checkpoint, whose weights and optimiser are put back; it is the last again."""
    before, name = run.recipe.training.optimizer.name, recipe.training.optimizer.name
    if before != name:
        reporter.warn(f"{name} begins anew: so far the run was trained with {before}")
    state = restore(checkpoint, network, optimizers, processes, moments=before == name)
    if not checkpoints.forget_after(checkpoint, state["best_step"]):
        state.update(best_step=0, best_val_loss=None)
    reporter.note(f"resuming after step {checkpoint.step}")
    return state


def _result(folder: Path, trainer: Trainer, stopped: str, signal_number: int | None, target: torch.device) -> TrainResult:
    progress = trainer.progress
    return TrainResult(
        run=str(folder),
        step=progress.step,
        steps=trainer.steps if trainer.steps is not None else progress.step,
        tokens=progress.tokens,
        train_loss=progress.train_loss,
        val_loss=progress.val_loss,
        val_perplexity=None if progress.val_loss is None else math.exp(min(progress.val_loss, 700.0)),
        val_bits_per_byte=progress.val_bits_per_byte,
        best_step=progress.best_step,
        best_val_loss=progress.best_val_loss,
        seconds=progress.seconds,
        train_seconds=progress.train_seconds,
        tokens_per_second=progress.tokens / max(progress.train_seconds, 1e-9),
        parameters=trainer.network.parameter_count(),
        device=str(target),
        precision=trainer.precision.name,
        peak_memory_bytes=devices.peak_memory_bytes(target),
        stopped=stopped,
        signal_number=signal_number if stopped == "signal" else None,
    )
