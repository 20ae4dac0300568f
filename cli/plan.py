"""`tinylm plan`: what a recipe will cost."""

from __future__ import annotations

import typer

from tinylm.plan import Plan

from .console import JSON, QUIET, SET, ConsoleReporter, count, duration, print_json, show_facts, size, stderr, stdout
from .recipe_files import find

app = typer.Typer(add_completion=False)


@app.command()
def plan(
    recipe: str = typer.Argument(..., help="A YAML file or the name of a recipe that ships."),
    set_: list[str] | None = SET,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """What a recipe will cost on this machine's CPU: parameters, batch arithmetic, memory, FLOPs, time."""
    from tinylm.recipe import load

    show_plan(make(load(find(recipe), set_ or ()), ConsoleReporter(stderr(), quiet=quiet)), json)


def make(recipe: object, reporter: ConsoleReporter) -> Plan:
    """The plan of a recipe, its text read for the number of tokens."""
    from tinylm.data.estimate import measure_text
    from tinylm.plan import make_plan
    from tinylm.recipe import Recipe

    assert isinstance(recipe, Recipe)
    text = measure_text(recipe.data, recipe.tokenizer, reporter)
    if not text.exact:
        reporter.note("the number of tokens is extrapolated from the first megabytes")
    return make_plan(recipe, text.vocab_size, text.train_tokens)


def show_plan(planned: Plan, json: bool) -> None:
    if json:
        from dataclasses import asdict

        document = asdict(planned)
        document["memory_bytes"]["total"] = planned.memory_bytes.total
        print_json(document)
        return
    memory = planned.memory_bytes
    rows = (
        ("parameters", f"{planned.parameters:,} ({planned.parameters_non_embedding:,} without embeddings and head)"),
        ("vocabulary, context", f"{planned.vocab_size:,} tokens, {planned.context_length:,} at a time"),
        (
            "batch",
            f"{planned.global_batch_size} sequences = {planned.gradient_accumulation_steps} x {planned.micro_batch_size}"
            f" = {planned.tokens_per_step:,} tokens a step",
        ),
        ("length", f"{planned.steps:,} steps = {planned.tokens:,} tokens = {planned.epochs:.2f} epochs"),
        ("compute", f"{count(planned.flops, space=' ')}FLOP"),
        (
            "memory",
            f"{size(memory.total)} (weights {size(memory.weights)}, gradients {size(memory.gradients)}, "
            f"optimizer {size(memory.optimizer)}, activations {size(memory.activations)})",
        ),
        ("a checkpoint", size(planned.checkpoint_bytes)),
        ("time on this CPU", f"about {duration(planned.seconds_estimate)} of stepping"),
    )
    show_facts(stdout(), rows)
