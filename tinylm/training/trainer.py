"""The training loop: step, log, save, evaluate and sample until the run is complete or a stop is requested.

A step depends only on the state before it, the recipe, the seed, the step number and the position in the data order. Therefore, a
resumed run produces the same result as an uninterrupted one. All processes run this loop in lockstep and agree on every decision
before acting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from tinylm.data.datasets import Dataset
from tinylm.errors import TinylmError, WorkError
from tinylm.evaluation.metrics import Metrics
from tinylm.model.graphs import CUDAGraphs
from tinylm.optim.groups import Optimizers
from tinylm.optim.schedules import lr_multiplier
from tinylm.recipe import Recipe
from tinylm.run import Checkpoint
from tinylm.training.checkpoint import CheckpointWriter, Snapshot, restore
from tinylm.training.compilation import eager
from tinylm.training.feed import Feed
from tinylm.training.gradient import GradientComputer
from tinylm.training.guards import Guard
from tinylm.training.metrics import EvaluationEvent, GuardEvent, Observer, SampleEvent, StepEvent
from tinylm.training.objectives import Objective
from tinylm.training.parallel import Parallel, full_tensor, tensor_norms
from tinylm.training.pending import PendingStep, StepResult, defers_results
from tinylm.training.precision import Precision
from tinylm.training.progress import Progress
from tinylm.training.replay import StepReport, write_report
from tinylm.training.signals import StopRequest
from tinylm.training.step import GradientSettings

StopReason = Literal["done", "patience", "time", "signal", "callback"]
Poll = Callable[[int], None]
"""Called after every evaluation batch with the number of tokens scored so far. Raises an exception to interrupt the evaluation.

All processes must call it the same number of times.
"""


@dataclass(frozen=True)
class TrainingSetup:
    """What to train, on what data, and where to save it."""

    recipe: Recipe
    """Its training settings must not contain `auto`."""
    parallel: Parallel
    """The network, and how it is parallelized."""
    optimizers: Optimizers
    objective: Objective
    dataset: Dataset
    steps: int | None
    """None if the recipe's `training.minutes` limits the run instead."""
    precision: Precision
    flops_per_token: float | None
    """None if FLOPs cannot be estimated for the architecture."""
    peak_flops: float
    """Peak FLOP/s of one process. Model FLOPs utilization (MFU) is relative to this value."""
    checkpoints: CheckpointWriter
    fingerprints: dict[str, str]
    """Hashes of the data and the tokenizer, which are saved with every checkpoint."""


@dataclass(frozen=True)
class Hooks:
    """Functions to evaluate, sample and report. All processes must call `evaluate` and `generate_samples` together."""

    evaluate: Callable[[Poll], Metrics]
    """Evaluate the network on held-out data. Returns the objective's metrics."""
    generate_samples: Callable[[], Iterable[tuple[str, str]]]
    """Yield (prompt, continuation) pairs in the main process, and nothing in other processes."""
    decode: Callable[[list[int]], str]
    """Convert token ids to text."""
    observer: Observer


class _EvaluationInterrupted(Exception):
    """A signal arrived during an evaluation."""


def _intervals(fraction: float, every: float) -> int:
    """Return how many intervals have ended after `fraction` of the run. A small tolerance allows for rounding errors."""
    return math.floor(fraction / every + 1e-9)


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
        self._defers_results = defers_results(setup.precision.device)
        self._pending_steps: list[PendingStep] = []
        self._logged_tokens = 0
        self._logged_train_seconds = 0.0
        self._fraction = 0.0
        """Completed fraction of the run after the latest step. It does not change until the next step."""
        self._previous_fraction = 0.0
        """Completed fraction of the run after the previous step."""
        self._saved_step = 0
        self._save_error: TinylmError | None = None
        self._signal_number = 0
        self._stop_requested = False
        self._start_time = 0.0
        self._prior_seconds = 0.0

    @cached_property
    def _gradient(self) -> GradientComputer:
        setup, recipe = self.setup, self.setup.recipe
        settings = GradientSettings(int(recipe.training.micro_batch_size), setup.precision, setup.objective, self._scaler)
        dropout_seed = recipe.seed if recipe.model.uses_dropout else None
        graphs = CUDAGraphs(setup.precision.device) if recipe.training.compile == "graph" else None
        return GradientComputer(setup.parallel, setup.optimizers, settings, dropout_seed, self._observer.note, graphs)

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state. Restore the weights and the optimizer state before calling this."""
        self.progress = Progress.from_state(state, self.setup.objective.metrics)
        self._guard = Guard(self.setup.recipe.training.guards, self.progress.watch)
        if state["scaler"]:  # empty unless the run trains in fp16
            self._scaler.load_state_dict(state["scaler"])
        self._logged_tokens, self._logged_train_seconds = self.progress.tokens, self.progress.train_seconds
        self._saved_step = self.progress.step

    def train(self, request: StopRequest, stop_after: float | None = None) -> StopReason:
        """Train to the end and return `done`, or stop early.

        The other results are `patience` (`evaluation.patience`), `time` (after `stop_after` seconds), `signal` and `callback`. When
        this returns, the last step has been saved, and with `done` or `patience`, it has also been evaluated. Raises `WorkError` if
        training cannot recover from non-finite values, if memory runs out, or if a checkpoint cannot be written.
        """
        setup, processes = self.setup, self._processes
        feed = Feed(
            setup.dataset,
            setup.objective,
            seed=setup.recipe.seed,
            pin_memory=setup.precision.device.type == "cuda",
            rank=processes.rank,
            world_size=processes.world_size,
        )
        try:
            with feed:
                stop = self._run(feed, request, stop_after)
            self._wait_for_save()
            if self._save_error is not None and self._saved_step != self.progress.step:
                raise self._save_error
            if stop in ("done", "patience") and setup.recipe.checkpoint.optimizer == "drop":
                setup.checkpoints.drop_optimizer_states()
        except Exception:
            with suppress(Exception):
                setup.checkpoints.wait()  # let a save that started before the error finish
            raise
        return stop

    # Training loop

    def _run(self, feed: Feed, request: StopRequest, stop_after: float | None) -> StopReason:
        self._start_time, self._prior_seconds = perf_counter(), self.progress.seconds
        self._network.train()
        self._update_fractions()
        if self.progress.step:  # a checkpoint is saved before it is evaluated, so the run may have stopped in between
            self._evaluate_and_sample(request)

        stop: StopReason | None = "done" if self._finished() else "patience" if self._out_of_patience() else None
        if stop is None:
            self._observer.phase("first step")  # slower than later steps if the model is compiled
        first_step = self.progress.step + 1
        while stop is None:
            self.train_step(feed)
            if self.progress.step == first_step:
                self._observer.phase("training")
            self._collect_finished_save()
            self._sync_stop_state(request)
            self._update_fractions()

            stopping = self._stop_reason(stop_after) is not None
            result = self.collect_results(all_steps=stopping or self._save_due() or self._log_due())
            stop = self._stop_reason(stop_after)  # check again, because a result may have caused a rollback
            saving = stop is not None or (result is not None and self._save_due())

            if result is not None and (saving or self._log_due()):
                self._log(result)
            if saving:
                self._save()
                if stop == "done" and not self._finished():  # `_save` rolled back instead
                    stop = None
                self._sync_stop_state(request)
            if stop in (None, "done"):
                self._evaluate_and_sample(request)

            self._sync_stop_state(request)
            if stop is None and (self._signal_number or self._stop_requested):  # requested after `stop` was set
                stop = "signal" if self._signal_number else "callback"
                if not saving:
                    self._save()
            if stop is None and self._out_of_patience():  # evaluated steps have already been saved
                stop = "patience"

        if stop == "patience":
            evaluations, best = self.progress.evaluations_since_best, self.progress.best_step
            self._observer.note(
                f"stopping early: {evaluations} evaluations without improvement since step {best} (evaluation.patience)"
            )
        evaluated = self.progress.evaluated_step == self.progress.step
        return "signal" if stop == "done" and not evaluated else stop  # a signal interrupted the last evaluation

    def _stop_reason(self, stop_after: float | None) -> StopReason | None:
        if self._finished():
            return "done"
        if self._signal_number:
            return "signal"
        if self._stop_requested:
            return "callback"
        if stop_after is not None and self.progress.seconds - self._prior_seconds >= stop_after:
            return "time"
        return None

    def _sync_stop_state(self, request: StopRequest) -> None:
        """Synchronize time and stop requests. All processes use the main process's clock.

        A stop request to any process stops all of them.
        """
        seconds = self._prior_seconds + perf_counter() - self._start_time
        gathered = self._processes.gather([seconds, float(request.signal_number or 0), float(self._observer.stop_requested)])
        self.progress.seconds = gathered[0][0]
        self._signal_number = int(max(signal for _, signal, _ in gathered))
        self._stop_requested = any(requested for _, _, requested in gathered)
        if self._signal_number:  # do not overwrite the request with 0, because a signal may have arrived after `gather`
            request.signal_number = self._signal_number

    # Intervals between evaluations, samples, checkpoints and log lines

    def _evaluation_due(self) -> bool:
        return self._finished() or self._interval_ended(self.setup.recipe.evaluation.every)

    def _sampling_due(self) -> bool:
        every = self.setup.recipe.sampling.every
        return every is not None and (self._finished() or self._interval_ended(every))

    def _save_due(self) -> bool:
        return self._evaluation_due() or self._interval_ended(self.setup.recipe.checkpoint.every) or self._permanent_save_due()

    def _permanent_save_due(self) -> bool:
        every = self.setup.recipe.checkpoint.keep_every
        return every is not None and self._interval_ended(every)

    def _interval_ended(self, every: int | float) -> bool:
        """Whether the latest step ended an interval. An interval is `every` steps, or a fraction of the run if `every` < 1."""
        if every >= 1:
            return self.progress.step % every == 0
        return _intervals(self._fraction, every) > _intervals(self._previous_fraction, every)

    def _log_due(self) -> bool:
        return self.progress.step == 1 or self.progress.step % self.setup.recipe.training.log_every == 0

    def _finished(self) -> bool:
        return self._completed_fraction() >= 1

    def _out_of_patience(self) -> bool:
        patience = self.setup.recipe.evaluation.patience
        return patience is not None and self.progress.evaluations_since_best >= patience

    def _update_fractions(self) -> None:
        """Record the completed fraction of the run.

        After resuming a run with `training.minutes`, the previous fraction is 0, so an evaluation is due immediately.
        """
        self._previous_fraction, self._fraction = self._fraction, self._completed_fraction()
        if self.setup.steps is not None:
            self._previous_fraction = (self.progress.step - 1) / self.setup.steps

    @property
    def fraction_done(self) -> float:
        """Completed fraction of the run, in [0, 1]."""
        return min(1.0, self._completed_fraction())

    def _completed_fraction(self) -> float:
        if self.setup.steps is not None:
            return self.progress.step / self.setup.steps
        return self.progress.seconds / (60 * (self.setup.recipe.training.minutes or 0.0))

    def _step_fraction(self) -> float:
        """Return one step as a fraction of the whole run. With `training.minutes`, it is estimated from the previous steps."""
        if self.setup.steps is not None:
            return 1 / self.setup.steps
        return self._completed_fraction() / self.progress.step if self.progress.step else 0.001

    # Steps and their results

    def train_step(self, feed: Feed) -> None:
        """Run one optimizer step. Skip the update if the loss or gradient is non-finite. `collect_results` reports the skip."""
        start = perf_counter()
        training, progress, optimizers = self.setup.recipe.training, self.progress, self.setup.optimizers
        optimizers.scale_lr(lr_multiplier(training.schedule, self._completed_fraction(), self._step_fraction()))
        batch = feed.batch(progress.cursor, training.global_batch_size)
        losses, fingerprint = self._gradient.compute(batch, progress.step)
        loss, *terms = losses.unbind() if losses.ndim else (losses,)
        self._scaler.unscale_(optimizers)  # type: ignore[arg-type]  # it only needs `param_groups`
        gradients = [p.grad for p in self._network.parameters() if p.grad is not None]
        grad_norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
        usable = torch.stack((loss, grad_norm)).isfinite().all()
        loss_scale = self._scaler.scale(torch.ones_like(grad_norm))

        progress.step += 1
        progress.cursor += training.global_batch_size
        progress.tokens += batch.global_token_count
        results = torch.stack((loss, grad_norm, loss_scale, *terms))
        self._pending_steps.append(PendingStep.start(progress.step, progress.cursor, fingerprint, results))

        if self._defers_results or bool(usable):
            if training.clip_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self._network.parameters(), training.clip_grad_norm, grad_norm)
            optimizers.step(usable if self._defers_results else None)
            optimizers.update_average(progress.step, usable if self._defers_results else None)
        self._scaler.update()
        progress.train_seconds += perf_counter() - start

    def collect_results(self, *, all_steps: bool) -> StepResult | None:
        """Read and check the results of pending steps. Return the latest result, or None if it is unread or its step was skipped.

        If results are deferred, the latest result stays pending unless `all_steps` is set, to avoid a host-device synchronization.
        After a skipped step, every result is read immediately, so that a report shows the state right after the failed step.
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
                distance = f"{score:.0f} robust standard deviations above the median of recent losses"
                description = f"loss spike: {result.loss:.4f} is {distance}"
                self._report_guard_event("spike", description, result.step, result.cursor)
        return None if self._pending_steps else result

    @property
    def _max_pending_steps(self) -> int:
        """The maximum number of steps whose results are still unread when the next step starts."""
        read_immediately = self.progress.watch.in_a_row > 0 or self.setup.recipe.training.guards.patience == 1
        return 1 if self._defers_results and not read_immediately else 0

    def _log(self, result: StepResult) -> None:
        progress = self.progress
        tokens = progress.tokens - self._logged_tokens
        seconds = max(progress.train_seconds - self._logged_train_seconds, 1e-9)
        self._logged_tokens, self._logged_train_seconds = progress.tokens, progress.train_seconds
        flops, peak_flops = self.setup.flops_per_token, self.setup.peak_flops * self._processes.world_size
        self._observer.step(
            StepEvent(
                step=progress.step,
                tokens=progress.tokens,
                loss=result.loss,
                lr=self._learning_rate(),
                grad_norm=result.grad_norm,
                tokens_per_second=tokens / seconds,
                mfu=None if flops is None else tokens / seconds * (flops / peak_flops),
                seconds=progress.seconds,
                fraction_done=self.fraction_done,
                batch=f"{result.fingerprint:016x}",
                distillation_loss=result.distillation_loss,
            )
        )

    def _learning_rate(self) -> float:
        return float(next(iter(self.setup.optimizers.parts.values())).param_groups[0]["lr"])

    # Recovery from non-finite steps

    def _on_skipped_step(self, result: StepResult, reason: str) -> None:
        """Log a skipped step. After `patience` consecutive skipped steps, roll back or abort."""
        self._report_guard_event("skipped", f"skipped: {reason}", result.step, result.cursor)
        if self._guard.rollback_due:
            skipped = self.progress.watch.in_a_row
            consecutive = f" ({skipped} consecutive skipped steps)" if skipped > 1 else ""
            self._rollback(f"{reason} in step {result.step}{consecutive}", result)

    def _report_guard_event(self, kind: str, description: str, step: int, cursor: int) -> None:
        self._observer.guard(GuardEvent(kind, step, cursor, description))
        self._observer.note(f"step {step}: {description}")

    def _rollback(self, reason: str, result: StepResult | None) -> None:
        """Restore the last good checkpoint, and continue after the batches that failed.

        `result` is the result of the skipped step that caused the rollback, if there is one. Raises `WorkError` if there is no good
        checkpoint, or if there have been too many rollbacks.
        """
        self._wait_for_save()
        before = self.progress
        last_good_step = before.step - before.watch.in_a_row
        checkpoint = self._processes.run_on_main(lambda: self._newest_complete_checkpoint(last_good_step))
        if checkpoint is None or not self._guard.may_roll_back:
            self._abort(reason, checkpoint.step if checkpoint else 0, result)
            return
        setup = self.setup
        with setup.checkpoints.transfer.distributed(checkpoint.path):
            self.resume(restore(checkpoint, self._network, setup.optimizers, self._processes))
        restored = self.progress
        restored.cursor, restored.seconds, restored.train_seconds = before.cursor, before.seconds, before.train_seconds
        restored.watch.skipped, restored.watch.spikes = before.watch.skipped, before.watch.spikes
        restored.watch.rollbacks = before.watch.rollbacks + 1
        self._logged_train_seconds = restored.train_seconds
        if not setup.checkpoints.discard_after(checkpoint, restored.best_step):
            restored.best_step, restored.best_value = 0, None
        description = f"rolled back to this step and skipped the batches up to step {before.step}: {reason}"
        self._report_guard_event("rollback", description, restored.step, restored.cursor)

    def _newest_complete_checkpoint(self, up_to_step: int) -> Checkpoint | None:
        checkpoints = [checkpoint for checkpoint in self.setup.checkpoints.run.checkpoints() if checkpoint.step <= up_to_step]
        return next((checkpoint for checkpoint in reversed(checkpoints) if checkpoint.problem() is None), None)

    def _abort(self, reason: str, saved_step: int, result: StepResult | None) -> None:
        """Raise a `WorkError` with advice for the user. If a skipped step is the cause, first write a report about that step."""
        kept = f"the newest complete checkpoint is from step {saved_step}" if saved_step else "no checkpoint was saved"
        problem = f"{reason}; {kept}"
        advice = "lower training.optimizer.lr, or check the text with `tinylm tokenize report`"
        folder = self.setup.checkpoints.run.path / "reports" / f"step-{self.progress.step:06d}"
        if result is not None:
            report, weights = self._step_report(reason, result), self.setup.parallel.full_weights()

        def fail() -> None:
            if result is None:
                raise WorkError(problem, hint=advice)
            examples = self.setup.dataset.examples(report.cursor, self.setup.recipe.training.global_batch_size)
            texts = [self.hooks.decode(row[row >= 0].tolist()) for row in examples["tokens"]]
            try:
                write_report(folder, report, self.setup.recipe, weights, examples, texts)
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

    # Checkpoints

    def _save(self) -> None:
        """Start saving in a background thread. If the weights are non-finite, roll back instead."""
        self._wait_for_save()
        finite = [weight.isfinite().all() for weight in self._local_weights()]  # n-gram models have no weights
        if self._processes.any(bool(finite) and not bool(torch.stack(finite).all())):  # reads one flag from the device
            self._rollback(f"the weights after step {self.progress.step} are non-finite", None)
            return
        self._observer.phase("saving")
        setup = self.setup
        progress = self.progress.as_state(setup.objective.metrics)
        state = {**progress, "scaler": self._scaler.state_dict(), "fingerprints": setup.fingerprints}
        if self._permanent_save_due():
            state["permanent"] = True
        optimizer_state = setup.parallel.cpu_copies(setup.optimizers.state())
        with setup.optimizers.averaged_weights():
            weights = setup.parallel.full_weights()
        setup.checkpoints.start_save(Snapshot(weights, optimizer_state, state))
        self._observer.phase("training")

    def _local_weights(self) -> Iterator[Tensor]:
        for parameter in self._network.parameters():
            yield parameter.to_local() if hasattr(parameter, "to_local") else parameter

    def _collect_finished_save(self) -> None:
        """With a single process, report a finished save.

        With several processes, the save could finish at a different step in each process. Therefore, they wait for it before the
        next save and after the next evaluation.
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
        """With `checkpoint.on_failure: continue`, report an error instead of raising it. The next checkpoint is saved as usual."""
        try:
            yield
        except TinylmError as error:
            if self.setup.recipe.checkpoint.on_failure == "stop":
                raise
            self._save_error = error
            self._observer.note(f"{error}; training continues (checkpoint.on_failure: continue)")

    # Evaluation and samples

    def _evaluate_and_sample(self, request: StopRequest) -> None:
        """Evaluate and sample if due, unless the latest step was skipped or a signal has arrived."""
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
            with eager(), self._evaluation_precision(), self.setup.optimizers.averaged_weights():
                metrics = self.hooks.evaluate(poll)
        except _EvaluationInterrupted:
            return
        finally:
            self._observer.phase("training")
        self._wait_for_save()
        progress = self.progress
        if not math.isfinite(metrics.value):
            label = metrics.metric.label
            self._abort(f"the held-out {label} after step {progress.step} is {metrics.value}", self._saved_step, None)
        progress.metrics, progress.evaluated_step = metrics, progress.step
        better = metrics.metric.better(metrics.value, progress.best_value)
        progress.evaluations_since_best = 0 if better else progress.evaluations_since_best + 1
        best = better and self._saved_step == progress.step  # if the step could not be saved, it has no checkpoint
        if best:
            self._mark_best(metrics.value)
        self._observer.evaluation(
            EvaluationEvent(
                step=progress.step,
                tokens=progress.tokens,
                metrics=metrics,
                train_seconds=progress.train_seconds,
                seconds=progress.seconds,
                best=best,
            )
        )

    def _evaluation_precision(self) -> AbstractContextManager[None]:
        """On a GPU, evaluate in the training precision. Only the final evaluation runs in float32, which takes much longer."""
        precision = self.setup.precision
        return precision.for_training() if precision.device.type == "cuda" and not self._finished() else nullcontext()

    def _mark_best(self, value: float) -> None:
        """Mark the checkpoint for this step as the best one. `value` is its primary metric."""
        self.progress.best_step, self.progress.best_value = self.progress.step, value
        with self._handle_save_errors():
            self.setup.checkpoints.set_pointer("best", f"step-{self.progress.step:06d}")
            self.setup.checkpoints.prune()

    def _sample(self) -> None:
        self._observer.phase("sampling")
        with eager(), self.setup.optimizers.averaged_weights():
            for prompt, text in self.hooks.generate_samples():
                self._observer.sample(SampleEvent(self.progress.step, prompt, text))
        self._observer.phase("training")
