"""`tinylm classify`: predict the labels of texts, with probabilities."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import typer

from tinylm.errors import InputError
from tinylm.text.files import text_lines

from .console import (
    CHECKPOINTS,
    DEVICE,
    ERRORS,
    FIELD,
    JSON,
    QUIET,
    RUNS,
    TEMPLATE,
    THREADS,
    ConsoleReporter,
    checked_errors,
    checked_text,
    escaped,
    given_options,
    open_ensemble,
    print_json,
    stderr_console,
    write_stdout,
)

app = typer.Typer(add_completion=False)


@app.command()
def classify(
    ctx: typer.Context,
    text: str | None = typer.Argument(None, help="A text, or - to classify every line of standard input."),
    input_: str | None = typer.Option(
        None, "--input", "-i", metavar="SOURCE", help="Classify the texts in files, folders, globs or URLs instead."
    ),
    documents: bool = typer.Option(
        False, "--documents", help="With --input: classify each plain text file as a whole instead of line by line."
    ),
    calibrated: bool = typer.Option(
        False, "--calibrated", help="Divide the logits by a temperature that is fitted to the run's held-out texts."
    ),
    run: list[str] | None = RUNS,
    checkpoint: list[str] | None = CHECKPOINTS,
    field: str = FIELD,
    template: str | None = TEMPLATE,
    errors: str = ERRORS,
    device: str = DEVICE,
    threads: int | None = THREADS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Classify texts with a model that was trained with `objective: classification`.

    Print one line per text: the label, its probability and the text, separated by tabs. With --json, print the probabilities of
    all labels. With several --run or --checkpoint options, the probabilities are the mean of the models' probabilities.
    """
    checked_errors(errors)
    if text is not None and input_ is not None:
        raise InputError("cannot be combined with a text", where="--input", hint="use one of them")
    if text is None and input_ is None:
        raise InputError("requires a text, - for standard input, or --input SOURCE", where="TEXT")
    if input_ is None and (unused := given_options(ctx, ("documents", "field", "template", "errors"))):
        raise InputError("requires --input", where=", ".join(unused))
    console = stderr_console()
    opened = open_ensemble(run, checkpoint, console, quiet=quiet)

    from tinylm import device as devices
    from tinylm.evaluation.classify_texts import TextClassifier, require_classifier
    from tinylm.recipe.labels import LabelsSection

    require_classifier(opened.members[0].run)
    devices.set_threads(threads)
    classifier = TextClassifier(opened, devices.resolve(device))
    if calibrated:
        temperature = classifier.calibrate()
        if not quiet:
            console.print_line(f"calibrated with temperature {temperature:.3f}", "dim")
    if input_ is not None:
        data = opened.members[0].run.recipe.data
        is_default = isinstance(data, LabelsSection) and not given_options(ctx, ("field", "template"))
        own_field = data.text if isinstance(data, LabelsSection) and is_default else field
        texts: Iterable[str] = _texts_of(input_, documents, own_field, template, errors, is_default)
    else:
        texts = _lines(_stdin_lines(), "-") if text == "-" else [_argument(str(text))]
    predictions = classifier.classify(texts)
    if json:
        print_json(list(predictions))
    for prediction in () if json else predictions:
        shown = " ".join(prediction.text.split())
        write_stdout(f"{escaped(prediction.label)}\t{prediction.probabilities[prediction.label]:.4f}\t{shown}")
    classifier.counts.report(ConsoleReporter(console, quiet=quiet))


def _texts_of(source: str, whole: bool, field: str, template: str | None, errors: str, unused: bool) -> Iterator[str]:
    """Yield the texts in a SOURCE: each record, and each line of a plain text file (or the whole file if `whole` is true).

    With `unused`, `field` may have no effect, because the source has no records. Raises `InputError` if all texts are blank.
    """
    from tinylm.text.sources import Corpus

    found = False
    with Corpus([source], field=field, template=template, errors=errors, allow_unused_format=unused) as corpus:
        for name, is_record, document in corpus.documents():
            found = found or bool(document.strip())
            if is_record or whole:
                yield document
            else:
                yield from _lines(text_lines(document), name)
    if not found:
        raise InputError("contains no text to classify", where=source, hint="empty lines and records are skipped")


def _argument(text: str) -> str:
    if not text.strip():
        raise InputError("the text is empty", where="TEXT", hint="pass a text to classify")
    return checked_text(text, "TEXT")


def _stdin_lines() -> list[str]:
    """Return the lines of standard input. Raises `InputError` if all of them are blank."""
    content = sys.stdin.read()
    if not content.strip():
        raise InputError("standard input is empty", where="-", hint="write one text per line")
    return text_lines(content)


def _lines(lines: list[str], where: str) -> Iterator[str]:
    for line in lines:
        yield checked_text(line, where)
