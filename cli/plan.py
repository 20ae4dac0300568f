"""`tinylm plan`: what a recipe will cost."""

from __future__ import annotations

import typer

from tinylm.cost.plan import Plan

from .console import JSON, QUIET, SET, ConsoleReporter, count, duration, out, print_json, show_facts, size, stderr, stdout
from .recipe_files import find

app = typer.Typer(add_completion=False)


@app.command()
def plan(
    recipe: str | None = typer.Argument(None, help="A YAML file or the name of a recipe that ships.", show_default=False),
    set_: list[str] | None = SET,
    hardware: str | None = typer.Option(
        None, "--hardware", metavar="NAME", help="An accelerator instead of this machine's CPU, like h100-sxm; list: their names."
    ),
    devices: int | None = typer.Option(None, "--devices", min=1, help="How many of them, each with a share of every batch."),
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """What a recipe will cost, here or on an accelerator: parameters, batch arithmetic, memory, FLOPs, time."""
    from tinylm.cost import accelerators as sheets
    from tinylm.errors import InputError
    from tinylm.recipe import load

    if hardware == "list":
        list_hardware(json)
        return
    if recipe is None:
        raise InputError("missing argument 'recipe'")
    if devices is not None and hardware is None:
        raise InputError("only means something with --hardware", where="--devices")
    if hardware is not None:
        sheets.find(hardware)  # a name that is none is told before the text is read
    loaded = load(find(recipe), set_ or ())
    show_plan(make(loaded, ConsoleReporter(stderr(), quiet=quiet), hardware, devices or 1), json)


def list_hardware(json: bool) -> None:
    """The accelerators whose data sheets are known, with what a plan takes from them."""
    from tinylm.cost.accelerators import ACCELERATORS

    if json:
        print_json({"accelerators": ACCELERATORS})
        return
    for sheet in ACCELERATORS:
        flops = ", ".join(f"{precision} {value / 1e12:g}" for precision, value in sheet.flops.items())
        out(f"{sheet.name:<16}  {sheet.memory / 1e9:3.0f} GB at {sheet.bandwidth / 1e12:.2f} TB/s; TFLOP/s: {flops}")


def make(recipe: object, reporter: ConsoleReporter, hardware: str | None = None, devices: int = 1) -> Plan:
    """The plan of a recipe, its text read for the number of tokens; `hardware` None: on this machine's CPU."""
    from tinylm.cost.plan import BUSY, UNDISTURBED, make_plan
    from tinylm.data.estimate import measure_text
    from tinylm.recipe import Recipe

    assert isinstance(recipe, Recipe)
    text = measure_text(recipe.data, recipe.tokenizer, reporter)
    if not text.exact:
        reporter.note("the number of tokens is extrapolated from the first megabytes")
    planned = make_plan(
        recipe, text.vocab_size, text.train_tokens, heldout_tokens=text.heldout_tokens, accelerator=hardware, devices=devices
    )
    if planned.undisturbed < UNDISTURBED:
        reporter.warn(BUSY)
    return planned


def show_plan(planned: Plan, json: bool) -> None:
    if json:
        print_json(planned)
        return
    show_facts(stdout(), _rows(planned))


def _rows(planned: Plan) -> list[tuple[str, str]]:
    memory, many = planned.memory_bytes, planned.devices > 1
    shares = f" on each of {planned.devices} devices" if many else ""
    fits = "" if memory.total <= planned.device_memory_bytes else f", more than the {size(planned.device_memory_bytes)} there are"
    machine = "this CPU" if planned.hardware == "cpu" else f"{planned.devices} {planned.hardware}"
    how = f"{planned.precision}{', compiled' if planned.compiled else ''}"
    start = f" and {duration(planned.start_up_seconds)} of compiling" if planned.start_up_seconds else ""
    measuring = f"; measuring: {duration(planned.evaluation_seconds)}" if planned.evaluation_seconds else ""
    return [
        ("parameters", f"{planned.parameters:,} ({planned.parameters_non_embedding:,} without embeddings and head)"),
        ("vocabulary, context", f"{planned.vocab_size:,} tokens, {planned.context_length:,} at a time"),
        (
            "batch",
            f"{planned.global_batch_size} sequences = {planned.gradient_accumulation_steps} x {planned.micro_batch_size}"
            f"{shares} = {planned.tokens_per_step:,} tokens a step",
        ),
        ("length", f"{planned.steps:,} steps = {planned.tokens:,} tokens = {planned.epochs:.2f} epochs"),
        ("compute", f"{count(planned.flops, space=' ')}FLOP"),
        (
            "memory",
            f"{size(memory.total)}{shares} at most (weights {size(memory.weights)}, gradients {size(memory.gradients)}, "
            f"optimizer {size(memory.optimizer)}, activations {size(memory.activations)}, "
            f"update {size(memory.update)}, measuring {size(memory.evaluation)}, saving {size(memory.saving)}){fits}",
        ),
        ("a checkpoint", size(planned.checkpoint_bytes)),
        (
            f"time on {machine}",
            f"about {duration(planned.seconds_estimate - planned.start_up_seconds)} of stepping{start} in {how} "
            f"({_short(planned.seconds_per_step)} a step, {count(planned.tokens_per_second)} tokens/s, "
            f"{planned.mfu:.1%} of the peak{measuring})",
        ),
        ("compute-optimal", _optimal(planned)),
        ("repetition", _repetition(planned)),
    ]


def _short(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else duration(seconds)


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _optimal(planned: Plan) -> str:
    best = planned.compute_optimal
    return (
        f"20 tokens a parameter are {count(best.tokens)} for this model, {_times(best.tokens / planned.tokens)} x what it gets; "
        f"this compute suits {count(best.parameters_for_flops)} parameters and {count(best.tokens_for_flops)} tokens"
    )


def _repetition(planned: Plan) -> str:
    best = planned.compute_optimal
    most = f"text repeated more than 4 times ({count(4 * best.unique_tokens)} tokens) is worth less and less"
    return f"{planned.epochs:.2f} epochs of {count(best.unique_tokens)} are worth {count(best.worth_tokens)} new tokens; {most}"
