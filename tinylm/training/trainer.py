"""The loop: steps, measurements, checkpoints, until the recipe's length is reached or someone stops it.

Everything that a step does is a function of the recipe, the seed, the number of the step and the cursor into the data, so that a
run that was stopped and resumed is the run that was not. How to evaluate and how to sample are handed in. With several processes
all run this loop in step: whatever decides what comes next is agreed on first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tinylm.data.batches import Batches
from tinylm.errors import TinylmError, WorkError
from tinylm.model.objective import CausalObjective
from tinylm.model.transformer import Transformer
from tinylm.optim.groups import Optimizers
from tinylm.optim.schedules import multiplier
from tinylm.recipe import Recipe
from tinylm.run import Checkpoint
from tinylm.training.checkpoint import CheckpointWriter, Snapshot, restore
from tinylm.training.feed import Feed, GlobalBatch
from tinylm.training.guards import Guard, Watch
from tinylm.training.metrics import EvaluationEvent, GuardEvent, Observer, SampleEvent, StepEvent
from tinylm.training.out_of_memory import halved, is_out_of_memory
from tinylm.training.parallel import Parallel, full_tensor, norms
from tinylm.training.precision import Precision
from tinylm.training.replay import Report, write_report
from tinylm.training.signals import StopRequest
from tinylm.training.step import accumulate, micro_batch_seeds


class Measured(Protocol):
    """What the trainer needs to know of an evaluation."""

    @property
    def loss(self) -> float: ...

    @property
    def bits_per_byte(self) -> float: ...


Poll = Callable[[int], None]
Evaluate = Callable[[Transformer, Poll], Measured]
Write = Callable[[Transformer, str], str]
Read = Callable[[list[int]], str]


@dataclass
class Progress:
    """Where a training stands; saved with every checkpoint. Losses are None until there is one."""

    step: int = 0
    cursor: int = 0
    """Sequences of the data's order that lie behind: where the next batch begins, over all processes."""
    tokens: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    train_loss: float | None = None
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    evaluated_step: int = 0
    best_step: int = 0
    best_val_loss: float | None = None
    watch: Watch = field(default_factory=Watch)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        values = {field.name: state[field.name] for field in fields(cls)}
        return cls(**{**values, "watch": Watch(**values["watch"])})


@dataclass(frozen=True)
class _Step:
    """What one step computed, the same in every process."""

    number: int
    cursor: int
    """Where the data's order went on after it."""
    loss: float
    norm: float
    fingerprint: int


@dataclass(frozen=True)
class PendingStep:
    """A step whose numbers are still the device's: its loss, the norm of its gradient, and the scale of a float16 loss."""

    number: int
    cursor: int
    fingerprint: int
    numbers: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def now(cls, number: int, cursor: int, fingerprint: int, numbers: Tensor) -> PendingStep:
        """Ask for the numbers; a GPU copies them while the host goes on."""
        if numbers.device.type != "cuda":
            return cls(number, cursor, fingerprint, numbers, None)
        copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(numbers.device))
        return cls(number, cursor, fingerprint, copy, arrived)

    def read(self) -> tuple[_Step, float]:
        """The numbers on the host, once they are there; and the scale."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm, scale = self.numbers.tolist()
        return _Step(self.number, self.cursor, loss, norm, self.fingerprint), scale


class _EvaluationInterrupted(Exception):
    """A signal came while measuring."""


class PeerOutOfMemory(Exception):
    """Another process has not the memory for its micro-batches."""


def defers_results(device: torch.device) -> bool:
    """Whether the host goes on before it knows how a step went: where it is not the host that computes, and torch's optimisers
    can leave a step out by a number that is on the device.
    """
    return device.type == "cuda"


class Trainer:
    """Trains one network. `steps` None: for `minutes`, by the clock."""

    def __init__(
        self,
        recipe: Recipe,
        parallel: Parallel,
        optimizers: Optimizers,
        batches: Batches,
        *,
        steps: int | None,
        micro_batch_size: int,
        precision: Precision,
        flops_per_token: float,
        peak_flops: float,
        checkpoints: CheckpointWriter,
        fingerprints: dict[str, str],
        evaluate: Evaluate,
        write: Write,
        read: Read,
        observer: Observer,
    ) -> None:
        """`evaluate` measures, `write` continues a prompt, `read` is the text of some ids; `peak_flops` is one process's."""
        self.recipe = recipe
        self.network = parallel.network
        self.optimizers = optimizers
        self.batches = batches
        self.steps = steps
        self.micro_batch_size = micro_batch_size
        self.precision = precision
        self.scaler = precision.scaler()
        self.progress = Progress()
        self._parallel = parallel
        self._processes = parallel.processes
        self._guard = Guard(recipe.training.guards, self.progress.watch)
        self._objective = CausalObjective()
        self._utilisation = flops_per_token / (peak_flops * parallel.processes.count)
        self._checkpoints = checkpoints
        self._fingerprints = fingerprints
        self._evaluate = evaluate
        self._write = write
        self._read = read
        self._observer = observer
        self._logged_step = 0
        self._logged_seconds = 0.0
        self._saved_step = 0
        self._save_error: TinylmError | None = None
        self._signal = 0
        self._began = 0.0
        self._prior_seconds = 0.0
        self._pending_steps: list[PendingStep] = []
        self._defers_results = defers_results(precision.device)

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; weights and optimiser are already restored."""
        self.progress = Progress.from_state(state)
        self._guard = Guard(self.recipe.training.guards, self.progress.watch)
        if state["scaler"]:  # empty where the training so far was not in fp16
            self.scaler.load_state_dict(state["scaler"])
        self._logged_step, self._logged_seconds = self.progress.step, self.progress.train_seconds
        self._saved_step = self.progress.step

    def train(self, request: StopRequest, stop_after: float | None = None) -> str:
        """Run to the end: `done`, or `time` after `stop_after` seconds, or `signal`. Saved and measured when it returns.

        Raises `WorkError` when going on makes no sense: no more numbers, or no more room on the disk.
        """
        processes = self._processes
        pin = self.precision.device.type == "cuda"
        try:
            with Feed(self.batches, self._objective, pin=pin, rank=processes.rank, count=processes.count) as feed:
                stopped = self._loop(feed, request, stop_after)
            self._wait_for_save()
            if self._save_error is not None and self._saved_step != self.progress.step:
                raise self._save_error
        except Exception:
            with suppress(Exception):
                self._checkpoints.finish()  # what was trained before it went wrong
            raise
        return stopped

    def _loop(self, feed: Feed, request: StopRequest, stop_after: float | None) -> str:
        self._began, self._prior_seconds = time.perf_counter(), self.progress.seconds
        self.network.train()
        if self.progress.step:
            self._evaluate_and_sample(request)
        stopped, finished = "done", self._finished()
        while stopped == "done" and not finished:
            self._step(feed)
            if self._processes.count == 1 and self._checkpoints.done:  # several would not see it at the same step
                self._wait_for_save()
            self._sync_stop_state(request)
            late = stop_after is not None and self.progress.seconds - self._prior_seconds >= stop_after
            ending = self._finished() or bool(self._signal) or late
            done = self._collect_results(all_steps=ending or self._save_due() or self._log_due())
            finished = self._finished()
            if not finished and self._signal:
                stopped = "signal"
            elif not finished and late:
                stopped = "time"
            saving = finished or stopped != "done" or (done is not None and self._save_due())
            if done is not None and (saving or self._log_due()):
                self._log(done)
            if saving:
                if not self._save():
                    finished = self._finished()  # it went back
                self._sync_stop_state(request)
            if stopped == "done":
                self._evaluate_and_sample(request)
            self._sync_stop_state(request)
            if stopped == "done" and self._signal and not finished:
                stopped = "signal"
                if not saving:  # the signal came after that was decided
                    self._save()
        measured = self.progress.evaluated_step == self.progress.step
        return stopped if measured or stopped != "done" else "signal"  # one that came during the last evaluation

    def _sync_stop_state(self, request: StopRequest) -> None:
        """One clock and one answer to signals for all processes: the main one's, and whichever came to any."""
        own = [self._prior_seconds + time.perf_counter() - self._began, float(request.signal_number or 0)]
        everybodys = self._processes.gather(own)
        self.progress.seconds = everybodys[0][0]
        self._signal = int(max(signal for _, signal in everybodys))
        if self._signal:  # else one may have come just now, to be heard the next time
            request.signal_number = self._signal

    def _evaluate_and_sample(self, request: StopRequest) -> None:
        """Measure and sample when it is time. A resumed training does so first: its checkpoint was saved before that."""
        if self.progress.watch.in_a_row and not self._finished():
            return
        if self._evaluation_due() and not self._signal:
            self._measure(request)
        every = self.recipe.sampling.every
        if every is not None and not self._signal and (self._finished() or self.progress.step % every == 0):
            self._sample()

    def _evaluation_due(self) -> bool:
        return self._finished() or self.progress.step % self.recipe.evaluation.every == 0

    def _save_due(self) -> bool:
        return self._evaluation_due() or self.progress.step % self.recipe.checkpoint.every == 0

    def _finished(self) -> bool:
        return self._done() >= 1

    def _done(self) -> float:
        """Share of the training that is done."""
        if self.steps is not None:
            return self.progress.step / self.steps
        return self.progress.seconds / (60 * (self.recipe.training.minutes or 0.0))

    def _step_share(self) -> float:
        if self.steps is not None:
            return 1 / self.steps
        return self._done() / self.progress.step if self.progress.step else 0.001

    def _step(self, feed: Feed) -> None:
        """One optimiser step, which changes nothing where loss or gradient are no numbers. `_collect_results` tells how it went."""
        start = time.perf_counter()
        training, progress = self.recipe.training, self.progress
        self.optimizers.set_rate(multiplier(training.schedule, self._done(), self._step_share()))
        loss, fingerprint = self._gradient(feed)
        self.scaler.unscale_(self.optimizers)  # type: ignore[arg-type]  # groups are all it needs
        norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None]))
        usable = torch.stack((loss, norm)).isfinite().all()
        scale = self.scaler.scale(torch.ones_like(norm))
        progress.step += 1
        progress.cursor += training.global_batch_size
        progress.tokens += training.global_batch_size * self.batches.context_length
        self._pending_steps.append(PendingStep.now(progress.step, progress.cursor, fingerprint, torch.stack((loss, norm, scale))))
        if self._defers_results or bool(usable):
            if training.clip_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.network.parameters(), training.clip_grad_norm, norm)
            self.optimizers.step(usable if self._defers_results else None)
        self.scaler.update()
        progress.train_seconds += time.perf_counter() - start

    def _collect_results(self, *, all_steps: bool) -> _Step | None:
        """Look at the numbers of steps that were taken; the last step, if it is heard and nothing was wrong with it.

        A GPU is not waited for: how a step went is heard after the next one was given to it, unless `all_steps` are asked for.
        Once a step had to be left out each is heard at once, so that a report finds things as they were.
        """
        done = None
        while self._pending_steps and (all_steps or len(self._pending_steps) > self._lag):
            start = time.perf_counter()
            done, scale = self._pending_steps.pop(0).read()
            self.progress.train_seconds += time.perf_counter() - start
            problem = self._guard.problem(done.loss, done.norm, overflow_expected=scale > 1)
            if problem is not None:
                self._on_skipped_step(done, problem)
                done = None
                continue
            self.progress.train_loss = done.loss
            if (score := self._guard.spike(done.loss)) is not None:
                what = f"a spike: the loss {done.loss:.4f} is {score:.0f} deviations above the median of the last steps"
                self._tell("spike", what, done)
        return done if not self._pending_steps else None

    @property
    def _lag(self) -> int:
        """Steps that may be under way without their numbers being known."""
        careful = self.progress.watch.in_a_row > 0 or self.recipe.training.guards.patience == 1
        return 1 if self._defers_results and not careful else 0

    def _gradient(self, feed: Feed) -> tuple[Tensor, int]:
        """The gradient of one global batch; its mean loss, on the device, and fingerprint. Where memory runs out, in smaller
        micro-batches.
        """
        batch = feed.take(self.progress.cursor, self.recipe.training.global_batch_size)
        while (loss := self._attempt(batch)) is None:
            pass
        parts = self._processes.gather([float(half) for half in divmod(batch.fingerprint, 1 << 32)])
        return self._parallel.total(loss), sum((int(high) << 32) + int(low) for high, low in parts) % (1 << 64)

    def _attempt(self, batch: GlobalBatch) -> Tensor | None:
        """This process's part of the loss, the gradients in place; None when memory ran out and the micro-batch was halved.

        With DDP the processes ask each other before they exchange gradients, and halve together. Whoever runs out while
        something is being exchanged (with FSDP, always) cannot tell the others any more, and that ends the training.
        """
        self.optimizers.zero_grad()
        processes, asked = self._processes, False
        count = len(batch.example.inputs) // self.micro_batch_size
        seeds = micro_batch_seeds(self.recipe.seed, self.progress.step, processes.rank * count, count)

        @contextmanager
        def together(last: bool) -> Iterator[nn.Module]:
            nonlocal asked
            if last and self._parallel.name == "ddp":
                asked = True
                if processes.any(False):
                    raise PeerOutOfMemory
            with self._parallel.micro_batch(last) as network:
                yield network

        try:
            with self.precision.tf32():
                return accumulate(
                    self.network,
                    self._objective,
                    batch,
                    self.micro_batch_size,
                    self.precision,
                    self.scaler,
                    seeds if self.recipe.model.uses_dropout else None,
                    together,
                )
        except PeerOutOfMemory:
            needed = "in another process"
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            needed = str(error).splitlines()[0]
            if processes.count > 1 and (asked or self._parallel.name == "fsdp"):
                hint = "go on with --resume and a smaller --set training.micro_batch_size"
                raise WorkError(f"out of memory while computing with other processes: {needed}", hint=hint) from None
            processes.any(True)
        self._halve(needed)
        return None

    def _halve(self, error: str) -> None:
        """Go on with micro-batches of at most half the size: the global batch stays what it is."""
        before, batch = self.micro_batch_size, self.recipe.training.global_batch_size
        self.optimizers.zero_grad()
        if self.precision.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.precision.device.type == "mps":
            torch.mps.empty_cache()
        if before == 1:
            hint = "use a smaller model or context, or training.activation_checkpointing: on"
            raise WorkError(f"one sequence does not fit into memory: {error}", hint=hint)
        self.micro_batch_size = halved(before, batch // self._processes.count)
        self._observer.note(
            f"out of memory: going on with {batch // self.micro_batch_size} micro-batches of {self.micro_batch_size} "
            f"instead of {batch // before} of {before}; the global batch stays {batch}"
        )

    def _on_skipped_step(self, done: _Step, problem: str) -> None:
        """A step that changed nothing is told; too many of them in a row make the training go back, or end it."""
        self._tell("skipped", f"left out: {problem}", done)
        if self._guard.exhausted:
            self._rollback(f"{problem} in step {done.number}, the last of {self.progress.watch.in_a_row} in a row", done)

    def _tell(self, kind: str, reason: str, of: _Step | None = None) -> None:
        progress = self.progress
        step, cursor = (progress.step, progress.cursor) if of is None else (of.number, of.cursor)
        self._observer.guard(GuardEvent(kind, step, cursor, reason))
        self._observer.note(f"step {step}: {reason}")

    def _rollback(self, reason: str, done: _Step | None) -> None:
        """To the last good checkpoint, and on with the text after the bad stretch. Raises `WorkError` if that was tried before."""
        self._wait_for_save()
        progress, watch = self.progress, self.progress.watch
        good = progress.step - watch.in_a_row

        def newest() -> Checkpoint | None:
            older = [checkpoint for checkpoint in self._checkpoints.run.checkpoints() if checkpoint.step <= good]
            return next((checkpoint for checkpoint in reversed(older) if checkpoint.problem() is None), None)

        checkpoint = self._processes.run_on_main(newest)
        if checkpoint is None or not self._guard.may_go_back:
            self._abort(reason, checkpoint.step if checkpoint else 0, done)
            return
        state = restore(checkpoint, self.network, self.optimizers, self._processes)
        self.resume(state)
        now, then = self.progress, progress
        now.cursor, now.seconds, now.train_seconds = then.cursor, then.seconds, then.train_seconds
        now.watch.skipped, now.watch.spikes, now.watch.rollbacks = watch.skipped, watch.spikes, watch.rollbacks + 1
        self._logged_seconds = now.train_seconds
        if not self._checkpoints.forget_after(checkpoint, now.best_step):
            now.best_step, now.best_val_loss = 0, None
        self._tell("rollback", f"went back here, and on past the text up to step {then.step}: {reason}")

    def _abort(self, reason: str, saved_step: int, done: _Step | None) -> None:
        """End with what the user can do about it, and a report of the step that was the last straw."""
        kept = f"the checkpoint of step {saved_step} is whole" if saved_step else "nothing was saved"
        lower = "lower training.optimizer.lr, or look at the text with `tinylm tokenize report`"
        weights, layers = self._parallel.weights(), norms(self.network.named_parameters())
        gradients = norms((name, p.grad) for name, p in self.network.named_parameters() if p.grad is not None)

        def end() -> None:
            if done is None:
                raise WorkError(f"{reason}; {kept}", hint=lower)
            folder = self._checkpoints.run.path / "reports" / f"step-{self.progress.step:06d}"
            try:
                self._write_report(folder, reason, done, weights, layers, gradients)
            except OSError as error:
                raise WorkError(f"{reason}; {kept}; the report could not be written: {error}", hint=lower) from None
            hint = f"`tinylm train --replay {folder}` does that step again; {lower}"
            raise WorkError(f"{reason}; {kept}", hint=hint)

        self._processes.run_on_main(end)

    def _write_report(
        self,
        folder: Path,
        reason: str,
        done: _Step,
        weights: dict[str, Tensor],
        layers: dict[str, float],
        gradients: dict[str, float],
    ) -> None:
        size = self.recipe.training.global_batch_size
        cursor = done.cursor - size
        sequences = torch.from_numpy(self.batches.sequences(cursor, size))
        report = Report(
            reason=reason,
            step=done.number,
            cursor=cursor,
            loss=done.loss,
            grad_norm=done.norm,
            micro_batch_size=self.micro_batch_size,
            precision=self.precision.name,
            scale=float(self.scaler.get_scale()),
            device=str(self.precision.device),
            vocab_size=self.network.vocab_size,
            processes=self._processes.count,
            threads=torch.get_num_threads(),
            weights=layers,
            gradients=gradients,
        )
        write_report(folder, report, self.recipe, weights, sequences, [self._read(row) for row in sequences.tolist()])

    def _log_due(self) -> bool:
        return self.progress.step == 1 or self.progress.step % self.recipe.training.log_every == 0

    def _log(self, done: _Step) -> None:
        progress = self.progress
        tokens = (progress.step - self._logged_step) * self.recipe.training.global_batch_size * self.batches.context_length
        seconds = max(progress.train_seconds - self._logged_seconds, 1e-9)
        self._logged_step, self._logged_seconds = progress.step, progress.train_seconds
        group = next(iter(self.optimizers.parts.values())).param_groups[0]
        self._observer.step(
            StepEvent(
                step=progress.step,
                tokens=progress.tokens,
                loss=done.loss,
                lr=float(group["lr"]),
                grad_norm=done.norm,
                tokens_per_second=tokens / seconds,
                mfu=tokens / seconds * self._utilisation,
                seconds=progress.seconds,
                done=min(1.0, self._done()),
                batch=f"{done.fingerprint:016x}",
            )
        )

    def _save(self) -> bool:
        """Begin to save. False when the weights are no numbers and the training went back instead."""
        self._wait_for_save()
        unusable = not all(bool(p.isfinite().all()) for p in self._own_weights())
        if self._processes.any(unusable):
            self._rollback(f"the weights after step {self.progress.step} are not all numbers", None)
            return False
        self._observer.phase("saving")
        state = {**asdict(self.progress), "scaler": self.scaler.state_dict(), "fingerprints": self._fingerprints}
        moments = self._parallel.host_copies(self.optimizers.state())
        self._checkpoints.begin(Snapshot(self._parallel.weights(), moments, state))
        self._observer.phase("training")
        return True

    def _own_weights(self) -> Iterator[Tensor]:
        for parameter in self.network.parameters():
            yield parameter.to_local() if hasattr(parameter, "to_local") else parameter

    def _wait_for_save(self) -> None:
        """Wait for what is being saved."""
        with self._disk():
            checkpoint = self._checkpoints.finish()
            if checkpoint is not None:
                self._saved_step = checkpoint.step
                self._observer.saved(checkpoint.step)
                self._checkpoints.prune()

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """What a disk refuses ends the training, or is said and tried again at the next checkpoint, as the recipe has it."""
        try:
            yield
        except TinylmError as error:
            if self.recipe.checkpoint.on_failure == "stop":
                raise
            self._save_error = error
            self._observer.note(f"{error}; going on without it (checkpoint.on_failure: continue)")

    def _measure(self, request: StopRequest) -> None:
        self._observer.phase("evaluating")

        def poll(done: int) -> None:
            self._sync_stop_state(request)
            if self._signal:
                raise _EvaluationInterrupted

        try:
            with torch.compiler.set_stance("force_eager"):  # its shapes differ: each would be compiled
                measured = self._evaluate(self.network, poll)
        except _EvaluationInterrupted:
            return
        finally:
            self._observer.phase("training")
        self._wait_for_save()
        progress = self.progress
        if not math.isfinite(measured.loss):
            self._abort(f"the held-out loss of step {progress.step} is {measured.loss}", self._saved_step, None)
        progress.val_loss, progress.val_bits_per_byte = measured.loss, measured.bits_per_byte
        progress.evaluated_step = progress.step
        better = progress.best_val_loss is None or measured.loss < progress.best_val_loss
        best = better and self._saved_step == progress.step
        if best:
            progress.best_step, progress.best_val_loss = progress.step, measured.loss
            with self._disk():
                self._checkpoints.point("best", f"step-{progress.step:06d}")
                self._checkpoints.prune()
        self._observer.evaluation(
            EvaluationEvent(
                step=progress.step,
                tokens=progress.tokens,
                val_loss=measured.loss,
                val_bits_per_byte=measured.bits_per_byte,
                train_seconds=progress.train_seconds,
                seconds=progress.seconds,
                best=best,
            )
        )

    def _sample(self) -> None:
        self._observer.phase("sampling")
        with torch.compiler.set_stance("force_eager"), self._parallel.whole() as network:
            if network is not None:
                for prompt in self.recipe.sampling.prompts:
                    self._observer.sample(SampleEvent(self.progress.step, prompt, self._write(network, prompt)))
        self._observer.phase("training")
