"""What a recipe leaves to `auto`, decided here by trying it: precision, micro-batch, compilation, threads.

Every decision is written into the run's recipe, so that resuming repeats it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tinylm.cost import plan
from tinylm.data.batches import Batches
from tinylm.model.objective import CausalObjective
from tinylm.model.transformer import Transformer
from tinylm.optim.groups import orthogonalisation_type
from tinylm.processes import SINGLE_PROCESS, Processes
from tinylm.recipe import Recipe
from tinylm.recipe.schema import MuonOptimizer
from tinylm.reporting import SILENT, Reporter
from tinylm.training import compilation
from tinylm.training import precision as precisions
from tinylm.training.feed import Feed, GlobalBatch
from tinylm.training.out_of_memory import halved, is_out_of_memory
from tinylm.training.precision import Precision


@dataclass(frozen=True)
class Decided:
    recipe: Recipe
    precision: Precision
    start_up_seconds: float
    """What compiling took."""


def decide(
    recipe: Recipe,
    network: Transformer,
    batches: Batches,
    steps: int | None,
    reporter: Reporter,
    stop_after: float | None = None,
    *,
    resumed: bool = False,
    processes: Processes = SINGLE_PROCESS,
) -> Decided:
    """The recipe with every `auto` decided, and the network compiled if so. `steps` None: the clock decides.

    `stop_after`: seconds after which this process will stop. A `resumed` training that was compiled goes on without, and
    says so, where that is not possible any more. Of several processes the main one decides for all.
    """
    device = next(network.parameters()).device
    with Feed(batches, CausalObjective(), pin=False) as feed:
        batch = feed.take(0, recipe.training.global_batch_size)
    chosen = processes.run_on_main(lambda: _chosen(recipe, network, batch, steps, reporter, stop_after, device, processes.count))
    training = chosen.training
    precision, compiled, start_up = Precision(training.precision, device), bool(training.compile), 0.0
    if compiled:
        trial = _trial(network, batch, int(training.micro_batch_size), precision)
        demanded = recipe.training.compile is True and not resumed
        start_up = processes.run_on_all(
            lambda: compilation.compile_blocks(network, trial, demanded=demanded, reporter=reporter if processes.main else SILENT)
        )
        compiled = not processes.any(start_up == 0)
    training = training.model_copy(update={"compile": compiled})
    return Decided(chosen.model_copy(update={"training": training}), precision, start_up)


def _chosen(
    recipe: Recipe,
    network: Transformer,
    batch: GlobalBatch,
    steps: int | None,
    reporter: Reporter,
    stop_after: float | None,
    device: torch.device,
    devices: int,
) -> Recipe:
    """The recipe with every `auto` decided."""
    training = recipe.training
    precision = precisions.resolve(training.precision, device, reporter)
    micro = _micro_batch(recipe, network, precision, devices)
    if training.micro_batch_size == "auto":
        micro = _fitting(network, batch, micro, precision, devices)
    if training.precision == "auto" and device.type == "cpu" and precision.name == "bf16":
        precision = _faster(Precision("fp32", device), precision, network, batch, micro)
    if training.precision == "auto":
        reporter.note(f"computing in {precision.name} (training.precision: auto)")
    compiled = training.compile
    if compiled == "auto":
        trial = _trial(network, batch, micro, precision)
        compiled = compilation.compiler(device) is not None and _pays(recipe, trial, micro, steps, stop_after, reporter, devices)
        if compiled:
            reporter.note("compiling the blocks: it takes some seconds and makes every step faster (training.compile)")
    update = {"precision": precision.name, "micro_batch_size": micro, "compile": compiled, "optimizer": training.optimizer}
    if isinstance(training.optimizer, MuonOptimizer):
        decided = {"newton_schulz_dtype": orthogonalisation_type(training.optimizer, device)}
        update["optimizer"] = training.optimizer.model_copy(update=decided)
    return recipe.model_copy(update={"training": training.model_copy(update=update)})


def _faster(plain: Precision, other: Precision, network: Transformer, batch: GlobalBatch, micro: int) -> Precision:
    """`other` where it is clearly faster. They are tried in turn, twice: what else the machine does comes and goes."""
    trials = {each: _trial(network, batch, micro, each) for each in (plain, other)}
    rounds = [{each: trial.seconds(repeat=1) for each, trial in trials.items()} for _ in range(2)]
    seconds = {each: min(found[each] for found in rounds) for each in trials}
    return other if seconds[other] < plan.CLEARLY_FASTER * seconds[plain] else plain


def _micro_batch(recipe: Recipe, network: Transformer, precision: Precision, devices: int) -> int:
    device = precision.device
    memory: int
    most_tokens: int | None = None
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0]
    elif device.type == "mps":
        memory = torch.mps.recommended_max_memory()
    else:
        memory, most_tokens = plan.host_memory_bytes() // devices, plan.CPU_MICRO_BATCH_TOKENS
    half = precision.name != "fp32"
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"precision": precision.name})})
    return plan.choose_micro_batch(recipe, network.vocab_size, memory, most_tokens, half=half, devices=devices)


def _fitting(network: Transformer, batch: GlobalBatch, micro: int, precision: Precision, devices: int) -> int:
    """The micro-batch, or the largest half of a half of it with which a pass does not run out of memory."""
    while micro > 1:
        try:
            _trial(network, batch, micro, precision).run()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            break
        micro = halved(micro, len(batch.example.inputs) // devices)
    return micro


def _trial(network: Transformer, batch: GlobalBatch, micro: int, precision: Precision) -> compilation.Trial:
    return compilation.Trial(network, CausalObjective(), batch, micro, precision)


def _pays(
    recipe: Recipe,
    trial: compilation.Trial,
    micro: int,
    steps: int | None,
    stop_after: float | None,
    reporter: Reporter,
    devices: int,
) -> bool:
    training = recipe.training
    try:
        step_seconds = trial.seconds() * training.global_batch_size / micro / devices
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reporter.note("not compiling: a micro-batch does not fit into memory")  # the trainer will make it smaller
        return False
    ends = [stop_after, None if training.minutes is None else 60 * training.minutes]
    seconds_left = min((end for end in ends if end is not None), default=None)
    return plan.compiling_pays(step_seconds, seconds_left, steps, trial.device.type)


def use_fastest_threads(recipe: Recipe, vocab_size: int, batches: Batches, devices: int = 1) -> int:
    """Let torch use as many CPU threads as are fastest for this model: those it has, a half, a quarter, ..., or one."""
    network = Transformer(recipe.model, vocab_size)
    memory = plan.host_memory_bytes() // devices
    micro = plan.choose_micro_batch(recipe, vocab_size, memory, plan.CPU_MICRO_BATCH_TOKENS, devices=devices)
    with Feed(batches, CausalObjective(), pin=False) as feed:
        batch = feed.take(0, recipe.training.global_batch_size)
    trial = _trial(network, batch, micro, Precision("fp32", torch.device("cpu")))
    best = torch.get_num_threads()
    fastest = trial.seconds()
    while best > 1:
        torch.set_num_threads(best // 2)
        seconds = trial.seconds()
        if seconds > plan.CLEARLY_FASTER * fastest:
            break
        best, fastest = best // 2, seconds
    torch.set_num_threads(best)
    return best
