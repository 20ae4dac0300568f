"""`tinylm translate`: translate lines of text with a trained encoder-decoder."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from functools import partial
from io import UnsupportedOperation
from itertools import islice
from typing import IO, TYPE_CHECKING, Any

import typer

from tinylm.errors import InputError
from tinylm.text.files import TextFile, open_bytes, read_lines, refuse_binary

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
    groups = _groups(text, input_)

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
    for group in groups:
        results = translator.translate(group, options, language=to, batch_size=batch_size, align=attention)
        for result in results:
            number += 1
            if result.note is not None:
                _warn(console, number, result.note)
            if json:
                documents.append(_document(result))
            else:
                _print(result, count)
    if json:
        print_json(documents)


def _groups(text: str | None, file: str | None) -> Iterator[list[str]]:
    """Return the lines to translate, without line endings, in groups that are translated together.

    Raises `InputError` if there are two inputs, or if the input cannot be read or is not UTF-8.
    """
    if text is not None and file is not None:
        raise InputError("cannot be combined with a text", where="--input")
    if text is not None and text != "-":
        return iter([checked_text(text, "TEXT").splitlines() or [""]])
    if file is None or file == "-":
        return _decoded(_available_lines(sys.stdin.buffer), "-")
    opened = TextFile.at(file, file)
    if os.path.isfile(file):
        refuse_binary(opened)
    return _decoded(_blocks_of_lines(file, open_bytes(opened)), file)


def _blocks_of_lines(name: str, stream: IO[bytes]) -> Iterator[list[bytes]]:
    with stream:
        lines = read_lines(name, stream)
        while block := list(islice(lines, _LINES_AT_ONCE)):
            yield block


def _available_lines(stream: Any) -> Iterator[list[bytes]]:
    """Yield the lines of standard input in groups. A group ends when no more input is available, so that a program that writes a
    line and waits for its translation gets an answer."""
    lines: list[bytes] = []
    rest = b""
    while block := stream.read1():
        *complete, rest = (rest + block).split(b"\n")
        lines += complete
        while len(lines) >= _LINES_AT_ONCE or (lines and not _has_input(stream)):
            yield lines[:_LINES_AT_ONCE]
            lines = lines[_LINES_AT_ONCE:]
    lines += [rest] if rest else []
    if lines:
        yield lines


def _has_input(stream: Any) -> bool:
    """Whether reading does not block. Streams without a file descriptor never block. On Windows, the answer is always no."""
    if sys.platform == "win32":  # where `select` supports only sockets
        return False
    try:
        return bool(select.select([stream], [], [], 0)[0])
    except UnsupportedOperation:
        return True


def _decoded(groups: Iterator[list[bytes]], name: str) -> Iterator[list[str]]:
    number = 0
    for group in groups:
        texts = []
        for line in group:
            number += 1
            try:
                text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                raise InputError(f"not UTF-8 at byte {error.start}", where=f"{name}:{number}") from None
            texts.append(text.removeprefix("\ufeff") if number == 1 else text)
        yield texts


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


def _print(result: Translation, count: int) -> None:
    """Print `count` lines, with scores if there are several. If there are fewer translations, the remaining lines are a tab."""
    for each in result.translations:
        write_stdout(f"{each.score:.4f}\t{each.text}" if count > 1 else each.text)
    for _ in range(count - len(result.translations)):
        write_stdout("\t")
    for token in result.alignment or ():
        write_stdout(f"  {token.token}\t{token.source}\t{token.weight:.2f}")
