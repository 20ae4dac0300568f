"""`tinylm eval`: perplexity and bits per byte of a model on a text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from tinylm.run import Run

app = typer.Typer(add_completion=False)


@app.command()
def evaluate(
    source: list[str] = typer.Argument(
        None,
        help="SOURCEs: files, folders, globs, URLs, -, builtin:NAME; default: the run's held-out text. With --harness: tasks.",
    ),
    harness: bool = typer.Option(
        False, "--harness", help="Evaluate on tasks of lm-evaluation-harness instead: names it knows, or task files (.yaml)."
    ),
    limit: int | None = typer.Option(None, "--limit", min=1, help="With --harness: the first documents of each task only."),
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
    if limit is not None and not harness:
        raise InputError("only means something with --harness", where="--limit")
    if harness:
        _check_tasks(source, context)
    console = stderr()
    opened = open_run(run, console, quiet=quiet)
    if harness:
        _on_tasks(opened, source, checkpoint, stride, limit, device, threads, json, console.is_terminal and not quiet)
        return
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


def _check_tasks(tasks: list[str] | None, context: int | None) -> None:
    from tinylm.errors import InputError

    if not tasks:
        raise InputError("names no task", where="--harness", hint="like `tinylm eval --harness my_task.yaml`")
    if context is not None:
        raise InputError("means nothing with --harness: a task asks for as much context as there is", where="--context")
    for task in tasks:
        if task.endswith((".yaml", ".yml")) and not os.path.exists(task):
            raise InputError("no such task file", where=task)


def _on_tasks(
    run: Run,
    tasks: list[str],
    checkpoint: str | None,
    stride: int | None,
    limit: int | None,
    device: str,
    threads: int | None,
    json: bool,
    talking: bool,
) -> None:
    run.checkpoint(checkpoint)

    from tinylm.device import set_threads
    from tinylm.interchange.harness import run_tasks

    set_threads(threads)
    with nullcontext() if talking else _silence():
        done = run_tasks(run, tasks, checkpoint=checkpoint, stride=stride, limit=limit, device=device)
    if json:
        print_json(done)
        return
    rows = [("model", f"{done.run} {done.checkpoint}, in lm-eval {done.harness}")]
    for task, metrics in done.results.items():
        for metric, value in metrics.items():
            if not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr")
                rows.append((f"{task} {metric}", f"{value:.6g}" + (f"  (standard error {error:.2g})" if error is not None else "")))
    show_facts(stdout(), rows)


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on stderr, not from other programs either: the harness has bars of its own, and asks git."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
