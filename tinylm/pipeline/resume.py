"""Resume a run: check and merge the recipe, find the checkpoint, and restore it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tinylm.cost.plan import training_steps
from tinylm.errors import InputError, did_you_mean
from tinylm.pipeline.job import Components, TrainingData, TrainingJob
from tinylm.processes import Processes
from tinylm.recipe import Recipe, changes
from tinylm.recipe.effects import covers, safe_keys
from tinylm.recipe.notation import yaml_value
from tinylm.recipe.schema import FileTokenizer, MuonOptimizer, flattened
from tinylm.reporting import Reporter
from tinylm.run import Checkpoint, Run, check_shapes, load_weights
from tinylm.training.checkpoint import newest_complete_checkpoint, restore
from tinylm.training.progress import check_state
from tinylm.training.resuming import check_remaining, lr_change

RESUME_FIXED_KEYS = ("model.architecture", "objective.name", "data.format")
"""Keys that cannot change when a run is resumed, not even with `allow_change`."""
AUTOMATIC = ("precision", "micro_batch_size", "compile")
"""Keys of `training` that can be `auto`. A resumed run keeps the values that were chosen when it started."""
AUTOMATIC_MUON = ("orthogonalization", "newton_schulz_dtype")
"""Keys of `training.optimizer` that can be `auto`."""


def merge_recipe(job: TrainingJob, processes: Processes, reporter: Reporter) -> TrainingJob:
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
    if isinstance(before, MuonOptimizer) and isinstance(optimizer, MuonOptimizer):
        kept = {key: getattr(before, key) for key in AUTOMATIC_MUON if getattr(optimizer, key) == "auto"}
        chosen["optimizer"] = optimizer.model_copy(update=kept)
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update=chosen)})
    recipe = _keep_filled_in(run.recipe, recipe)
    changed = changes(run.recipe, recipe)
    for key in RESUME_FIXED_KEYS:
        if key in changed:
            before_value, value = changed[key]
            raise InputError(
                f"{key} cannot change from {yaml_value(before_value)} to {yaml_value(value)} when a run is resumed",
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
        f"{key}: {yaml_value(old)} -> {yaml_value(new)}"
        for key, (old, new) in changed.items()
        if not any(covers(name, key) for name in (*allowed, *safe))
    ]
    if rejected:
        listed = "\n  ".join(rejected)
        raise InputError(
            f"the recipe differs from the one that this run was trained with:\n  {listed}\n"
            f"`tinylm train {shlex.quote(str(run.path))} --resume` continues with the run's own recipe;\n"
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


def find_checkpoint(job: TrainingJob, data: TrainingData, processes: Processes, reporter: Reporter) -> Checkpoint | None:
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
            if data.teachers is not None and {**saved, "teachers": None} == {**current, "teachers": None}:
                name = "teachers" if data.teachers.key == "objective.teacher" else "weights of the reference model"
                problem = f"the {name} ({data.teachers.key}) are not the ones that this run was trained with"
            raise InputError(problem, where=str(run.path), hint="train from scratch in another folder with --out")
        check_shapes(job.recipe, data.vocab_size, checkpoint)
        same_optimizer = run.recipe.training.optimizer.name == job.recipe.training.optimizer.name
        if same_optimizer and not checkpoint.has_optimizer_state:
            hint = "initialize a new run with its weights: --set model.init_from=RUN --out FOLDER"
            raise InputError("has no optimizer state, so it cannot be resumed", where=str(checkpoint.path), hint=hint)
        check_remaining(run, job.recipe, data.steps, checkpoint.step, checkpoint.state["seconds"])
        return checkpoint

    return processes.run_on_main(find)


def restore_checkpoint(checkpoint: Checkpoint, job: TrainingJob, components: Components, reporter: Reporter) -> dict[str, Any]:
    """Restore the weights and optimizer state, discard later checkpoints, and return the checkpoint's state."""
    parallelized, name = components.parallel, job.recipe.training.optimizer.name
    before = parallelized.processes.run_on_main(lambda: Run(job.folder).recipe.training.optimizer.name)
    if before != name:
        reporter.warn(f"the optimizer changed from {before} to {name}; its state is reset")
    network, optimizers, processes = parallelized.network, components.optimizers, parallelized.processes
    with components.checkpoints.transfer.distributed(checkpoint.path):
        if network.model.learns_by_counting:  # its size depends on the text
            load_weights(network, checkpoint)
        state = restore(checkpoint, network, optimizers, processes, load_optimizer=before == name)
    if not components.checkpoints.discard_after(checkpoint, state["best_step"]):
        state.update(best_step=0)
    reporter.note(f"resuming after step {checkpoint.step}")
    return state


def announce_lr_change(job: TrainingJob, data: TrainingData, state: dict[str, Any], reporter: Reporter) -> None:
    """Warn if the learning rate jumps because the training length, the schedule or the learning rate has changed."""
    before, step = Run(job.folder).recipe, int(state["step"])

    def fraction(recipe: Recipe) -> float:
        steps = training_steps(recipe.training, data.dataset.tokens_per_example, data.dataset.examples_per_epoch)
        return step / steps if steps is not None else float(state["seconds"]) / (60 * (recipe.training.minutes or 1))

    change = lr_change(before, job.recipe, (fraction(before), fraction(job.recipe)), step)
    if change is not None:
        reporter.warn(change)
