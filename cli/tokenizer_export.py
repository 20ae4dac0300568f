"""`tinylm tokenize export`: write a tokenizer in another format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from tinylm.errors import InputError, did_you_mean

from .console import (
    JSON,
    QUIET,
    RUN,
    ConsoleReporter,
    checked_output_file,
    print_fields,
    print_json,
    stderr_console,
    stdout_console,
)
from .tokenizer_options import TOKENIZER, load_tokenizer

if TYPE_CHECKING:
    from tinylm.text.sources import Piece

FORMATS = ("tiktoken", "json")
_CHECKED_CHARACTERS = 1 << 20


def export(
    out_: str = typer.Argument(..., metavar="FILE", help="The file to write."),
    to: str = typer.Option(..., "--to", help="tiktoken: rank file for tiktoken. json: tokenizer.json."),
    tokenizer: str | None = TOKENIZER,
    run: str | None = RUN,
    check_on: str = typer.Option(
        "builtin:python-docs",
        "--check-on",
        help="With --to tiktoken: a SOURCE. The first megabyte must be encoded to the same ids.",
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing file."),
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Write a tokenizer as a tiktoken rank file or as a tokenizer.json.

    A rank file contains neither the split pattern nor the special tokens. They are printed.
    """
    if to not in FORMATS:
        raise InputError(f"must be tiktoken or json, not {to!r}", where="--to", hint=did_you_mean(to, FORMATS))
    path = checked_output_file(out_, overwrite)
    loaded = load_tokenizer(tokenizer, run, quiet)
    if to == "json":
        loaded.save(path)
        if json:
            print_json({"tokenizer": out_, "to": to, "kind": loaded.kind, "vocab_size": loaded.vocab_size})
        else:
            print_fields(stdout_console(), [("exported to", out_), ("tokens", f"{loaded.vocab_size:,}")])
        return

    from tinylm.text.sources import Corpus
    from tinylm.tokenizer.exporting import export_tiktoken

    reporter = ConsoleReporter(stderr_console(), quiet=quiet)
    with Corpus([check_on]) as corpus:
        try:
            exported = export_tiktoken(loaded, path, _beginning(corpus.pieces()))
        except InputError as error:
            raise InputError(error.message, where=error.where or "--to tiktoken", hint=error.hint) from None
    if json:
        print_json({"tokenizer": out_, "to": to, **asdict(exported)})
        return
    if "tiktoken" not in exported.verified_with:
        reporter.note("tiktoken is not installed, so the file was only checked with tinylm (pip install tiktoken)")
    print_fields(
        stdout_console(),
        [
            ("exported to", out_),
            ("tokens", f"{exported.vocab_size:,}"),
            ("split pattern", exported.pattern),
            ("special tokens", ", ".join(f"{token} {id}" for token, id in exported.special_tokens.items()) or "none"),
            ("verified with", f"{' and '.join(exported.verified_with)}: equal ids for {exported.tokens_compared:,} tokens of text"),
        ],
    )


def _beginning(pieces: Iterator[Piece]) -> Iterator[Piece]:
    remaining = _CHECKED_CHARACTERS
    for piece in pieces:
        if remaining <= 0:
            return
        yield piece
        remaining -= len(piece.text)
