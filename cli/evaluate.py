"""`tinylm eval`: perplexity and bits per byte of a model on a text."""

from __future__ import annotations

import json as json_module
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinylm.errors import InputError

from .console import (
    CHECKPOINT,
    DEVICE,
    ERRORS,
    FIELD,
    JSON,
    QUIET,
    RUN,
    THREADS,
    WEIGHTS,
    ConsoleReporter,
    checked_errors,
    checked_weights,
    given,
    open_run,
    print_json,
    show_facts,
    stderr,
    stdout,
    things,
)

if TYPE_CHECKING:
    from tinylm.evaluation.measure import Evaluation
    from tinylm.run import Run

app = typer.Typer(add_completion=False)
_NOT_FOR_TASKS = (
    "context",
    "across_documents",
    "baselines",
    "by_frequency",
    "by_position",
    "by_document",
    "hardest",
    "html",
    "weights",
    "field",
    "errors",
)


@app.command()
def evaluate(
    ctx: typer.Context,
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
    across_documents: bool = typer.Option(
        False, "--across-documents", help="Let a window reach back over the end of a document; else each is read by itself."
    ),
    baselines: bool = typer.Option(
        False, "--baselines", help="Beside it: n-gram models, xz and zstd made from the training text, and what both texts share."
    ),
    by_frequency: bool = typer.Option(False, "--by-frequency", help="A table by how often the training text holds a token."),
    by_position: bool = typer.Option(False, "--by-position", help="A table by how many tokens a token was predicted from."),
    by_document: bool = typer.Option(False, "--by-document", help="A table of the documents."),
    hardest: int = typer.Option(0, "--hardest", min=0, metavar="N", help="The N tokens that surprised the model most."),
    html: Path | None = typer.Option(None, "--html", help="Write the text, shaded by surprise, to this file."),
    weights: str = WEIGHTS,
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
    from tinylm.text.sources import Corpus

    checked_errors(errors)
    checked_weights(weights)
    if limit is not None and not harness:
        raise InputError("only means something with --harness", where="--limit")
    if harness:
        _check_tasks(source, given(ctx, _NOT_FOR_TASKS))
    elif not source and (useless := given(ctx, ("field", "errors"))):
        raise InputError("only means something with a SOURCE", where=", ".join(useless))
    if html is not None and html.is_dir():
        raise InputError("is a folder, not a file", where=f"--html {html}")
    console = stderr()
    opened = open_run(run, console, quiet=quiet)
    if harness:
        _on_tasks(opened, source, checkpoint, stride, limit, device, threads, json, console.is_terminal and not quiet)
        return
    for one in source or ():
        if one != "-" and "://" not in one and not one.startswith("hf:") and not os.path.exists(one):  # a pipe gives its text once
            Corpus([one]).close()  # what is missing is told before torch is loaded
    if source and source.count("-") > 1:
        raise InputError("standard input can be read once", where="-")

    opened.checkpoint(checkpoint)

    from tinylm.device import set_threads
    from tinylm.evaluation.measure import Details, measure

    set_threads(threads)
    result = measure(
        opened,
        source or (),
        checkpoint=checkpoint,
        context=context,
        stride=stride,
        field=field,
        errors=errors,
        across_documents=across_documents,
        weights=checked_weights(weights),
        wanted=Details(baselines, by_frequency, by_position, by_document, hardest, html),
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
    precision = "" if result.weights == "fp32" else f", weights {result.weights}"
    rows = [
        ("text", f"{result.text}: {', '.join(things(*size) for size in sizes)}"),
        ("model", f"{result.run} {result.checkpoint}, context {measured.context}, stride {measured.stride}{precision}"),
        ("bits per byte", f"{measured.bits_per_byte:.4f}  ({interval})"),
        ("perplexity", f"{measured.perplexity:.3f} per token"),
        ("loss", f"{measured.loss:.4f} nats per token"),
    ]
    if measured.bits_per_character is not None:
        rows.insert(3, ("bits per character", f"{measured.bits_per_character:.4f}"))
    if result.overlap is not None:
        rows.append(("overlap", f"{result.overlap:.2%} of the tokens stand in runs of 13 that the training text holds too"))
    answer = stdout()
    show_facts(answer, rows)
    _show_details(answer, result)
    if html is not None:
        stderr().say(f"written: {html}", "dim")


def _show_details(console: Console, result: Evaluation) -> None:
    if result.baselines:
        table = _table("bits per byte", "")
        beside = {f"this model, {result.checkpoint}": result.perplexity.bits_per_byte, **result.baselines}
        for name, bits in sorted(beside.items(), key=lambda one: one[1]):
            table.add_row(f"{bits:.4f}", Text(name, style="bold" if name.startswith("this model") else ""))
        console.print(table)
    titles = {"document": "document", "position": "tokens before it", "frequency": "times in the training text"}
    for by, listed in result.tables.items():
        table = _table(titles[by], "tokens", "share", "nats per token", "bits per byte")
        for row in listed:
            table.add_row(row.name, f"{row.tokens:,}", f"{row.share:.1%}", f"{row.loss:.4f}", f"{row.bits_per_byte:.4f}")
        console.print(table)
    if result.hardest:
        table = _table("bits", "token", "after")
        for hard in result.hardest:
            table.add_row(f"{hard.nats / math.log(2):.1f}", Text(dumps(hard.token)), Text(dumps(hard.before)))
        console.print(table)


def dumps(text: str) -> str:
    return json_module.dumps(text, ensure_ascii=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), title=" ")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _check_tasks(tasks: list[str] | None, useless: list[str]) -> None:
    if not tasks:
        raise InputError("names no task", where="--harness", hint="like `tinylm eval --harness my_task.yaml`")
    if useless:
        raise InputError("means nothing with --harness: tasks say what they measure, and how", where=", ".join(useless))
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
