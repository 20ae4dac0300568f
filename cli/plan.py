"""`tinylm plan`: estimate the cost of a recipe. This module also defines the hardware options of `tinylm new`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from tinylm.cost.plan import ComputeOptimal, Plan, SourceUse

from .console import (
    JSON,
    QUIET,
    SET,
    ConsoleReporter,
    format_count,
    format_duration,
    format_size,
    format_step_time,
    print_fields,
    print_json,
    stderr_console,
    stdout_console,
    write_stdout,
)
from .plan_cluster import LaunchFiles, checked_devices, launch_files, parse_counts, show_scaling
from .recipe_files import find_recipe

HARDWARE = typer.Option(
    None,
    "--hardware",
    metavar="NAME",
    help="Plan for an accelerator such as h100-sxm instead of this CPU. `list` prints the names.",
)

app = typer.Typer(add_completion=False)


@app.command()
def plan(
    recipe: str | None = typer.Argument(None, help="A YAML file, or the name of a shipped recipe.", show_default=False),
    set_: list[str] | None = SET,
    hardware: str | None = HARDWARE,
    devices: int | None = typer.Option(None, "--devices", min=1, help="Number of accelerators. Each batch is divided among them."),
    nodes: int | None = typer.Option(None, "--nodes", min=1, help="Number of machines. Each has --gpus-per-node accelerators."),
    gpus_per_node: int = typer.Option(8, "--gpus-per-node", min=1, help="Number of accelerators in each machine."),
    network: float | None = typer.Option(
        None,
        "--network",
        min=0.1,
        metavar="GBIT/S",
        help="Network bandwidth of each machine. Default: that of the usual machine with eight of these accelerators.",
    ),
    gpus: str | None = typer.Option(
        None,
        "--gpus",
        metavar="N,N,...",
        help="Instead of a plan, print the step time for each of these numbers of accelerators, for example 1,8,64,1024.",
    ),
    sbatch: str | None = typer.Option(None, "--sbatch", metavar="FILE", help="Write a Slurm batch script that trains the model."),
    skypilot: str | None = typer.Option(None, "--skypilot", metavar="FILE", help="Write a SkyPilot task that trains the model."),
    time_limit: str | None = typer.Option(
        None,
        "--time-limit",
        metavar="TIME",
        help="With --sbatch: when Slurm ends the job, for example 12h. The job then continues in the queue. Default: 24h.",
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the files of --sbatch and --skypilot."),
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Estimate the cost of a recipe on this CPU or on accelerators: parameters, batch sizes, memory, FLOPs and time.

    It can also write the files that start the training run on a cluster.
    """
    from tinylm.errors import InputError
    from tinylm.recipe import load

    if hardware == "list":
        list_hardware(json)
        return
    if recipe is None:
        raise InputError("missing argument 'recipe'")
    check_hardware(hardware, devices)
    for option, value in (("--nodes", nodes), ("--network", network), ("--gpus", gpus)):
        if value is not None and hardware is None:
            raise InputError("requires --hardware", where=option)
    reporter = ConsoleReporter(stderr_console(), quiet=quiet)
    if gpus is not None and hardware is not None:
        counts = parse_counts(gpus)
        if given := next((name for name, value in (("--devices", devices), ("--nodes", nodes)) if value is not None), None):
            raise InputError("mutually exclusive", where=f"--gpus, {given}")
        if sbatch is not None or skypilot is not None:
            raise InputError("mutually exclusive", where="--gpus, --sbatch, --skypilot")
        loaded = load(find_recipe(recipe), set_ or (), check_files=False)
        show_scaling(loaded, hardware, counts, gpus_per_node=gpus_per_node, network_gbits=network, reporter=reporter, json=json)
        return
    total = checked_devices(devices, nodes, gpus_per_node)
    loaded = load(find_recipe(recipe), set_ or ())
    if skypilot is not None and loaded.checkpoint.mirror is None:
        reporter.warn("checkpoint.mirror is not set, so the run starts from scratch if SkyPilot replaces the machines")
    files = launch_files(
        recipe,
        loaded,
        set_ or (),
        hardware,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        sbatch=sbatch,
        skypilot=skypilot,
        time_limit=time_limit,
        overwrite=overwrite,
    )
    planned = plan_recipe(loaded, reporter, hardware, total, gpus_per_node=gpus_per_node, network_gbits=network)
    show_plan(planned, json, files)
    files.write()


def check_hardware(hardware: str | None, devices: int | None) -> None:
    """Raise `InputError` for an unknown accelerator, or for `--devices` without `--hardware`. Call this before reading the text."""
    from tinylm.cost import accelerators
    from tinylm.errors import InputError

    if devices is not None and hardware is None:
        raise InputError("requires --hardware", where="--devices")
    if hardware is not None:
        accelerators.find(hardware)


def list_hardware(json: bool) -> None:
    """Print the known accelerators with the figures from their data sheets."""
    from tinylm.cost.accelerators import ACCELERATORS

    if json:
        print_json({"accelerators": ACCELERATORS})
        return
    for accelerator in ACCELERATORS:
        flops = ", ".join(f"{precision} {value / 1e12:g}" for precision, value in accelerator.flops.items())
        memory = f"{accelerator.memory / 1e9:3.0f} GB at {accelerator.bandwidth / 1e12:.2f} TB/s"
        write_stdout(f"{accelerator.name:<16}  {memory}; TFLOP/s: {flops}")


def plan_recipe(
    recipe: object,
    reporter: ConsoleReporter,
    hardware: str | None = None,
    devices: int = 1,
    *,
    gpus_per_node: int = 8,
    network_gbits: float | None = None,
) -> Plan:
    """Count the tokens in the text and plan the training run. `hardware` is the name of an accelerator, or None for this CPU."""
    from tinylm.cost.plan import BUSY, make_plan
    from tinylm.data.estimate import estimate_data_size
    from tinylm.ensemble import teacher_runs
    from tinylm.recipe import Recipe
    from tinylm.recipe.chat import DPOObjective

    assert isinstance(recipe, Recipe)
    data = estimate_data_size(recipe, reporter)
    text = data.tokens
    if not text.exact:
        reporter.note("the number of tokens is estimated from a few megabytes of text")
    is_dpo = isinstance(recipe.objective, DPOObjective)  # its reference model is like a teacher
    teachers = [recipe.model] if is_dpo else [run.recipe.model for run in teacher_runs(recipe)]
    planned = make_plan(
        data.recipe,
        text.vocab_size,
        text.train_tokens,
        heldout_tokens=text.heldout_tokens,
        source_tokens=text.source_tokens,
        accelerator=hardware,
        devices=devices,
        gpus_per_node=gpus_per_node,
        network_bandwidth=None if network_gbits is None else network_gbits * 1e9 / 8,
        size=data.example,
        teachers=teachers,
    )
    if planned.busy:
        reporter.warn(BUSY)
    if planned.not_estimated:
        reporter.warn(f"not estimated: {', '.join(planned.not_estimated)}; the plan does not include the cost of these parts")
    return planned


def show_plan(planned: Plan, json: bool, files: LaunchFiles | None = None) -> None:
    """Print a plan as a table or as JSON."""
    if json:
        print_json(asdict(planned) | (files or LaunchFiles()).as_dict())
        return
    print_fields(stdout_console(), _rows(planned))


def _rows(planned: Plan) -> list[tuple[str, str]]:
    micro_batches = f"{planned.gradient_accumulation_steps} micro-batch{'es' * (planned.gradient_accumulation_steps > 1)}"
    devices = f" on each of {planned.devices} devices" if planned.devices > 1 else ""
    machine = "this CPU" if planned.hardware == "cpu" else f"{planned.devices} {planned.hardware}"
    machine += f" in {planned.nodes} machines" if planned.nodes > 1 else ""
    low_steps, steps = planned.steps_range
    at_most = "up to " if low_steps < steps else ""
    return [
        ("parameters", f"{planned.parameters:,} ({planned.parameters_non_embedding:,} without embeddings and head)"),
        ("vocabulary", f"{planned.vocab_size:,} tokens"),
        ("context length", f"{planned.context_length:,} tokens"),
        (
            "batch",
            f"{planned.global_batch_size} sequences, {planned.tokens_per_step:,} tokens per step: "
            f"{micro_batches} of {planned.micro_batch_size}{devices}",
        ),
        ("training length", f"{steps_text(planned)}, {at_most}{planned.tokens:,} tokens, {planned.epochs:.2f} epochs"),
        *(("mixture", _source(use)) for use in planned.sources),
        ("compute", f"{at_most}{format_count(planned.flops, space=' ')}FLOP"),
        ("peak memory", _memory(planned, devices)),
        ("checkpoint", format_size(planned.checkpoint_bytes)),
        (f"time on {machine}", _time(planned)),
        *_scaling_laws(planned),
    ]


def _source(use: SourceUse) -> str:
    from tinylm.recipe.mixture import describe_epochs

    return f"{use.share:.1%} of the sequences from {use.source} ({format_count(use.tokens)} tokens), {describe_epochs(use.epochs)}"


def steps_text(planned: Plan) -> str:
    """Return the number of steps, or a range if the machine is busy and the training time is limited."""
    low, high = planned.steps_range
    return f"{high:,} steps" if low == high else f"{low:,} to {high:,} steps"


def duration_text(seconds: tuple[float, float]) -> str:
    """Return a duration, or a range of durations if the machine is busy."""
    low, high = (format_duration(end) for end in seconds)
    return low if low == high else f"{low} to {high}"


def _memory(planned: Plan, devices: str) -> str:
    memory = planned.memory_bytes
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "update": memory.update,
        "evaluation": memory.evaluation,
        "saving": memory.saving,
        **({"teachers": memory.teachers} if memory.teachers else {}),
    }
    listed = ", ".join(f"{name} {format_size(part)}" for name, part in parts.items())
    fits = memory.total <= planned.device_memory_bytes
    warning = "" if fits else f"; exceeds the available {format_size(planned.device_memory_bytes)}"
    return f"{format_size(memory.total)}{devices} ({listed}){warning}"


def _time(planned: Plan) -> str:
    others = {"compilation": planned.start_up_seconds, "evaluation": planned.evaluation_seconds}
    plus = " and ".join(f"{format_duration(seconds)} for {name}" for name, seconds in others.items() if seconds)
    low, high = planned.seconds_range
    start_up = planned.start_up_seconds
    total = f"about {duration_text((low - start_up, high - start_up))}" + (f", plus {plus}" if plus else "")
    per_step = planned.seconds_per_step
    step = format_step_time(per_step)
    how = planned.precision + (", compiled" if planned.compiled else "") + (", fsdp" if planned.parallel == "fsdp" else "")
    return (
        f"{total} (in {how}: {step} per step, {format_count(planned.tokens_per_second)} tokens/s, {planned.mfu:.1%} of peak FLOP/s)"
    )


def _scaling_laws(planned: Plan) -> list[tuple[str, str]]:
    best = planned.compute_optimal
    if best is None:
        return []
    return [("compute-optimal", _compute_optimal(planned, best)), ("repetition", _repetition(planned, best))]


def _compute_optimal(planned: Plan, best: ComputeOptimal) -> str:
    ratio = best.tokens / planned.tokens
    times = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
    return (
        f"for this model: {format_count(best.tokens)} tokens (20 per parameter, {times} times the planned number); "
        f"for this compute: {format_count(best.parameters_for_flops)} parameters and {format_count(best.tokens_for_flops)} tokens"
    )


def _repetition(planned: Plan, best: ComputeOptimal) -> str:
    return (
        f"{planned.epochs:.2f} epochs of {format_count(best.unique_tokens)} tokens are worth about "
        f"{format_count(best.effective_tokens)} unique tokens; after about 4 epochs, repetition helps less and less"
    )
