"""`tinylm data`: show training data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from tinylm.errors import InputError

from .console import JSON, QUIET, SET, CommandGroup, ConsoleReporter, pluralize, print_json, stderr_console, stdout_console
from .recipe_files import find_recipe

if TYPE_CHECKING:
    from rich.console import Console

    from tinylm.data.examples import ShownExample

app = typer.Typer(cls=CommandGroup, add_completion=False, no_args_is_help=True)
_LEARNED, _READ = "bold green", "dim"
_MARKS = ("[[", "]]")
"""Brackets around training targets, for output without color."""


@app.callback()
def root() -> None:
    """Show training data."""


@app.command()
def show(
    recipe: str = typer.Argument(..., help="A recipe file, the name of a recipe that comes with tinylm, or a run folder."),
    count: int = typer.Option(3, "-n", min=1, max=1000, help="Number of examples."),
    start: int = typer.Option(0, "--start", min=0, help="Position of the first example in the data order."),
    set_: list[str] | None = SET,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Show training examples. Training targets are in color or between [[ and ]]; the other tokens are only context."""
    from tinylm.data import formats
    from tinylm.data.examples import shown_examples, shown_preferences
    from tinylm.recipe import load

    loaded = load(find_recipe(recipe), set_ or ())
    convert = {"causal_lm": shown_examples, "dpo": shown_preferences}.get(loaded.objective.name)
    if convert is None:
        problem = f"must be causal_lm or dpo to show training examples, not {loaded.objective.name}"
        raise InputError(problem, where="objective.name")
    reporter = ConsoleReporter(stderr_console(), quiet=quiet)
    data_format = formats.find(loaded.data)
    prepared = data_format.prepare(loaded, reporter, 1)
    dataset = data_format.dataset(loaded, prepared)
    examples = list(convert(dataset.examples(start, count), prepared.tokenizer))
    if json:
        print_json({"examples_per_epoch": dataset.examples_per_epoch, "examples": [_document(item) for item in examples]})
        return
    console = stdout_console()
    for number, example in enumerate(examples, start):
        _print(console, number, example)


def _document(example: ShownExample) -> dict[str, Any]:
    return {
        "tokens": example.tokens,
        "learned": example.learned,
        "padding": example.padding,
        **({"labels": example.labels} if example.labels else {}),
        "segments": [
            [{"text": part.text, "learned": part.learned, "tokens": part.tokens} for part in parts] for parts in example.segments
        ],
    }


def _print(console: Console, number: int, example: ShownExample) -> None:
    share = example.learned / max(example.tokens, 1)
    padding = f", {pluralize(example.padding, 'padding position')}" if example.padding else ""
    console.print(
        f"example {number}: {pluralize(example.tokens, 'token')}, {example.learned:,} trained on ({share:.0%}){padding}",
        style="bold",
    )
    opening, closing = ("", "") if console.is_terminal and not console.no_color else _MARKS
    for number, parts in enumerate(example.segments):
        line = Text(f"{example.labels[number]:<10}" if example.labels else "", "bold")
        for part in parts:
            if part.learned:
                line.append(f"{opening}{part.text}{closing}", _LEARNED)
            else:
                line.append(part.text, _READ)
        console.print(line)
    console.print()
