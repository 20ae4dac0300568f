"""The training loop: step, log, save, evaluate and sample until the recipe's length is reached or a stop is requested.

A step depends only on the recipe, the seed, the step number and the position in the data order, so that a run that was stopped and
resumed equals an uninterrupted one. With several processes, all of them run this loop in lockstep: they agree on every decision
before they act on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tinylm.data.batches import Batches
from tinylm.errors import TinylmError, WorkError
from tinylm.model.objective import Objective
from tinylm.optim.groups import Optimizers
from tinylm.optim.schedules import lr_multiplier
from tinylm.recipe import Recipe
from tinylm.run import Checkpoint
from tinylm.training.checkpoint import CheckpointWriter, Snapshot, restore
from tinylm.training.feed import Feed
from tinylm.training.gradient import GradientComputer
from tinylm.training.guards import Guard
from tinylm.training.metrics import EvaluationEvent, GuardEvent, Observer, SampleEvent, StepEvent
from tinylm.training.parallel import Parallel, full_tensor, tensor_norms
from tinylm.training.pending import PendingStep, StepResult, defers_results
from tinylm.training.precision import Precision
from tinylm.training.progress import Progress
from tinylm.training.replay import StepReport, write_report
from tinylm.training.signals import StopRequest
from tinylm.training.step import GradientSettings

Stop = Literal["done", "time", "signal"]


class Evaluation(Protocol):
    """The result of an evaluation, as far as the trainer uses it."""

    @property
    def loss(self) -> float: ...

    @property
    def bits_per_byte(self) -> float: ...


Poll = Callable[[int], None]
"""Must be called with the number of tokens scored so far after every batch of an evaluation, equally often in each process.

It raises an exception to interrupt the evaluation.
"""


@dataclass(frozen=True)
class TrainingSetup:
    """What to train, on which data, and where to save it."""

    recipe: Recipe
    """Must not contain `auto`."""
    parallel: Parallel
    """The network, and how it is parallelized."""
    optimizers: Optimizers
    objective: Objective
    batches: Batches
    steps: int | None
    """None: train for the `training.minutes` of the recipe."""
    precision: Precision
    flops_per_token: float
    peak_flops: float
    """FLOPs per second that one process reaches in large matrix products: the reference for the model FLOPs utilization."""
    checkpoints: CheckpointWriter
    fingerprints: dict[str, str]
    """Hashes of data and tokenizer, saved with every checkpoint."""


@dataclass(frozen=True)
class Hooks:
    """What the trainer calls to evaluate, sample and report. All processes call `evaluate` and `generate_samples` together."""

    evaluate: Callable[[Poll], Evaluation]
    """Score the network on held-out text."""
    generate_samples: Callable[[], Iterable[tuple[str, str]]]
    """Yield (prompt, continuation) in the main process and nothing in the others."""
    decode: Callable[[list[int]], str]
    """Convert token ids to text."""
    observer: Observer


class _EvaluationInterrupted(Exception):
    """A signal arrived during an evaluation."""


class Trainer:
    """Trains one network. `progress` may be read at any time."""

    def __init__(self, setup: TrainingSetup, hooks: Hooks) -> None:
        recipe, parallel = setup.recipe, setup.parallel
        self.setup = setup
        self.hooks = hooks
        self.progress = Progress()
        self._scaler = setup.precision.scaler()
        self._observer = hooks.observer
        self._processes = parallel.processes
        self._network = parallel.network
        self._guard = Guard(recipe.training.guards, self.progress.watch)
        settings = GradientSettings(int(recipe.training.micro_batch_size), setup.precision, setup.objective, self._scaler)
        dropout_seed = recipe.seed if recipe.model.uses_dropout else None
        self._gradient = GradientComputer(parallel, setup.optimizers, settings, dropout_seed, self._observer.note)
        self._defers_results = defers_results(setup.precision.device)
        self._pending_steps: list[PendingStep] = []
        self._logged_step = 0
        self._logged_train_seconds = 0.0
        self._saved_step = 0
        self._save_error: TinylmError | None = None
        self._signal_number = 0
        self._start_time = 0.0
        self._prior_seconds = 0.0

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint. The weights and optimizer state must have been restored."""
        self.progress = Progress.from_state(state)
        self._guard = Guard(self.setup.recipe.training.guards, self.progress.watch)
        if state["scaler"]:  # empty unless the run was training in fp16
            self._scaler.load_state_dict(state["scaler"])
        self._logged_step, self._logged_train_seconds = self.progress.step, self.progress.train_seconds
        self._saved_step = self.progress.step

    def train(self, request: StopRequest, stop_after: float | None = None) -> Stop:
        """Train to the end and return `done`, or stop early and return `time` (after `stop_after` seconds) or `signal`.

        When this returns, the last step is saved; after `done` it is also evaluated. Raises `WorkError` if training cannot
        continue: unrecoverable steps, not enough memory, or a checkpoint that cannot be written.
        """
        setup, processes = self.setup, self._processes
        pin_memory = setup.precision.device.type == "cuda"
        try:
            rank, world_size = processes.rank, processes.world_size
            with Feed(setup.batches, setup.objective, pin_memory=pin_memory, rank=rank, world_size=world_size) as feed:
                stop = self._run(feed, request, stop_after)
            self._wait_for_save()
            if self._save_error is not None and self._saved_step != self.progress.step:
                raise self._save_error
        except Exception:
            with suppress(Exception):
                setup.checkpoints.wait()  # let a save that started before the error finish
            raise
        return stop

    # The loop.

    def _run(self, feed: Feed, request: StopRequest, stop_after: float | None) -> Stop:
        self._start_time, self._prior_seconds = perf_counter(), self.progress.seconds
        self._network.train()
        if self.progress.step:  # a resumed checkpoint was saved before it was evaluated
            self._evaluate_and_sample(request)

        stop: Stop | None = "done" if self._finished() else None
        if stop is None:
            self._observer.phase("first step")  # slower than later steps if the model is compiled
        first_step = self.progress.step + 1
        while stop is None:
            self.train_step(feed)
            if self.progress.step == first_step:
                self._observer.phase("training")
            self._collect_finished_save()
            self._sync_stop_state(request)

            stopping = self._stop_reason(stop_after) is not None
            result = self.collect_results(all_steps=stopping or self._save_due() or self._log_due())
            stop = self._stop_reason(stop_after)  # again, because collecting the results may have rolled back
            saving = stop is not None or (result is not None and self._save_due())

            if result is not None and (saving or self._log_due()):
                self._log(result)
            if saving:
                self._save()
                if stop == "done" and not self._finished():  # it rolled back instead of saving
                    stop = None
                self._sync_stop_state(request)
            if stop in (None, "done"):
                self._evaluate_and_sample(request)

            self._sync_stop_state(request)
            if stop is None and self._signal_number:  # the signal arrived after `stop` was decided
                stop = "signal"
                if not saving:
                    self._save()

        evaluated = self.progress.evaluated_step == self.progress.step
        return "signal" if stop == "done" and not evaluated else stop  # a signal interrupted the last evaluation

    def _stop_reason(self, stop_after: float | None) -> Stop | None:
        if self._finished():
            return "done"
        if self._signal_number:
            return "signal"
        if stop_after is not None and self.progress.seconds - self._prior_seconds >= stop_after:
            return "time"
        return None

    def _sync_stop_state(self, request: StopRequest) -> None:
        """Agree on time and signal: all processes use the clock of the main process, and a signal to any of them stops all."""
        own = [self._prior_seconds + perf_counter() - self._start_time, float(request.signal_number or 0)]
        gathered = self._processes.gather(own)
        self.progress.seconds = gathered[0][0]
        self._signal_number = int(max(signal for _, signal in gathered))
        if self._signal_number:  # otherwise, keep a signal that arrived since `gather` for the next call
            request.signal_number = self._signal_number

    # When things are due.

    def _evaluation_due(self) -> bool:
        return self._finished() or self.progress.step % self.setup.recipe.evaluation.every == 0

    def _sampling_due(self) -> bool:
        every = self.setup.recipe.sampling.every
        return every is not None and (self._finished() or self.progress.step % every == 0)

    def _save_due(self) -> bool:
        return self._evaluation_due() or self.progress.step % self.setup.recipe.checkpoint.every == 0

    def _log_due(self) -> bool:
        return self.progress.step == 1 or self.progress.step % self.setup.recipe.training.log_every == 0

    def _finished(self) -> bool:
        return self._completed_fraction() >= 1

    def _completed_fraction(self) -> float:
        if self.setup.steps is not None:
            return self.progress.step / self.setup.steps
        return self.progress.seconds / (60 * (self.setup.recipe.training.minutes or 0.0))

    def _step_fraction(self) -> float:
        """One step as a fraction of the whole training; with `training.minutes`, estimated from the steps so far."""
        if self.setup.steps is not None:
            return 1 / self.setup.steps
        return self._completed_fraction() / self.progress.step if self.progress.step else 0.001

    # Steps and their results.

    def train_step(self, feed: Feed) -> None:
        """Run one optimizer step. Skip the update if the loss or gradient is non-finite; `collect_results` reports that."""
        start = perf_counter()
        training, progress, optimizers = self.setup.recipe.training, self.progress, self.setup.optimizers
        optimizers.scale_lr(lr_multiplier(training.schedule, self._completed_fraction(), self._step_fraction()))
        batch = feed.batch(progress.cursor, training.global_batch_size)
        loss, fingerprint = self._gradient.compute(batch, progress.step)
        self._scaler.unscale_(optimizers)  # type: ignore[arg-type]  # it only needs `param_groups`
        gradients = [p.grad for p in self._network.parameters() if p.grad is not None]
        grad_norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
        usable = torch.stack((loss, grad_norm)).isfinite().all()
        loss_scale = self._scaler.scale(torch.ones_like(grad_norm))

        progress.step += 1
        progress.cursor += training.global_batch_size
        progress.tokens += training.global_batch_size * self.setup.batches.context_length
        results = torch.stack((loss, grad_norm, loss_scale))
        self._pending_steps.append(PendingStep.start(progress.step, progress.cursor, fingerprint, results))

        if self._defers_results or bool(usable):
            if training.clip_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self._network.parameters(), training.clip_grad_norm, grad_norm)
            optimizers.step(usable if self._defers_results else None)
        self._scaler.update()
        progress.train_seconds += perf_counter() - start

    def collect_results(self, *, all_steps: bool) -> StepResult | None:
        """Read and check the results of pending steps. Return the newest step's results if they were read and it was not skipped.

        If results are deferred, those of the newest step stay pending unless `all_steps` is set, so that the host does not wait for
        the GPU. After a skipped step every result is read at once, so that a report shows the state right after its step.
        """
        result = None
        while self._pending_steps and (all_steps or len(self._pending_steps) > self._max_pending_steps):
            start = perf_counter()
            result = self._pending_steps.pop(0).read()
            self.progress.train_seconds += perf_counter() - start
            reason = self._guard.skip_reason(result.loss, result.grad_norm, overflow_expected=result.loss_scale > 1)
            if reason is not None:
                self._on_skipped_step(result, reason)
                result = None
                continue
            self.progress.train_loss = result.loss
            if (score := self._guard.spike_score(result.loss)) is not None:
                description = f"loss spike: {result.loss:.4f} is {score:.0f} deviations above the median of the recent steps"
                self._report_guard_event("spike", description, result.step, result.cursor)
        return None if self._pending_steps else result

    @property
    def _max_pending_steps(self) -> int:
        """Steps whose results may stay unread when the next step starts."""
        read_immediately = self.progress.watch.in_a_row > 0 or self.setup.recipe.training.guards.patience == 1
        return 1 if self._defers_results and not read_immediately else 0

    def _log(self, result: StepResult) -> None:
        progress, recipe = self.progress, self.setup.recipe
        sequences = (progress.step - self._logged_step) * recipe.training.global_batch_size
        tokens = sequences * self.setup.batches.context_length
        seconds = max(progress.train_seconds - self._logged_train_seconds, 1e-9)
        self._logged_step, self._logged_train_seconds = progress.step, progress.train_seconds
        mfu_per_speed = self.setup.flops_per_token / (self.setup.peak_flops * self._processes.world_size)
        group = next(iter(self.setup.optimizers.parts.values())).param_groups[0]
        self._observer.step(
            StepEvent(
                step=progress.step,
                tokens=progress.tokens,
                loss=result.loss,
                lr=float(group["lr"]),
                grad_norm=result.grad_norm,
                tokens_per_second=tokens / seconds,
                mfu=tokens / seconds * mfu_per_speed,
                seconds=progress.seconds,
                done=min(1.0, self._completed_fraction()),
                batch=f"{result.fingerprint:016x}",
            )
        )

    # Recovery from non-finite steps.

    def _on_skipped_step(self, result: StepResult, reason: str) -> None:
        """Log a skipped step. After `patience` skipped steps in a row, roll back or abort."""
        self._report_guard_event("skipped", f"skipped: {reason}", result.step, result.cursor)
        if self._guard.rollback_due:
            in_a_row = self.progress.watch.in_a_row
            self._rollback(f"{reason} in step {result.step}, the last of {in_a_row} skipped steps in a row", result)

    def _report_guard_event(self, kind: str, description: str, step: int, cursor: int) -> None:
        self._observer.guard(GuardEvent(kind, step, cursor, description))
        self._observer.note(f"step {step}: {description}")

    def _rollback(self, reason: str, result: StepResult | None) -> None:
        """Restore the last good checkpoint and continue past the offending batches.

        Raises `WorkError` if there is no such checkpoint, or after too many rollbacks. `result`: the skipped step that caused the
        rollback, if any.
        """
        self._wait_for_save()
        before = self.progress
        last_good_step = before.step - before.watch.in_a_row
        checkpoint = self._processes.run_on_main(lambda: self._newest_complete_checkpoint(last_good_step))
        if checkpoint is None or not self._guard.may_roll_back:
            self._abort(reason, checkpoint.step if checkpoint else 0, result)
            return
        setup = self.setup
        self.resume(restore(checkpoint, self._network, setup.optimizers, self._processes))
        restored = self.progress
        restored.cursor, restored.seconds, restored.train_seconds = before.cursor, before.seconds, before.train_seconds
        restored.watch.skipped, restored.watch.spikes = before.watch.skipped, before.watch.spikes
        restored.watch.rollbacks = before.watch.rollbacks + 1
        self._logged_train_seconds = restored.train_seconds
        if not setup.checkpoints.discard_after(checkpoint, restored.best_step):
            restored.best_step, restored.best_val_loss = 0, None
        description = f"rolled back to this step and skipped the batches up to step {before.step}: {reason}"
        self._report_guard_event("rollback", description, restored.step, restored.cursor)

    def _newest_complete_checkpoint(self, up_to_step: int) -> Checkpoint | None:
        checkpoints = [checkpoint for checkpoint in self.setup.checkpoints.run.checkpoints() if checkpoint.step <= up_to_step]
        return next((checkpoint for checkpoint in reversed(checkpoints) if checkpoint.problem() is None), None)

    def _abort(self, reason: str, saved_step: int, result: StepResult | None) -> None:
        """Raise a `WorkError` that says what the user can do. If a skipped step is the cause, write a report of it first."""
        kept = f"the checkpoint of step {saved_step} is complete" if saved_step else "no checkpoint was saved"
        problem = f"{reason}; {kept}"
        advice = "lower training.optimizer.lr, or check the text with `tinylm tokenize report`"
        folder = self.setup.checkpoints.run.path / "reports" / f"step-{self.progress.step:06d}"
        if result is not None:
            report, weights = self._step_report(reason, result), self.setup.parallel.full_weights()

        def fail() -> None:
            if result is None:
                raise WorkError(problem, hint=advice)
            sequences = torch.from_numpy(self.setup.batches.sequences(report.cursor, self.setup.recipe.training.global_batch_size))
            texts = [self.hooks.decode(row) for row in sequences.tolist()]
            try:
                write_report(folder, report, self.setup.recipe, weights, sequences, texts)
            except OSError as error:
                raise WorkError(f"{problem}; the report could not be written: {error}", hint=advice) from None
            raise WorkError(problem, hint=f"`tinylm train --replay {folder}` repeats this step; {advice}")

        self._processes.run_on_main(fail)

    def _step_report(self, reason: str, result: StepResult) -> StepReport:
        weights = tensor_norms(self._network.named_parameters())
        gradients = tensor_norms((name, p.grad) for name, p in self._network.named_parameters() if p.grad is not None)
        return StepReport(
            reason=reason,
            step=result.step,
            cursor=result.cursor - self.setup.recipe.training.global_batch_size,
            loss=result.loss,
            grad_norm=result.grad_norm,
            micro_batch_size=self._gradient.settings.micro_batch_size,
            precision=self.setup.precision.name,
            scale=float(self._scaler.get_scale()),
            device=str(self.setup.precision.device),
            vocab_size=self._network.vocab_size,
            processes=self._processes.world_size,
            threads=torch.get_num_threads(),
            weights=weights,
            gradients=gradients,
        )

    # Checkpoints.

    def _save(self) -> None:
        """Start to save in a background thread. If the weights are non-finite, roll back instead."""
        self._wait_for_save()
        non_finite = not all(bool(weight.isfinite().all()) for weight in self._local_weights())
        if self._processes.any(non_finite):
            self._rollback(f"the weights after step {self.progress.step} are non-finite", None)
            return
        self._observer.phase("saving")
        setup = self.setup
        state = {**asdict(self.progress), "scaler": self._scaler.state_dict(), "fingerprints": setup.fingerprints}
        optimizer_state = setup.parallel.cpu_copies(setup.optimizers.state())
        setup.checkpoints.start_save(Snapshot(setup.parallel.full_weights(), optimizer_state, state))
        self._observer.phase("training")

    def _local_weights(self) -> Iterator[Tensor]:
        for parameter in self._network.parameters():
            yield parameter.to_local() if hasattr(parameter, "to_local") else parameter

    def _collect_finished_save(self) -> None:
        """Report a finished save, if there is only one process.

        Several processes would not see it finish at the same step. They wait for it before the next save or evaluation instead.
        """
        if self._processes.world_size == 1 and self.setup.checkpoints.idle:
            self._wait_for_save()

    def _wait_for_save(self) -> None:
        with self._handle_save_errors():
            checkpoint = self.setup.checkpoints.wait()
            if checkpoint is not None:
                self._saved_step = checkpoint.step
                self._observer.saved(checkpoint.step)
                self.setup.checkpoints.prune()

    @contextmanager
    def _handle_save_errors(self) -> Iterator[None]:
        """With `checkpoint.on_failure: continue`, report an error instead of raising it; the next checkpoint is saved as usual."""
        try:
            yield
        except TinylmError as error:
            if self.setup.recipe.checkpoint.on_failure == "stop":
                raise
            self._save_error = error
            self._observer.note(f"{error}; training continues (checkpoint.on_failure: continue)")

    # Evaluation and samples.

    def _evaluate_and_sample(self, request: StopRequest) -> None:
        """Evaluate and sample if they are due, unless the last step was skipped or a signal arrived."""
        if self.progress.watch.in_a_row and not self._finished():
            return
        if self._evaluation_due() and not self._signal_number:
            self._evaluate(request)
        if self._sampling_due() and not self._signal_number:
            self._sample()

    def _evaluate(self, request: StopRequest) -> None:
        def poll(_: int) -> None:
            self._sync_stop_state(request)
            if self._signal_number:
                raise _EvaluationInterrupted

        self._observer.phase("evaluating")
        try:
            with torch.compiler.set_stance("force_eager"):  # otherwise every new shape is compiled
                evaluation = self.hooks.evaluate(poll)
        except _EvaluationInterrupted:
            return
        finally:
            self._observer.phase("training")
        self._wait_for_save()
        progress = self.progress
        if not math.isfinite(evaluation.loss):
            self._abort(f"the held-out loss of step {progress.step} is {evaluation.loss}", self._saved_step, None)
        progress.val_loss, progress.val_bits_per_byte = evaluation.loss, evaluation.bits_per_byte
        progress.evaluated_step = progress.step
        lowest = progress.best_val_loss is None or evaluation.loss < progress.best_val_loss
        best = lowest and self._saved_step == progress.step  # a step that could not be saved cannot be the best checkpoint
        if best:
            self._mark_best(evaluation.loss)
        self._observer.evaluation(
            EvaluationEvent(
                step=progress.step,
                tokens=progress.tokens,
                val_loss=evaluation.loss,
                val_bits_per_byte=evaluation.bits_per_byte,
                train_seconds=progress.train_seconds,
                seconds=progress.seconds,
                best=best,
            )
        )

    def _mark_best(self, loss: float) -> None:
        """Make the checkpoint of this step the best one."""
        self.progress.best_step, self.progress.best_val_loss = self.progress.step, loss
        with self._handle_save_errors():
            self.setup.checkpoints.set_pointer("best", f"step-{self.progress.step:06d}")
            self.setup.checkpoints.prune()

    def _sample(self) -> None:
        self._observer.phase("sampling")
        with torch.compiler.set_stance("force_eager"):
            for prompt, text in self.hooks.generate_samples():
                self._observer.sample(SampleEvent(self.progress.step, prompt, text))
        self._observer.phase("training")
