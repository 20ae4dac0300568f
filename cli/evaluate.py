"""`tinylm eval`: perplexity and bits per byte of a model on a text."""

from __future__ import annotations

import os

import typer

from .console import (
    CHECKPOINT,
    DEVICE,
    ERRORS,
    FIELD,
    JSON,
    QUIET,
    RUN,
    THREADS,
    ConsoleReporter,
    checked_errors,
    open_run,
    print_json,
    show_facts,
    stderr,
    stdout,
    things,
)

app = typer.Typer(add_completion=False)


@app.command()
def evaluate(
    source: list[str] = typer.Argument(
        None, help="SOURCEs: files, folders, globs, URLs, -, builtin:NAME; default: the run's held-out text."
    ),
    context: int | None = typer.Option(None, "--context", help="Tokens the model sees at once; default: all it can."),
    stride: int = typer.Option(
        None, "--stride", help="Tokens between windows; default: the context, each token with what came before in its window."
    ),
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    field: str = FIELD,
    errors: str = ERRORS,
    device: str = DEVICE,
    threads: int | None = THREADS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Measure a model: every token scored once, each document by itself.

    A smaller --stride gives each token more context: slower, and a better number.
    """
    from tinylm.errors import InputError
    from tinylm.text.sources import Corpus

    checked_errors(errors)
    console = stderr()
    opened = open_run(run, console, quiet=quiet)
    for one in source or ():
        if one != "-" and "://" not in one and not os.path.exists(one):  # what is there may be a pipe, which gives its text once
            Corpus([one]).close()  # what is missing is told before torch is loaded
    if source and source.count("-") > 1:
        raise InputError("standard input can be read once", where="-")

    opened.checkpoint(checkpoint)

    from tinylm.device import set_threads
    from tinylm.evaluation.measure import measure

    set_threads(threads)
    result = measure(
        opened,
        source or (),
        checkpoint=checkpoint,
        context=context,
        stride=stride,
        field=field,
        errors=errors,
        device=device,
        reporter=ConsoleReporter(console, quiet=quiet),
    )
    if json:
        print_json(result.as_dict())
        return
    measured = result.perplexity
    low, high = measured.bits_per_byte_ci95
    interval = f"95 % interval {low:.4f} to {high:.4f}" if low == low else "too short a text for an interval"
    sizes = ((measured.documents, "document"), (measured.bytes, "byte"), (measured.tokens, "token"))
    rows = [
        ("text", f"{result.text}: {', '.join(things(*size) for size in sizes)}"),
        ("model", f"{result.run} {result.checkpoint}, context {measured.context}, stride {measured.stride}"),
        ("bits per byte", f"{measured.bits_per_byte:.4f}  ({interval})"),
        ("perplexity", f"{measured.perplexity:.3f} per token"),
        ("loss", f"{measured.loss:.4f} nats per token"),
    ]
    if measured.bits_per_character is not None:
        rows.insert(3, ("bits per character", f"{measured.bits_per_character:.4f}"))
    show_facts(stdout(), rows)
