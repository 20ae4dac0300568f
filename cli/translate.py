"""`tinylm translate`: translate lines of text with a trained encoder-decoder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import typer

from tinylm.errors import InputError

from .console import (
    CHECKPOINT,
    DEVICE,
    JSON,
    QUIET,
    RUN,
    THREADS,
    ConsoleReporter,
    StderrConsole,
    checked_text,
    given_options,
    open_run,
    print_json,
    stderr_console,
    write_stdout,
)

if TYPE_CHECKING:
    from tinylm.translation.translator import Translation

app = typer.Typer(add_completion=False)
_LINES_AT_ONCE = 512
_SAMPLING_OPTIONS = ("top_k", "seed")


@app.command()
def translate(
    ctx: typer.Context,
    text: str | None = typer.Argument(None, help="The text to translate, or - for standard input (default)."),
    input_: str | None = typer.Option(None, "--input", "-i", metavar="FILE", help="Translate the lines of this file."),
    beams: int = typer.Option(5, "--beams", help="Number of partial translations to keep in each step. 1 is greedy decoding."),
    length_penalty: float = typer.Option(
        1.0,
        "--length-penalty",
        help="The exponent A in score = log-probability / ((5 + length) / 6) ** A. The length includes the end token.",
    ),
    count: int = typer.Option(1, "-n", help="Print the N best translations of each line, with their scores."),
    max_length: int | None = typer.Option(
        None,
        "--max-length",
        help="Maximum length of a translation in tokens. Default: 3 times the source length plus 20, up to the context length.",
    ),
    no_repeat_ngram: int = typer.Option(
        0, "--no-repeat-ngram", metavar="N", help="Never generate the same sequence of N tokens twice; 0 turns this off."
    ),
    temperature: float | None = typer.Option(
        None, "--temperature", help="Sample at this temperature instead of searching for the most likely translation."
    ),
    top_k: int | None = typer.Option(None, "--top-k", help="With --temperature: sample only from the K most likely tokens."),
    seed: int = typer.Option(0, "--seed", min=0, help="With --temperature: the random seed."),
    to: str = typer.Option("", "--to", metavar="LANGUAGE", help="The target language, for a model with several target languages."),
    attention: bool = typer.Option(
        False, "--attention", help="For each generated token, show the source token that the decoder attended to most."
    ),
    average: int = typer.Option(1, "--average", min=1, metavar="N", help="Use the averaged weights of the last N checkpoints."),
    batch_size: int = typer.Option(
        32, "--batch-size", min=1, help="Number of sentences to translate together. It does not affect the result."
    ),
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    device: str = DEVICE,
    threads: int | None = THREADS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Translate text line by line: each line of the input becomes one line of output, or N lines with -n."""
    if temperature is None and (unused := given_options(ctx, _SAMPLING_OPTIONS)):
        raise InputError("requires --temperature", where=", ".join(unused))
    if temperature is not None and (unused := given_options(ctx, ("beams",))):
        raise InputError("cannot be combined with --temperature", where=", ".join(unused))
    if average > 1 and checkpoint is not None:
        raise InputError("has no effect with --average, which uses the last checkpoints", where="--checkpoint")
    console = stderr_console()
    opened = open_run(run, console, quiet=quiet)
    if average == 1:
        opened.checkpoint(checkpoint)  # report a missing checkpoint before torch is imported
    lines = _lines(text, input_)

    from tinylm.device import set_threads
    from tinylm.generation.precompile import compile_in_background
    from tinylm.translation.search import SearchOptions
    from tinylm.translation.translator import Translator

    options = SearchOptions(beams, length_penalty, count, max_length, no_repeat_ngram, temperature, top_k, seed)
    options.check()
    set_threads(threads)
    translator = Translator.open(opened, checkpoint, device=device, average=average)
    if translator.could_be_compiled:
        ctx.call_on_close(partial(compile_in_background, ConsoleReporter(console, quiet=quiet), "translation"))
    documents: list[dict[str, Any]] = []
    number = 0
    for group in _groups(lines):
        results = translator.translate(group, options, language=to, batch_size=batch_size, align=attention)
        for result in results:
            number += 1
            if result.note is not None:
                _warn(console, number, result.note)
            if json:
                documents.append(_document(result))
            else:
                _print(result, with_scores=count > 1)
    if json:
        print_json(documents)


def _lines(text: str | None, file: str | None) -> Iterator[str]:
    """Return the lines to translate, without line endings. Raises `InputError` if there are two inputs, or if an input is not
    UTF-8."""
    if text is not None and file is not None:
        raise InputError("cannot be combined with a text", where="--input")
    if text is not None and text != "-":
        return iter(checked_text(text, "TEXT").splitlines() or [""])
    if file is not None and file != "-":
        return _read_file(file)
    return _decoded(sys.stdin.buffer, "-")


def _read_file(path: str) -> Iterator[str]:
    try:
        stream = open(path, "rb")  # noqa: SIM115  closed when the lines have been read
    except OSError as error:
        raise InputError(error.strerror or "cannot be read", where=path) from None
    return _decoded(stream, path)


def _decoded(stream: Any, name: str) -> Iterator[str]:
    with stream:
        for number, line in enumerate(stream, 1):
            try:
                yield line.decode("utf-8").removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                raise InputError(f"not UTF-8 at byte {error.start}", where=f"{name}:{number}") from None


def _groups(lines: Iterator[str]) -> Iterator[list[str]]:
    """Yield groups of lines to translate together. Lines typed on a terminal are translated one by one, as soon as they are
    entered."""
    size = 1 if sys.stdin.isatty() else _LINES_AT_ONCE
    while group := list(islice(lines, size)):
        yield group


def _warn(console: StderrConsole, number: int, note: str) -> None:
    problem = "is empty, so its translation is empty" if note == "empty" else f"is longer than the model's context: {note}"
    console.print_line(f"warning: line {number} {problem}", "dim")


def _document(result: Translation) -> dict[str, Any]:
    from dataclasses import asdict

    document = {"source": result.source, "translations": [asdict(each) for each in result.translations]}
    if result.note is not None:
        document["note"] = result.note
    if result.alignment is not None:
        document["alignment"] = [asdict(each) for each in result.alignment]
    return document


def _print(result: Translation, *, with_scores: bool) -> None:
    for each in result.translations:
        write_stdout(f"{each.score:.4f}\t{each.text}" if with_scores else each.text)
    for token in result.alignment or ():
        write_stdout(f"  {token.token}\t{token.source}\t{token.weight:.2f}")
