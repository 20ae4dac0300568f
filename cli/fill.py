"""`tinylm fill`: predict the most likely tokens for each [MASK] in a text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from tinylm.errors import InputError
from tinylm.text.files import text_lines

from .console import (
    CHECKPOINT,
    DEVICE,
    JSON,
    QUIET,
    RUN,
    THREADS,
    checked_text,
    given_options,
    open_run,
    print_json,
    stderr_console,
    stdout_console,
    write_stdout,
)

if TYPE_CHECKING:
    from tinylm.evaluation.filling import FilledText

app = typer.Typer(add_completion=False)


@app.command()
def fill(
    ctx: typer.Context,
    text: str = typer.Argument(
        ..., help="A text with [MASK] for each token to predict, or - to read one text per line from standard input."
    ),
    top: int = typer.Option(5, "--top", "-k", min=1, help="Number of tokens to show for each mask."),
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    device: str = DEVICE,
    threads: int | None = THREADS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Predict the masked tokens in a text from the context on both sides, with a model trained with `objective: masked_lm`.

    If the tokenizer joins spaces to words, a space before [MASK] belongs to the masked token. For text from standard input, the
    output is one filled text per line, with newlines in predicted tokens written as \\n, or a list with --json.
    """
    if text == "-" and not json and given_options(ctx, ("top",)):
        raise InputError("requires --json if the text comes from standard input", where="--top")
    texts = _lines() if text == "-" else {"TEXT": checked_text(text, "TEXT")}
    opened = open_run(run, stderr_console(), quiet=quiet)
    chosen = opened.checkpoint(checkpoint)

    from tinylm import device as devices
    from tinylm.evaluation.filling import fill as fill_text
    from tinylm.evaluation.filling import require_head, require_masked_model

    devices.set_threads(threads)
    network = opened.network(chosen, devices.resolve(device))
    require_masked_model(network)
    require_head(opened)

    def fill_texts() -> Iterator[FilledText]:
        for where, line in texts.items():
            try:
                yield fill_text(network, opened.tokenizer, line, top)
            except InputError as error:
                raise InputError(error.message, where=where, hint=error.hint) from None

    filled = fill_texts()
    if json:
        documents = [result.as_dict() for result in filled]
        print_json(documents if text == "-" else documents[0])
    elif text == "-":
        for result in filled:
            write_stdout(result.filled_line)
    else:
        _print(next(filled))


def _lines() -> dict[str, str]:
    """Return the non-blank lines of standard input by their place, such as `-:1`. Raises `InputError` if there are none."""
    lines = {f"-:{number}": line for number, line in enumerate(text_lines(sys.stdin.read()), 1) if line.strip()}
    if not lines:
        raise InputError("standard input is empty", where="-", hint="write one text with [MASK] per line")
    return {where: checked_text(line, where) for where, line in lines.items()}


def _print(result: FilledText) -> None:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("mask", justify="right")
    table.add_column("probability", justify="right")
    table.add_column("token")
    for number, mask in enumerate(result.masks, 1):
        for rank, candidate in enumerate(mask.candidates):
            table.add_row(str(number) if rank == 0 else "", f"{candidate.probability:.2%}", Text(repr(candidate.token)[1:-1]))
    console = stdout_console()
    console.print(table)
    console.print(Text(result.filled))
