"""Resolve `auto` settings for precision, micro-batch size, compilation and CPU threads with short trials on this machine.

The choices are written to the run's recipe, so that a resumed run keeps them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from tinylm.cost import step_time
from tinylm.cost.examples import ExampleSize
from tinylm.cost.micro_batch import CPU_MICRO_BATCH_TOKENS, choose_micro_batch, host_memory_bytes
from tinylm.cost.parameters import not_estimated
from tinylm.data.datasets import Dataset, example_size
from tinylm.model import registry
from tinylm.model.base import Model
from tinylm.optim.groups import resolve_muon
from tinylm.processes import SINGLE_PROCESS, Processes
from tinylm.recipe import Recipe
from tinylm.recipe.schema import MuonOptimizer
from tinylm.reporting import SILENT, Reporter
from tinylm.training import compilation, graphed, parallel
from tinylm.training import precision as precisions
from tinylm.training.compilation import Trial
from tinylm.training.feed import Feed, LocalBatch
from tinylm.training.objectives import Objective
from tinylm.training.out_of_memory import is_out_of_memory, smaller_micro_batch
from tinylm.training.precision import Precision
from tinylm.training.step import GradientSettings

_ROUNDS = 2
"""Maximum number of timed trials in each precision."""


@dataclass(frozen=True)
class Budget:
    """How long this process will train."""

    steps: int | None
    """None if the recipe's `training.minutes` limits the run instead."""
    stop_after: float | None = None
    """Seconds after which to stop early."""

    def seconds(self, minutes: float | None) -> float | None:
        """Return the time limit in seconds, or None if there is no limit. `minutes` is the recipe's `training.minutes`."""
        limits = [self.stop_after, None if minutes is None else 60 * minutes]
        return min((limit for limit in limits if limit is not None), default=None)


@dataclass(frozen=True)
class ResolvedSettings:
    """The result of `resolve`."""

    recipe: Recipe
    """The recipe with every `auto` replaced with a value."""
    precision: Precision
    compile_seconds: float
    """Time spent on compilation. It is 0 if nothing was compiled."""


def resolve(
    recipe: Recipe,
    network: Model,
    dataset: Dataset,
    objective: Objective,
    budget: Budget,
    reporter: Reporter,
    *,
    resumed: bool = False,
    processes: Processes = SINGLE_PROCESS,
) -> ResolvedSettings:
    """Choose a value for every `auto` setting, and compile `network` unless `training.compile` is set or resolved to false.

    With several processes, the main process chooses for all of them. If compilation fails, a new run whose recipe requires it
    raises `WorkError`. Other runs, including `resumed` ones, continue without compilation after a warning.
    """
    device = network.device
    batch = _first_batch(recipe, dataset, objective)
    chooser = _Chooser(recipe, network, batch, example_size(dataset), objective, budget, reporter, processes.world_size)
    chosen = processes.run_on_main(chooser.resolve)
    training = chosen.training
    precision, compiled, seconds = Precision(training.precision, device), training.compile, 0.0
    if compiled == "model" and parallel.resolve(recipe, network.vocab_size, device, processes) == "fsdp":
        reporter.note("compiling each block, because FSDP gathers the weights of one block at a time (training.compile)")
        compiled = True
    if compiled == "graph" and (reason := graphed.unsupported_reason(recipe, precision, processes.world_size)):
        reporter.note(f"compiling each block without CUDA graphs (training.compile: graph): {reason}")
        compiled = True
    if compiled:
        trial = Trial(network, batch, GradientSettings(int(training.micro_batch_size), precision, objective))
        options = {
            "required": recipe.training.compile != "auto" and not resumed,
            "together": compiled == "model",
            "dynamic": chooser.size is not None,
        }
        main_reporter = reporter if processes.is_main else SILENT
        seconds = processes.run_on_all(lambda: compilation.compile_units(network, trial, reporter=main_reporter, **options))
        if processes.any(seconds == 0):
            compiled = False
        elif recipe.training.compile == "auto" and processes.world_size == 1 and chooser.may_compile_together(trial):
            reporter.note("compiling all blocks together, to compare the speed; this takes some minutes (training.compile)")
            faster, more_seconds = compilation.compile_together_if_faster(network, trial, reporter)
            compiled, seconds = "model" if faster else True, seconds + more_seconds
    training = training.model_copy(update={"compile": compiled})
    return ResolvedSettings(chosen.model_copy(update={"training": training}), precision, seconds)


@dataclass(frozen=True)
class _Chooser:
    """Chooses the values of `auto` settings in one process."""

    recipe: Recipe
    network: Model
    batch: LocalBatch
    size: ExampleSize | None
    """The size of the training examples, or None if they all fill the context."""
    objective: Objective
    budget: Budget
    reporter: Reporter
    world_size: int
    _warm_up_seconds: dict[tuple[int, str], float] = field(default_factory=dict)
    """Seconds that the first micro-batch took, by micro-batch size and name of the precision."""

    @property
    def device(self) -> torch.device:
        return self.network.device

    def resolve(self) -> Recipe:
        """Return the recipe without `auto`. Unless `training.compile` is false in the result, the caller should try to compile."""
        training = self.recipe.training
        precision = precisions.resolve(training.precision, self.device, self.reporter)
        micro_batch_size = self._estimate_micro_batch(precision)
        if training.micro_batch_size == "auto":
            if ignored := not_estimated(self.recipe.model):
                self.reporter.note(f"training.micro_batch_size: auto does not estimate the memory of {', '.join(ignored)}")
            micro_batch_size = self._reduce_until_it_fits(micro_batch_size, precision)
        if training.precision == "auto":
            if self.device.type == "cpu" and precision.name == "bf16":
                precision = self._faster_of(Precision("fp32", self.device), precision, micro_batch_size)
            self.reporter.note(f"computing in {precision.name} (training.precision: auto)")
        compiled = training.compile
        if compiled == "auto":
            supported = True in self.recipe.model.training_values.get("compile", (True,))
            supported = supported and self.size is None  # compiled code is specialized to one length
            available = supported and compilation.available_compiler(self.device) is not None
            compiled = available and self._compilation_pays_off(micro_batch_size, precision)
            if compiled:
                self.reporter.note("compiling the blocks, which takes a few seconds and makes every step faster (training.compile)")
        update = {
            "precision": precision.name,
            "micro_batch_size": micro_batch_size,
            "compile": compiled,
            "optimizer": training.optimizer,
        }
        if isinstance(training.optimizer, MuonOptimizer):
            update["optimizer"] = resolve_muon(training.optimizer, self.device)
        return self.recipe.model_copy(update={"training": training.model_copy(update=update)})

    def may_compile_together(self, trial: Trial) -> bool:
        """Whether the run is so long that compiling all blocks together could pay off, given compiled blocks."""
        if not self.network.compile_stacks() or self.device.type not in step_time.COMPILED_TOGETHER:
            return False
        step_seconds = self._step_seconds(trial.seconds(repeat=1), trial.settings.micro_batch_size)
        seconds_left = self.budget.seconds(self.recipe.training.minutes)
        return step_time.compiling_together_may_pay_off(step_seconds, seconds_left, self.budget.steps, self.device.type)

    def _step_seconds(self, micro_batch_seconds: float, micro_batch_size: int) -> float:
        return micro_batch_seconds * self.recipe.training.global_batch_size / micro_batch_size / self.world_size

    def _trial(self, micro_batch_size: int, precision: Precision) -> Trial:
        return Trial(self.network, self.batch, GradientSettings(micro_batch_size, precision, self.objective))

    def _faster_of(self, fp32: Precision, bf16: Precision, micro_batch_size: int) -> Precision:
        """Return `bf16` if it is clearly faster, else `fp32`.

        The trials alternate because the load on the machine varies. If one precision takes less than half of the other's time, a
        second round is not needed.
        """
        trials = {precision: self._trial(micro_batch_size, precision) for precision in (fp32, bf16)}
        for precision, trial in trials.items():
            if (micro_batch_size, precision.name) not in self._warm_up_seconds:
                trial.run()
        seconds = dict.fromkeys(trials, math.inf)
        for _ in range(_ROUNDS):
            for precision, trial in trials.items():
                seconds[precision] = min(seconds[precision], trial.run())
            if max(seconds.values()) > 2 * min(seconds.values()):
                break
        return bf16 if seconds[bf16] < step_time.CLEARLY_FASTER * seconds[fp32] else fp32

    def _estimate_micro_batch(self, precision: Precision) -> int:
        """Return the recipe's micro-batch size. For `auto`, estimate the largest size that fits into memory."""
        device = self.device
        memory: int
        max_tokens: int | None = None
        if device.type == "cuda":
            memory = torch.cuda.mem_get_info(device)[0]
        elif device.type == "mps":
            memory = torch.mps.recommended_max_memory()
        else:
            memory, max_tokens = host_memory_bytes() // self.world_size, CPU_MICRO_BATCH_TOKENS
        training = self.recipe.training.model_copy(update={"precision": precision.name})
        recipe = self.recipe.model_copy(update={"training": training})
        half = precision.name != "fp32"
        return choose_micro_batch(
            recipe, self.network.vocab_size, memory, max_tokens, half=half, devices=self.world_size, size=self.size
        )

    def _reduce_until_it_fits(self, size: int, precision: Precision) -> int:
        """Halve the micro-batch size until a forward and backward pass does not run out of memory."""
        while size > 1:
            try:
                self._warm_up_seconds[size, precision.name] = self._trial(size, precision).run()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            else:
                break
            size = smaller_micro_batch(size, len(self.batch.share) // self.world_size)
        return size

    def _compilation_pays_off(self, micro_batch_size: int, precision: Precision) -> bool:
        """Time an eager micro-batch and predict whether compilation saves time within the budget.

        If it does not pay off even for a slow first micro-batch, no others are run.
        """
        seconds_left = self.budget.seconds(self.recipe.training.minutes)

        def pays_off(micro_batch_seconds: float) -> bool:
            step_seconds = self._step_seconds(micro_batch_seconds, micro_batch_size)
            return step_time.compilation_pays_off(step_seconds, seconds_left, self.budget.steps, self.device.type)

        warm_up_seconds = self._warm_up_seconds.get((micro_batch_size, precision.name))
        if warm_up_seconds is not None and not pays_off(warm_up_seconds):
            return False
        trial = self._trial(micro_batch_size, precision)
        try:
            return pays_off(trial.seconds(is_fast_enough=lambda seconds: not pays_off(seconds)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.reporter.note("not compiling: a micro-batch does not fit into memory")  # the trainer will reduce it
            return False


def use_fastest_threads(recipe: Recipe, vocab_size: int, dataset: Dataset, objective: Objective, world_size: int = 1) -> int:
    """Find the fastest number of CPU threads for this model, set it in torch, and return it.

    The current number is halved as long as that makes a micro-batch clearly faster.
    """
    network = registry.build(recipe.model, vocab_size, seed=0, objective=recipe.objective)
    memory = host_memory_bytes() // world_size
    micro_batch_size = choose_micro_batch(
        recipe, vocab_size, memory, CPU_MICRO_BATCH_TOKENS, devices=world_size, size=example_size(dataset)
    )
    settings = GradientSettings(micro_batch_size, Precision("fp32", torch.device("cpu")), objective)
    trial = Trial(network, _first_batch(recipe, dataset, objective), settings)
    threads = torch.get_num_threads()
    best_seconds = trial.seconds()
    while threads > 1:
        torch.set_num_threads(threads // 2)
        seconds = trial.seconds()
        if seconds > step_time.CLEARLY_FASTER * best_seconds:
            break
        threads, best_seconds = threads // 2, seconds
    torch.set_num_threads(threads)
    return threads


def _first_batch(recipe: Recipe, dataset: Dataset, objective: Objective) -> LocalBatch:
    with Feed(dataset, objective, seed=recipe.seed) as feed:
        return feed.batch(0, recipe.training.global_batch_size)
