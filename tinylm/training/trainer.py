"""The loop: steps, measurements, checkpoints, until the recipe's length is reached or someone stops it.

Everything that a step does is a function of the recipe, the seed and the number of the step, so that a run that was
stopped and resumed is the run that was not. How to evaluate and how to sample are handed in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch

from tinylm.data.batches import Batches
from tinylm.errors import WorkError
from tinylm.model.objective import CausalObjective
from tinylm.model.transformer import Transformer
from tinylm.optim.groups import Optimizers
from tinylm.optim.schedules import multiplier
from tinylm.recipe import Recipe
from tinylm.training.checkpoint import CheckpointWriter
from tinylm.training.feed import Feed
from tinylm.training.memory import halved, is_out_of_memory
from tinylm.training.metrics import EvaluationEvent, Observer, SampleEvent, StepEvent
from tinylm.training.precision import Precision
from tinylm.training.signals import StopRequest
from tinylm.training.step import accumulate


class Measured(Protocol):
    """What the trainer needs to know of an evaluation."""

    @property
    def loss(self) -> float: ...

    @property
    def bits_per_byte(self) -> float: ...


Poll = Callable[[int], None]
Evaluate = Callable[[Transformer, Poll], Measured]
Write = Callable[[Transformer, str], str]


@dataclass
class Progress:
    """Where a training stands; saved with every checkpoint. Losses are None until there is one."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    train_loss: float | None = None
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    evaluated_step: int = 0
    best_step: int = 0
    best_val_loss: float | None = None

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        return cls(**{field.name: state[field.name] for field in fields(cls)})


class _EvaluationInterrupted(Exception):
    """A signal came while measuring."""


class Trainer:
    """Trains one network. `steps` None: for `minutes`, by the clock."""

    def __init__(
        self,
        recipe: Recipe,
        network: Transformer,
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
        observer: Observer,
    ) -> None:
        self.recipe = recipe
        self.network = network
        self.optimizers = optimizers
        self.batches = batches
        self.steps = steps
        self.micro_batch_size = micro_batch_size
        self.precision = precision
        self.scaler = precision.scaler()
        self.progress = Progress()
        self._objective = CausalObjective()
        self._utilisation = flops_per_token / peak_flops
        self._checkpoints = checkpoints
        self._fingerprints = fingerprints
        self._evaluate = evaluate
        self._write = write
        self._observer = observer
        self._logged_step = 0
        self._logged_seconds = 0.0

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; weights and optimiser are already restored."""
        self.progress = Progress.from_state(state)
        if state["scaler"]:  # empty where the training so far was not in fp16
            self.scaler.load_state_dict(state["scaler"])
        self._logged_step, self._logged_seconds = self.progress.step, self.progress.train_seconds

    def train(self, request: StopRequest, stop_after: float | None = None) -> str:
        """Run to the end: `done`, or `time` after `stop_after` seconds, or `signal`. Saved and measured when it returns.

        Raises `WorkError` when the loss is no longer a number.
        """
        with Feed(self.batches, self._objective, pin=self.precision.device.type == "cuda") as feed:
            return self._loop(feed, request, stop_after)

    def _loop(self, feed: Feed, request: StopRequest, stop_after: float | None) -> str:
        began = time.perf_counter()
        earlier = self.progress.seconds
        training = self.recipe.training
        self.network.train()
        if self.progress.step:
            self._look(request)
        stopped, finished = "done", self._finished()
        while stopped == "done" and not finished:
            loss, norm = self._step(feed)
            progress = self.progress
            progress.seconds = earlier + time.perf_counter() - began
            finished = self._finished()
            if not finished and request.signal_number is not None:
                stopped = "signal"
            elif not finished and stop_after is not None and progress.seconds - earlier >= stop_after:
                stopped = "time"
            ending = finished or stopped != "done"
            saving = ending or self._evaluation_due() or progress.step % self.recipe.checkpoint.every == 0
            if saving or progress.step == 1 or progress.step % training.log_every == 0:
                self._log(loss, norm)
            if saving:
                self._save()
            if stopped == "done":
                self._look(request)
            progress.seconds = earlier + time.perf_counter() - began
            if stopped == "done" and request.signal_number is not None and not finished:
                stopped = "signal"
                if not saving:  # the signal came after that was decided
                    self._save()
        measured = self.progress.evaluated_step == self.progress.step
        return stopped if measured or stopped != "done" else "signal"  # one that came during the last evaluation

    def _look(self, request: StopRequest) -> None:
        """Measure and sample when it is time. A resumed training does so first: its checkpoint was saved before that."""
        if self._evaluation_due() and request.signal_number is None:
            self._measure(request)
        every = self.recipe.sampling.every
        if every is not None and request.signal_number is None and (self._finished() or self.progress.step % every == 0):
            self._sample()

    def _evaluation_due(self) -> bool:
        return self._finished() or self.progress.step % self.recipe.evaluation.every == 0

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

    def _step(self, feed: Feed) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimiser step: (mean loss of the global batch, gradient norm), still on the device."""
        start = time.perf_counter()
        training, progress = self.recipe.training, self.progress
        rate = multiplier(training.schedule, self._done(), self._step_share())
        self.optimizers.set_rate(rate)
        loss = self._gradient(feed)
        self.scaler.unscale_(self.optimizers)  # type: ignore[arg-type]  # groups and a step are all it needs
        limit = training.clip_grad_norm if training.clip_grad_norm is not None else math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        self.scaler.step(self.optimizers)  # type: ignore[arg-type]
        self.scaler.update()
        progress.step += 1
        progress.tokens += training.global_batch_size * self.batches.context_length
        progress.train_seconds += time.perf_counter() - start
        return loss, norm

    def _gradient(self, feed: Feed) -> torch.Tensor:
        """The gradient of one global batch; its mean loss. Where memory runs out, again in smaller micro-batches."""
        size = self.recipe.training.global_batch_size
        batch = feed.take(self.progress.step * size, size)
        while True:
            self.optimizers.zero_grad()
            seeds = self._seeds() if self.recipe.model.draws else None
            try:
                with self.precision.tf32():
                    return accumulate(
                        self.network, self._objective, batch, self.micro_batch_size, self.precision, self.scaler, seeds
                    )
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                needed = str(error).splitlines()[0]
            self._halve(needed)

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
        self.micro_batch_size = halved(before, batch)
        self._observer.note(
            f"out of memory: going on with {batch // self.micro_batch_size} micro-batches of {self.micro_batch_size} "
            f"instead of {batch // before} of {before}; the global batch stays {batch}"
        )

    def _seeds(self) -> Iterator[int]:
        """A seed per micro-batch, from the step and the seed alone."""
        mixed = (self.recipe.seed * 6364136223846793005 + self.progress.step) * 6364136223846793005
        for micro in range(self.recipe.training.global_batch_size):
            yield (mixed + micro) % 2**63

    def _log(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        start = time.perf_counter()
        value = float(loss)  # on a GPU this waits for the work of the steps since the last time
        progress = self.progress
        progress.train_seconds += time.perf_counter() - start
        if not math.isfinite(value):
            raise self._diverged(f"the loss of step {progress.step} is {value}")
        progress.train_loss = value
        tokens = (progress.step - self._logged_step) * self.recipe.training.global_batch_size * self.batches.context_length
        seconds = max(progress.train_seconds - self._logged_seconds, 1e-9)
        self._logged_step, self._logged_seconds = progress.step, progress.train_seconds
        group = next(iter(self.optimizers.parts.values())).param_groups[0]
        self._observer.step(
            StepEvent(
                step=progress.step,
                tokens=progress.tokens,
                loss=value,
                lr=float(group["lr"]),
                grad_norm=float(norm),
                tokens_per_second=tokens / seconds,
                mfu=tokens / seconds * self._utilisation,
                seconds=progress.seconds,
                done=min(1.0, self._done()),
            )
        )

    def _diverged(self, what: str) -> WorkError:
        saved = self._checkpoints.run.checkpoints()
        kept = f"the checkpoint of step {saved[-1].step} is whole" if saved else "nothing was saved"
        hint = "lower training.optimizer.lr, or look at the text with `tinylm tokenize report`"
        return WorkError(f"{what}; {kept}", hint=hint)

    def _save(self) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in self.network.parameters()):
            raise self._diverged(f"the weights after step {self.progress.step} are not all numbers")
        self._observer.phase("saving")
        state = {**asdict(self.progress), "scaler": self.scaler.state_dict(), "fingerprints": self._fingerprints}
        self._checkpoints.save(self.network, self.optimizers, state)
        self._checkpoints.prune()
        self._observer.saved(self.progress.step)
        self._observer.phase("training")

    def _measure(self, request: StopRequest) -> None:
        self._observer.phase("evaluating")

        def poll(done: int) -> None:
            if request.signal_number is not None:
                raise _EvaluationInterrupted

        try:
            with torch.compiler.set_stance("force_eager"):  # its shapes differ: each would be compiled
                measured = self._evaluate(self.network, poll)
        except _EvaluationInterrupted:
            return
        finally:
            self._observer.phase("training")
        progress = self.progress
        if not math.isfinite(measured.loss):
            raise self._diverged(f"the held-out loss of step {progress.step} is {measured.loss}")
        progress.val_loss, progress.val_bits_per_byte = measured.loss, measured.bits_per_byte
        progress.evaluated_step = progress.step
        best = progress.best_val_loss is None or measured.loss < progress.best_val_loss
        if best:
            progress.best_step, progress.best_val_loss = progress.step, measured.loss
            self._checkpoints.point("best", f"step-{progress.step:06d}")
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
        self._checkpoints.prune()

    def _sample(self) -> None:
        self._observer.phase("sampling")
        with torch.compiler.set_stance("force_eager"):
            for prompt in self.recipe.sampling.prompts:
                self._observer.sample(SampleEvent(self.progress.step, prompt, self._write(self.network, prompt)))
        self._observer.phase("training")
