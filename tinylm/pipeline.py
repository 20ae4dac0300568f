"""The whole way: a recipe and a folder in, a trained and measured run out. What `tinylm train` does, callable from a notebook."""

from __future__ import annotations

import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import tokenizers
import torch

import tinylm
from tinylm import device as devices
from tinylm import plan as planning
from tinylm.data.batches import Batches
from tinylm.data.prepare import Prepared, prepare
from tinylm.errors import InputError, did_you_mean
from tinylm.evaluation.perplexity import Perplexity, evaluate
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.model import lora
from tinylm.model.takeover import check_parts, take_over
from tinylm.model.transformer import Transformer
from tinylm.optim import groups
from tinylm.paths import whole_file, write_whole
from tinylm.recipe import Recipe, changes
from tinylm.recipe.schema import FileTokenizer, MuonOptimizer, flattened
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Run, claim
from tinylm.tokenizer import Tokenizer
from tinylm.training import automatic
from tinylm.training import precision as precisions
from tinylm.training.checkpoint import CheckpointWriter, newest_whole, restore
from tinylm.training.memory import keep_freed_memory
from tinylm.training.metrics import MetricsFile, Observer, Observers
from tinylm.training.signals import StopRequest
from tinylm.training.trainer import Poll, Trainer

HARMLESS = ("name", "training.log_every", "checkpoint.", "sampling.")
"""Keys (or sections) that may change on resuming: they do not change the model."""
HARMLESS_WITHOUT_DROPOUT = ("training.compile", "training.micro_batch_size")
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
    stop_after: float | None = None,
    reporter: Reporter = SILENT,
    observer: Observer | None = None,
) -> TrainResult:
    """Train `recipe` into the run folder `folder`.

    A folder that is not empty needs `resume` (go on from its newest whole checkpoint; only keys in `allow_change` and
    harmless ones may differ) or `overwrite` (begin anew). `threads` on a CPU: how many, or `auto` for the fastest; None: one per
    core. `stop_after` seconds ends early, saved. Raises `InputError` for what the user can mend and `WorkError` when the
    training fails.
    """
    folder = Path(folder)
    target = devices.resolve(device)
    if isinstance(threads, int):
        devices.set_threads(threads)
    claim(folder, resume, overwrite)
    resume = resume and (folder / "recipe.yaml").exists()
    if resume:
        recipe = _reconciled(Run.open(folder), recipe, allow_change, reporter)
    source = None if resume else _source(recipe, reporter)
    prepared = prepare(recipe.data, recipe.tokenizer, reporter)
    batches = Batches(prepared.train.tokens, recipe.model.context_length, recipe.seed)
    steps = planning.training_steps(recipe.training, recipe.model.context_length, len(prepared.train))
    if target.type == "cpu":
        keep_freed_memory()
        if threads == "auto":
            chosen = automatic.use_fastest_threads(recipe, prepared.tokenizer.vocab_size, batches)
            reporter.note(f"{chosen} CPU threads are fastest for this model")
    network = Transformer(recipe.model, prepared.tokenizer.vocab_size, seed=recipe.seed)
    if source is not None:
        _start_from(source, recipe, network, prepared.tokenizer, reporter)
    if recipe.training.lora is not None:
        lora.attach(network, recipe.training.lora, recipe.seed)
        trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        reporter.note(f"LoRA: {trained:,} of {network.parameter_count():,} numbers are trained")
    network = network.to(target)
    network.recompute = recipe.training.activation_checkpointing
    decided = automatic.decide(recipe, network, batches, steps, reporter, stop_after, resumed=resume)
    recipe, precision = decided.recipe, decided.precision
    if overwrite:
        _remove_run(folder)
    optimizers = groups.build(recipe.training.optimizer, network, network.stacked_matrices())
    checkpoints = CheckpointWriter(folder, recipe.checkpoint.keep)
    fingerprints = {"data": prepared.fingerprint, "tokenizer": prepared.tokenizer.fingerprint}
    state = _restore(Run(folder), network, optimizers, fingerprints, checkpoints, reporter) if resume else None
    _write_folder(folder, recipe, prepared, target)
    metrics = MetricsFile(folder, int(state["step"]) if state else 0)
    lengths = prepared.tokenizer.token_byte_lengths
    watching = observer or Observer()

    def measure(network: Transformer, poll: Poll) -> Perplexity:
        return evaluate(
            network,
            prepared.heldout,
            lengths,
            context=recipe.model.context_length,
            stride=recipe.evaluation.stride,
            max_tokens=recipe.evaluation.max_tokens,
            device=target,
            advance=poll,
        )

    def write(network: Transformer, prompt: str) -> str:
        section = recipe.sampling
        options = SamplingOptions(section.max_new_tokens, section.temperature, section.top_k)
        return generate(network, prepared.tokenizer, prompt, options, seed=recipe.seed)[0].text

    trainer = Trainer(
        recipe,
        network,
        optimizers,
        batches,
        steps=steps,
        micro_batch_size=int(recipe.training.micro_batch_size),
        precision=precision,
        flops_per_token=planning.flops_per_token(recipe.model, prepared.tokenizer.vocab_size, recipe.training.lora),
        peak_flops=precisions.matmul_flops(precision),
        checkpoints=checkpoints,
        fingerprints=fingerprints,
        evaluate=measure,
        write=write,
        observer=Observers([metrics, watching]),
    )
    if state is not None:
        trainer.resume(state)
    trainer.progress.seconds += decided.start_up_seconds
    trainer.progress.train_seconds += decided.start_up_seconds
    try:
        with StopRequest(watching.stopping) as request:
            watching.phase("first step")
            stopped = trainer.train(request, stop_after)
    finally:
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


def _start_from(source: Run, recipe: Recipe, network: Transformer, tokenizer: Tokenizer, reporter: Reporter) -> None:
    same = source.tokenizer.fingerprint == tokenizer.fingerprint
    anew = take_over(network, source.network(source.checkpoint(), torch.device("cpu")), same_tokenizer=same)
    if anew:
        reporter.note(f"starting anew: {', '.join(anew)}")


def _reconciled(run: Run, recipe: Recipe, allowed: Sequence[str], reporter: Reporter) -> Recipe:
    """The recipe to go on with: the new one, where it differs from the run's only in what may change."""
    kept = {
        key: getattr(run.recipe.training, key)
        for key in AUTOMATIC
        if getattr(recipe.training, key) == "auto" and f"training.{key}" not in allowed
    }
    before, optimizer = run.recipe.training.optimizer, recipe.training.optimizer
    if isinstance(before, MuonOptimizer) and isinstance(optimizer, MuonOptimizer) and optimizer.orthogonalise_in == "auto":
        kept["optimizer"] = optimizer.model_copy(update={"orthogonalise_in": before.orthogonalise_in})
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update=kept)})
    changed = changes(run.recipe, recipe)
    for key in allowed:
        if key not in changed:
            known = flattened(recipe.as_dict())
            why = "is the same as before" if key in known else "is not a key of the recipe"
            raise InputError(f"{key} {why}", where="--allow-change", hint=did_you_mean(key, changed or known))
    harmless = HARMLESS if recipe.model.draws else (*HARMLESS, *HARMLESS_WITHOUT_DROPOUT)
    refused = [
        f"{key}: {old} -> {new}"
        for key, (old, new) in changed.items()
        if key not in allowed and not any(key == name or (name.endswith(".") and key.startswith(name)) for name in harmless)
    ]
    if refused:
        listed = "\n  ".join(refused)
        raise InputError(
            f"the recipe is not the one this run was trained with:\n  {listed}\n"
            "--allow-change KEY takes a change over; without it, train into another folder with --out",
            where=str(run.path),
        )
    return recipe


def _restore(
    run: Run,
    network: Transformer,
    optimizers: groups.Optimizers,
    fingerprints: dict[str, str],
    checkpoints: CheckpointWriter,
    reporter: Reporter,
) -> dict[str, Any] | None:
    """The state of the newest whole checkpoint, restored; None when the run was stopped before its first."""
    if not run.checkpoints():
        reporter.note("no checkpoint yet: beginning at step 0")
        return None
    checkpoint = newest_whole(run, reporter)
    state = checkpoint.state
    if state["fingerprints"] != fingerprints:
        given = isinstance(run.recipe.tokenizer, FileTokenizer)
        changed = "tokenizer" if given and state["fingerprints"]["tokenizer"] != fingerprints["tokenizer"] else "text"
        raise InputError(f"the {changed} is not the one this run was trained on", where=str(run.path), hint="train anew with --out")
    restore(checkpoint, network, optimizers)
    for later in run.checkpoints():
        if later.step > checkpoint.step:
            shutil.rmtree(later.path)
    checkpoints.point("last", checkpoint.name)
    best = run.path / "checkpoints" / f"step-{state['best_step']:06d}"
    if best.exists():
        checkpoints.point("best", best.name)
    else:  # removed when a later one, now gone, was better
        state.update(best_step=0, best_val_loss=None)
        best.with_name("best").unlink(missing_ok=True)
    reporter.note(f"resuming after step {checkpoint.step}")
    return state


def _remove_run(folder: Path) -> None:
    """Remove what an earlier training wrote, and nothing else that lies there. The recipe stays until the new one replaces it."""
    for name in ("checkpoints", "heldout"):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    for name in ("tokenizer.json", "metrics.jsonl", "samples.md", "environment.json"):
        (folder / name).unlink(missing_ok=True)


def _write_folder(folder: Path, recipe: Recipe, prepared: Prepared, target: torch.device) -> None:
    """The recipe first: with it the folder is a run, which can be resumed or overwritten whatever happens next."""
    write_whole(folder / "recipe.yaml", recipe.to_yaml())
    prepared.tokenizer.save(folder / "tokenizer.json")
    for name in ("heldout.npy", "heldout.json"):
        with whole_file(folder / "heldout" / name) as temporary:
            shutil.copyfile(prepared.folder / name, temporary)
    write_whole(folder / "environment.json", json.dumps(_environment(target), indent=1) + "\n")


def _environment(target: torch.device) -> dict[str, object]:
    return {
        "tinylm": tinylm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenizers": tokenizers.__version__,
        "safetensors": safetensors.__version__,
        "platform": platform.platform(),
        "device": devices.describe(target),
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _git_commit() -> str | None:
    """The commit of the repository one works in, if any."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


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
