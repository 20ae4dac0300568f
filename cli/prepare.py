"""`tinylm prepare`: clean, filter, deduplicate and encode a large text for training."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from tinylm.errors import InputError

from .console import (
    ERRORS,
    FIELD,
    JSON,
    QUIET,
    TEMPLATE,
    ConsoleReporter,
    checked_errors,
    format_duration,
    format_size,
    given_options,
    pluralize,
    print_fields,
    print_json,
    stderr_console,
    stdout_console,
)
from .tokenizer_options import KINDS, option_names_in_errors, tokenizer_section

if TYPE_CHECKING:
    from tinylm.curation.datatrove_engine import Cluster
    from tinylm.curation.report import Report, Step
    from tinylm.curation.settings import Settings

app = typer.Typer(add_completion=False)
_VOCAB_SIZE = 4096
"""The default of `tokenizer.vocab_size` in recipes, so that a recipe without a tokenizer section can use the folder."""


@app.command()
def prepare(
    ctx: typer.Context,
    source: list[str] | None = typer.Argument(None, help="The text: files, folders, globs, URLs or builtin:NAME."),
    out: str | None = typer.Option(None, "--out", help="The output folder. To train on it, set `data.train` to it in a recipe."),
    heldout: list[str] | None = typer.Option(
        None, "--heldout", metavar="SOURCE", help="The held-out text. Quality rules do not apply to it. Can be repeated."
    ),
    heldout_share: float | None = typer.Option(
        None, "--heldout-share", help="Without --heldout: hold out this fraction of the documents, chosen by a hash. Default: 0.1."
    ),
    contaminated: str = typer.Option(
        "heldout",
        "--contaminated",
        help="With --heldout: if a document occurs in both texts, remove it from this one: heldout or train.",
    ),
    without: list[str] | None = typer.Option(
        None,
        "--without",
        metavar="RULE",
        help="Switch off a rule, a group of rules (gopher, c4 or fineweb) or a step (clean, exact_duplicates, near_duplicates or "
        "contamination). Can be repeated.",
    ),
    minhash: str = typer.Option(
        "14x8",
        "--minhash",
        metavar="BANDSxROWS",
        help="Bands of MinHash values, and values per band. Near-duplicates agree in all values of at least one band.",
    ),
    tokenizer: str | None = typer.Option(
        None, "--tokenizer", "-t", help="A tokenizer file. Default: train a tokenizer on the remaining training text."
    ),
    kind: str | None = typer.Option(None, "--kind", help=f"Kind of tokenizer to train: {', '.join(KINDS)}. Default: bpe."),
    vocab_size: int | None = typer.Option(
        None, "--vocab-size", help=f"Number of tokens of the tokenizer to train. Default: {_VOCAB_SIZE}."
    ),
    jobs: int | None = typer.Option(
        None,
        "--jobs",
        min=1,
        help="Number of processes. The result does not depend on it. Default: 1, or --tasks with --executor slurm or ray.",
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Only report what would be removed. With --out, the real run reuses the results."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the prepared text in the output folder."),
    list_rules: bool = typer.Option(False, "--list-rules", help="List all rules with what they remove, and exit."),
    engine: str = typer.Option(
        "builtin", "--engine", help="builtin, or datatrove to distribute the work over several machines. The result is the same."
    ),
    executor: str = typer.Option("local", "--executor", help="With --engine datatrove: local, slurm or ray."),
    tasks: int | None = typer.Option(None, "--tasks", min=1, help="With --engine datatrove: number of tasks. Default: --jobs."),
    partition: str | None = typer.Option(None, "--partition", help="With --executor slurm: the partition."),
    time_limit: str = typer.Option("24:00:00", "--time", help="With --executor slurm: the time limit of each task."),
    field: str = FIELD,
    template: str | None = TEMPLATE,
    errors: str = ERRORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Clean, filter and deduplicate a text, and encode it for training. The source files are not changed.

    Run the same command again to continue a preparation that was stopped.
    """
    if list_rules:
        _list_rules(json=json)
        return
    if not source:
        raise InputError("there is no text to prepare", where="SOURCE", hint="pass a file, folder or other SOURCE")
    if out is None and not dry_run:
        raise InputError("is required", where="--out", hint="or use --dry-run to see what would be removed")
    if heldout and heldout_share is not None:
        raise InputError("these options are mutually exclusive", where="--heldout, --heldout-share")
    share = 0.1 if heldout_share is None else heldout_share
    if not 0 < share < 1:
        raise InputError(f"must be between 0 and 1, not {share:g}", where="--heldout-share")
    if contaminated not in ("heldout", "train"):
        raise InputError(f"must be heldout or train, not {contaminated!r}", where="--contaminated")
    bands, rows = _parse_minhash(minhash)
    if engine not in ("builtin", "datatrove"):
        raise InputError(f"must be builtin or datatrove, not {engine!r}", where="--engine")
    if engine == "builtin" and (given := given_options(ctx, ("executor", "tasks", "partition", "time_limit"))):
        raise InputError("requires --engine datatrove", where=", ".join(given))
    if engine == "datatrove" and dry_run:
        raise InputError("not supported with --engine datatrove", where="--dry-run")
    cluster = _cluster(ctx, executor, tasks, jobs, partition, time_limit, quiet) if engine == "datatrove" else None
    from tinylm.curation.preparation import Preparation, report_dict
    from tinylm.curation.settings import Settings

    settings = Settings(
        tuple(source),
        tuple(heldout or ()),
        share,
        "train" if contaminated == "train" else "heldout",
        tuple(without or ()),
        bands,
        rows,
        _tokenizer(tokenizer, kind, vocab_size),
        field,
        template,
        checked_errors(errors),
    )
    reporter = ConsoleReporter(stderr_console(), quiet=quiet)
    start = time.perf_counter()
    with _folder(out, overwrite=overwrite) as folder:
        preparation = Preparation(settings, folder, reporter)

        def show(report: Report) -> None:
            if not json:
                _show(report, settings)
            _warn_about_rules(report, reporter)

        if cluster is not None:
            from tinylm.curation.datatrove_engine import run

            finished = run(preparation, cluster, show)
            if finished is None:
                done = "is replaced" if preparation.is_complete else "exists"
                reporter.note(f"submitted the jobs; when all of them are done, {out}/manifest.json {done} and contains the report")
                if json:
                    print_json({"folder": out, "submitted": True})
                return
            manifest = finished
        elif dry_run:
            report = preparation.report(jobs or 1)
            show(report)
            if (error := preparation.problem(report)) is not None:
                reporter.warn(f"without --dry-run, this command fails: {error}")
            if json:
                print_json({"folder": out, "dry_run": True, **report_dict(report), "seconds": time.perf_counter() - start})
            return
        else:
            with option_names_in_errors():
                manifest = preparation.run(jobs or 1, show)
    seconds = time.perf_counter() - start
    if json:
        print_json({"folder": out, "dry_run": False, **manifest, "seconds": seconds})
        return
    parts = manifest["parts"]
    train, held = (f"{parts[part]['tokens']:,}" for part in ("train", "heldout"))
    reporter.note(f"{out}: {train} training tokens and {held} held-out tokens in {format_duration(seconds)}")
    if not manifest["tokenizer"]["learned"] or vocab_size or kind:
        reporter.note(f"next: a recipe with `data: {{train: {out}}}` and `tokenizer: {{path: {out}/tokenizer.json}}`")
    else:
        reporter.note(f"next: a recipe with `data: {{train: {out}}}`")


def _parse_minhash(value: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,3})x(\d{1,2})", value)
    if match is None or not int(match[1]) or not int(match[2]):
        raise InputError(f"{value!r} is not BANDSxROWS", where="--minhash", hint="for example 14x8 or 20x5")
    return int(match[1]), int(match[2])


def _tokenizer(path: str | None, kind: str | None, vocab_size: int | None) -> Any:
    """Return the tokenizer section that the options describe."""
    from tinylm.recipe.schema import FileTokenizer

    if path is None:
        if kind in ("char", "byte"):
            return tokenizer_section(kind, vocab_size=vocab_size)
        return tokenizer_section(kind or "bpe", vocab_size=vocab_size or _VOCAB_SIZE, allow_smaller=True)
    for option, value in (("--kind", kind), ("--vocab-size", vocab_size)):
        if value is not None:
            raise InputError("these options are mutually exclusive", where=f"--tokenizer, {option}")
    return FileTokenizer(kind="file", path=path)


@contextmanager
def _folder(out: str | None, *, overwrite: bool) -> Iterator[Path]:
    """Yield the output folder, or a temporary folder for a dry run without --out.

    Raises `InputError` if it contains other files, or a prepared text unless `overwrite` is true. Changes nothing in the folder.
    """
    from tinylm.curation.preparation import FILES, UNFINISHED_FILES
    from tinylm.file_kinds import is_prepared_text
    from tinylm.paths import cache_folder, is_temporary, temporary_folder

    if out is None:
        with temporary_folder(cache_folder("spool"), "prepare") as temporary:
            yield temporary
        return
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError("is not a folder", where=out)
    names = {path.name for path in folder.iterdir() if not is_temporary(path.name)} if folder.exists() else set()
    if is_prepared_text(folder):
        if not overwrite:
            raise InputError("the folder already contains a prepared text", where=out, hint="--overwrite replaces it")
    elif not (folder / "work").is_dir() and not names <= (FILES if overwrite else UNFINISHED_FILES):
        hint = "--overwrite replaces its files" if names <= FILES else "use a new folder"
        raise InputError("the folder is not empty", where=out, hint=hint)
    yield folder


def _cluster(
    ctx: typer.Context, executor: str, tasks: int | None, jobs: int | None, partition: str | None, time_limit: str, quiet: bool
) -> Cluster:
    """Return where the tasks of --engine datatrove run. Raises `InputError` for options that the executor does not have."""
    from tinylm.curation.datatrove_engine import Cluster

    if executor not in ("local", "slurm", "ray"):
        raise InputError(f"must be local, slurm or ray, not {executor!r}", where="--executor")
    if executor == "slurm" and partition is None:
        raise InputError("is required with --executor slurm", where="--partition")
    if executor != "slurm" and (given := given_options(ctx, ("partition", "time_limit"))):
        raise InputError("requires --executor slurm", where=", ".join(given))
    tasks = tasks or jobs or 1
    workers = jobs or (1 if executor == "local" else tasks)
    return Cluster(executor, tasks, workers, partition or "", time_limit, quiet)


def _list_rules(*, json: bool) -> None:
    from tinylm.curation.cleaning import LINE_RULES
    from tinylm.curation.rules import RULES
    from tinylm.curation.settings import STEPS

    rules = {rule.name: rule.meaning for rule in RULES} | {rule.name: rule.meaning for rule in LINE_RULES} | STEPS
    if json:
        print_json([{"rule": name, "removes": meaning} for name, meaning in rules.items()])
        return
    print_fields(stdout_console(), rules.items())


def _show(report: Report, settings: Settings) -> None:
    """Print the report as a table, with an example of each removal."""
    console = stdout_console()
    table = Table(box=None, pad_edge=False)
    table.add_column("step")
    for column in ("documents", "removed", "share", "changed", "bytes removed"):
        table.add_column(column, justify="right")
    active = [step for step in report.steps if step.removed or step.changed]
    for step in active:
        removed = f"{step.removed:,}" if step.removed or not step.changed else "-"
        share = f"{step.share:.2%}" if step.removed or not step.changed else "-"
        changed = f"{step.changed:,}" if step.changed else "-"
        table.add_row(step.step, f"{step.documents:,}", removed, share, changed, format_size(step.bytes))
    kept = report.train.documents + report.heldout.documents
    total = report.documents - kept
    left = report.bytes - report.train.bytes - report.heldout.bytes
    table.add_row(
        "all steps", f"{report.documents:,}", f"{total:,}", f"{total / max(report.documents, 1):.2%}", "", format_size(left)
    )
    console.print(table)
    console.print()
    print_fields(
        console,
        [
            ("kept for training", f"{pluralize(report.train.documents, 'document')}, {format_size(report.train.bytes)}"),
            ("held out", f"{pluralize(report.heldout.documents, 'document')}, {format_size(report.heldout.bytes)}"),
        ],
    )
    if report.divided:
        console.print(f"divided very long documents, which added {pluralize(report.divided, 'document')}")
    if active:
        console.print("\nexamples")
        print_fields(console, [(step.step, _example(step)) for step in active if step.example is not None])
    idle = [step.step for step in report.steps if step not in active]
    if idle:
        console.print(f"\nno effect: {', '.join(idle)}", soft_wrap=True)
    if settings.without:
        console.print(f"switched off: {', '.join(settings.without)}", soft_wrap=True)


def _warn_about_rules(report: Report, reporter: ConsoleReporter) -> None:
    """Warn if the quality rules removed more than half of the documents. If nothing is left, the command fails with an error."""
    from tinylm.curation.rules import RULES

    names = {rule.name for rule in RULES}
    removals = [step for step in report.steps if step.step in names]
    removed = sum(step.removed for step in removals)
    if 2 * removed <= report.documents or not report.train.documents:
        return
    worst = max(removals, key=lambda step: step.removed)
    reporter.warn(
        f"quality rules, which were designed for English web pages, removed {removed:,} of {report.documents:,} documents, "
        f"{worst.removed:,} of them by {worst.step} (--without {worst.step} switches it off)"
    )


def _example(step: Step) -> str:
    """Describe the first document that a step changed or removed."""
    assert step.example is not None
    example = step.example
    text = " ".join(example["text"].split())
    if "document" not in example:
        return f"{text!r} ({step.meaning})"
    where = f"{example['source']}, document {example['document'] + 1}"
    reason = step.meaning
    if "value" in example:
        reason = f"{step.meaning}; here {example['value']:g}"
    if "original" in example:
        reason = f"{step.meaning}; the earlier one is document {example['original'] + 1}"
    return f"{text!r} ({where}; {reason})"
