"""`tinylm eval`: evaluate a model on a text."""

from __future__ import annotations

import importlib
import json as json_module
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinylm.errors import InputError

from .console import (
    CHECKPOINTS,
    DEVICE,
    ERRORS,
    FIELD,
    JSON,
    QUIET,
    RUNS,
    SPLIT,
    TEMPLATE,
    THREADS,
    WEIGHTS,
    ConsoleReporter,
    checked_errors,
    checked_split,
    checked_weights,
    given_options,
    open_ensemble,
    pluralize,
    print_fields,
    print_json,
    stderr_console,
    stdout_console,
)
from .evaluation_request import EvaluationRequest

if TYPE_CHECKING:
    from tinylm.ensemble import Ensemble
    from tinylm.evaluation.ensembles import BestMember
    from tinylm.evaluation.evaluate_run import Evaluation
    from tinylm.run import Run

app = typer.Typer(add_completion=False)
_TEXT_OPTIONS = (
    "context",
    "split",
    "across_documents",
    "baselines",
    "by_frequency",
    "by_position",
    "by_document",
    "hardest",
    "html",
    "weights",
    "field",
    "template",
    "errors",
)
"""Options for evaluation on a text. They have no effect with --harness."""
_COMMON_OPTIONS = ("source", "run", "checkpoint", "device", "threads", "json", "quiet")
_LANGUAGE_MODEL_OPTIONS = (*_TEXT_OPTIONS, "stride")
_EVALUATORS = {"masked_lm": "evaluate_masked", "classification": "evaluate_classifier", "translation": "evaluate_translator"}
"""The evaluation module for each objective. Each module defines `evaluate` and `OPTIONS` (the options that it supports)."""
_TABLE_TITLES = {"source": "source", "document": "document", "position": "context length", "frequency": "count in training text"}


@app.command()
def evaluate(
    ctx: typer.Context,
    source: list[str] | None = typer.Argument(
        None,
        help="Files, folders, globs, URLs, - for standard input, or builtin:NAME. Default: the run's held-out text. "
        "With --harness: task names or task files (.yaml).",
    ),
    harness: bool = typer.Option(False, "--harness", help="Evaluate on lm-evaluation-harness tasks, which SOURCE lists."),
    limit: int | None = typer.Option(None, "--limit", min=1, help="With --harness: use only the first N documents of each task."),
    context: int | None = typer.Option(None, "--context", help="Tokens per window. Default: the model's context length."),
    stride: int | None = typer.Option(
        None, "--stride", help="Number of tokens between window starts. Default: the window length, so that windows do not overlap."
    ),
    split: str = SPLIT,
    run: list[str] | None = RUNS,
    checkpoint: list[str] | None = CHECKPOINTS,
    across_documents: bool = typer.Option(
        False, "--across-documents", help="Let windows cross document boundaries. By default, each document is scored separately."
    ),
    baselines: bool = typer.Option(
        False,
        "--baselines",
        help="Compare with n-gram models, and with xz and zstd using the training text as a dictionary.",
    ),
    by_frequency: bool = typer.Option(False, "--by-frequency", help="Show the loss by token frequency in the training text."),
    by_position: bool = typer.Option(False, "--by-position", help="Show the loss by the number of preceding tokens."),
    by_document: bool = typer.Option(False, "--by-document", help="Show the loss of each document."),
    hardest: int = typer.Option(
        0, "--hardest", min=0, metavar="N", help="Show the N tokens, or sentence pairs, with the largest losses."
    ),
    pseudo: bool = typer.Option(
        False, "--pseudo", help="Masked models: also compute the pseudo-perplexity, by masking one token at a time."
    ),
    max_tokens: int | None = typer.Option(
        None, "--max-tokens", min=1, help="Masked models: score only this many tokens from the start of the text."
    ),
    mistakes: int = typer.Option(10, "--mistakes", min=0, metavar="N", help="Classifiers and chat models: show N mistakes."),
    max_pairs: int | None = typer.Option(None, "--max-pairs", min=1, help="Translation models: use only the first N pairs."),
    no_baselines: bool = typer.Option(
        False, "--no-baselines", help="Classifiers and translation models: do not compare with simple baselines."
    ),
    plot: Path | None = typer.Option(None, "--plot", help="Classifiers: draw the confusion matrix (.png, .svg or .pdf)."),
    html: Path | None = typer.Option(None, "--html", help="Write the text to this HTML file, with each token shaded by its loss."),
    weights: str = WEIGHTS,
    field: str = FIELD,
    label: str | None = typer.Option(
        None, "--label", metavar="FIELD", help="Classifiers: the field or column that contains the label. Default: as in training."
    ),
    template: str | None = TEMPLATE,
    errors: str = ERRORS,
    device: str = DEVICE,
    threads: int | None = THREADS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Evaluate a model, or an ensemble of several, on a text. Every token is scored once, and documents are scored independently.

    A smaller --stride gives each token more context, which takes longer and lowers the loss. The model's objective determines what
    is measured: a masked model predicts masked tokens, and a classifier predicts the labels of labeled texts.

    With several --run or --checkpoint options, the mean of the models' probabilities is evaluated and compared with the best
    language model, or with each classifier.
    """
    weight_kind = checked_weights(weights)
    checked_errors(errors)
    checked_split(split)
    for option, value in (("--context", context), ("--stride", stride)):
        if value is not None and value < 1:  # the upper limit depends on the model
            raise InputError(f"must be at least 1, not {value}", where=option)
    sources = source or []
    _check_options(ctx, sources, harness, limit, html)
    console = stderr_console()
    opened = open_ensemble(run, checkpoint, console, quiet=quiet)  # reports a missing checkpoint before torch is imported
    first = opened.members[0]
    if harness:
        _check_single(opened, "--harness", "evaluates a single model")
        task_options = _TaskOptions(first.checkpoint.name, stride, limit, device, threads)
        _evaluate_tasks(first.run, sources, task_options, json=json, verbose=console.is_terminal and not quiet)
        return
    _check_sources(sources)
    evaluator = _evaluator_of(first.run, ctx, own_data=not sources)
    if evaluator is not None and not getattr(evaluator, "ENSEMBLES", False):
        _check_single(opened, first.path, "an ensemble cannot be evaluated on this run's own data", hint="specify a SOURCE")

    from tinylm.device import set_threads
    from tinylm.evaluation.evaluate_run import BreakdownOptions, TextFormat, evaluate_ensemble
    from tinylm.evaluation.perplexity import EvaluationOptions

    set_threads(threads)
    if evaluator is not None:
        request = EvaluationRequest(
            opened,
            sources,
            split=split,
            field=field,
            template=template,
            errors=errors,
            pseudo=pseudo,
            max_tokens=max_tokens,
            mistakes=mistakes,
            no_baselines=no_baselines,
            hardest=hardest,
            max_pairs=max_pairs,
            plot=plot,
            device=device,
            json=json,
            quiet=quiet,
            text_field=field if given_options(ctx, ("field",)) else None,
            label=label,
        )
        evaluator.evaluate(request)
        return
    result = evaluate_ensemble(
        opened,
        sources,
        split=split,
        options=EvaluationOptions(context, stride, across_documents=across_documents),
        details=BreakdownOptions(baselines, by_frequency, by_position, by_document, hardest, html),
        text_format=TextFormat(field, template, errors),
        weights=weight_kind,
        device=device,
        reporter=ConsoleReporter(console, quiet=quiet),
    )
    if json:
        print_json(result.as_dict())
        return
    _print_totals(stdout_console(), result)
    _print_tables(stdout_console(), result)
    if html is not None:
        stderr_console().print_line(f"wrote {html}", "dim")


def _check_single(ensemble: Ensemble, where: str, problem: str, hint: str = "pass one --run") -> None:
    """Raise `InputError` if the ensemble has several members."""
    if not ensemble.is_single:
        raise InputError(problem, where=where, hint=hint)


def _evaluator_of(run: Run, ctx: typer.Context, *, own_data: bool) -> ModuleType | None:
    """Return the evaluation module for the run's objective, or None for a language model, which is evaluated on plain text.

    Raises `InputError` for options that have no effect on such a model.
    """
    objective = run.recipe.objective.name
    if own_data and objective == "dpo":
        problem = "was trained on preferences, which are only evaluated during training (tinylm plot shows the results)"
        raise InputError(problem, where=str(run.path), hint="pass a SOURCE to evaluate the model on a text")
    module = "evaluate_chat" if own_data and run.recipe.data.format == "chat" else _EVALUATORS.get(objective)
    evaluator = None if module is None else importlib.import_module(f".{module}", __package__)
    supported = _COMMON_OPTIONS + (_LANGUAGE_MODEL_OPTIONS if evaluator is None else tuple(evaluator.OPTIONS))
    names = [str(parameter.name) for parameter in ctx.command.params]
    if unused := given_options(ctx, [name for name in names if name not in supported]):
        if module == "evaluate_chat":
            problem = "has no effect when a chat model is evaluated on its own conversations"
        else:
            problem = f"has no effect on a model trained with the {objective} objective"
        raise InputError(problem, where=", ".join(unused))
    return evaluator


def _check_options(ctx: typer.Context, sources: list[str], harness: bool, limit: int | None, html: Path | None) -> None:
    """Raise `InputError` for options that would have no effect."""
    if limit is not None and not harness:
        raise InputError("requires --harness", where="--limit")
    if harness:
        _check_tasks(sources, given_options(ctx, (*_TEXT_OPTIONS, "label")))
    elif not sources and (unused := given_options(ctx, ("field", "label", "template", "errors"))):
        raise InputError("requires a SOURCE", where=", ".join(unused))
    if sources and not harness and given_options(ctx, ("split",)):
        raise InputError("has no effect with a SOURCE", where="--split")
    if html is not None and html.is_dir():
        raise InputError("is a folder", where=f"--html {html}", hint="pass a file path")


def _check_tasks(tasks: list[str], unsupported: list[str]) -> None:
    if not tasks:
        raise InputError("requires a task", where="--harness", hint="for example `tinylm eval --harness my_task.yaml`")
    if unsupported:
        raise InputError("cannot be combined with --harness", where=", ".join(unsupported))
    for task in tasks:
        if task.endswith((".yaml", ".yml")) and not os.path.exists(task):
            raise InputError("no such task file", where=task)


def _check_sources(sources: list[str]) -> None:
    """Raise `InputError` for missing sources before torch is imported."""
    from tinylm.recipe.pairs import CATALOG, TOY
    from tinylm.text.sources import Corpus

    for source in sources:
        # An existing path is not opened: it may be a pipe, which can be read only once.
        is_path = source != "-" and "://" not in source and not source.startswith(("hf:", "{", CATALOG, TOY))
        if is_path and not os.path.exists(source):
            Corpus([source]).close()
    if sources.count("-") > 1:
        raise InputError("standard input can be read only once", where="-")


def _print_totals(console: Console, result: Evaluation) -> None:
    scores = result.perplexity
    low, high = scores.bits_per_byte_ci95
    interval = "the text is too short for a confidence interval" if math.isnan(low) else f"95% interval {low:.4f} to {high:.4f}"
    sizes = ((scores.documents, "document"), (scores.bytes, "byte"), (scores.tokens, "token"))
    weights = "" if result.weights == "fp32" else f", {result.weights} weights"
    context = f"context {scores.context}, stride {scores.stride}"
    if scores.context is None:
        context = "the state is carried through each document"
    model = f"{result.run} {result.checkpoint}"
    if result.members:
        model = f"the mean probabilities of {len(result.members)} models"
        if len({member.member.run.recipe.model.context_length for member in result.members}) > 1:
            context += " (limited by the smallest context length)"
    rows = [
        ("text", f"{result.text}: {', '.join(pluralize(*size) for size in sizes)}"),
        ("model", f"{model}, {context}{weights}"),
        ("bits per byte", f"{scores.bits_per_byte:.4f}  ({interval})"),
        ("perplexity", f"{scores.perplexity:.3f} per token"),
        ("loss", f"{scores.loss:.4f} nats per token"),
    ]
    if scores.bits_per_character is not None:
        rows.insert(3, ("bits per character", f"{scores.bits_per_character:.4f}"))
    if result.chosen_by_split:
        chosen = "the checkpoints were chosen by their scores" if result.members else "the checkpoint was chosen by its score"
        note = f"{chosen} on this text, so the score is slightly optimistic"
        rows.append(
            (
                "selection",
                f"{note} (set `data.test` in the recipe to hold out a test set)"
                if not result.has_test_split
                else f"{note}; see --split test",
            )
        )
    rows += [("overlap", overlap.describe()) for overlap in result.overlaps]
    if result.best_member is not None:
        rows.append(("vs. best model", _versus_best(result.best_member)))
    print_fields(console, rows)


def _versus_best(best: BestMember) -> str:
    """Describe the difference between an ensemble and its best member."""
    name, comparison = best.score.member.name, best.comparison
    if comparison is None:
        return f"{name}; the text is too short for a comparison"
    low, high = comparison.ci95
    interval = f"95% interval {low:+.4f} to {high:+.4f}, p = {comparison.p_value:.4f}"
    return f"{comparison.difference:+.4f} bits per byte relative to {name}  ({interval})"


def _print_tables(console: Console, result: Evaluation) -> None:
    if result.members:
        table = _table("bits per byte", "perplexity", "loss", text="member")
        for member in result.members:
            scores = member.perplexity
            cells = (f"{scores.bits_per_byte:.4f}", f"{scores.perplexity:.3f}", f"{scores.loss:.4f}")
            table.add_row(*cells, Text(member.member.name))
        console.print(table)
    if result.baselines:
        table = _table("bits per byte", text="model")
        models = {f"this model, {result.checkpoint}": result.perplexity.bits_per_byte, **result.baselines}
        for name, bits in sorted(models.items(), key=lambda item: item[1]):
            table.add_row(f"{bits:.4f}", Text(name, style="bold" if name.startswith("this model") else ""))
        console.print(table)
    for name, rows in result.tables.items():
        table = _table(_TABLE_TITLES[name], "tokens", "share", "nats per token", "bits per byte")
        for row in rows:
            table.add_row(Text(row.name), f"{row.tokens:,}", f"{row.share:.1%}", f"{row.loss:.4f}", f"{row.bits_per_byte:.4f}")
        console.print(table)
    if result.hardest:
        table = _table("bits", "token", text="preceding text")
        for hard in result.hardest:
            table.add_row(f"{hard.nats / math.log(2):.1f}", Text(_quoted(hard.token)), Text(_quoted(hard.before)))
        console.print(table)


def _quoted(text: str) -> str:
    return json_module.dumps(text, ensure_ascii=False)


def _table(first: str, *columns: str, text: str | None = None) -> Table:
    """Return a table with a left-aligned first column, right-aligned number columns, and an optional text column at the end."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), title=" ")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    if text is not None:
        table.add_column(text)
    return table


@dataclass(frozen=True)
class _TaskOptions:
    """Options for evaluation with lm-evaluation-harness."""

    checkpoint: str | None
    stride: int | None
    limit: int | None
    device: str
    threads: int | None


def _evaluate_tasks(run: Run, tasks: list[str], options: _TaskOptions, *, json: bool, verbose: bool) -> None:
    run.checkpoint(options.checkpoint)  # report a missing checkpoint before torch is imported

    from tinylm.device import set_threads
    from tinylm.interchange.harness import run_tasks

    set_threads(options.threads)
    with nullcontext() if verbose else _silenced_stderr():
        result = run_tasks(
            run, tasks, checkpoint=options.checkpoint, stride=options.stride, limit=options.limit, device=options.device
        )
    if json:
        print_json(result)
        return
    rows = [("model", f"{result.run} {result.checkpoint}, lm-eval {result.harness}")]
    for task, metrics in result.results.items():
        for metric, value in metrics.items():
            if not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr")
                rows.append((f"{task} {metric}", f"{value:.6g}" + (f"  (standard error {error:.2g})" if error is not None else "")))
    print_fields(stdout_console(), rows)


@contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Redirect file descriptor 2 to the null device. This also silences git, which the harness runs as a child process."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
