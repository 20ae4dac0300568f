"""`tinylm tokenize`: train, apply and edit tokenizers. The subcommands that evaluate tokenizers are in `tokenizer_report`.

torch is imported only to edit a run's tokenizer.
"""

from __future__ import annotations

import io
import json as json_module
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tinylm.errors import InputError

from . import tokenizer_export, tokenizer_report
from .console import (
    CHECKPOINT,
    ERRORS,
    FIELD,
    JSON,
    QUIET,
    RUN,
    TEMPLATE,
    CommandGroup,
    ConsoleReporter,
    checked_errors,
    checked_output_file,
    checked_text,
    open_run,
    pluralize,
    print_json,
    stderr_console,
    write_stdout,
)
from .tokenizer_options import DEFAULT_VOCAB_SIZE, KINDS, TOKENIZER, load_tokenizer, option_names_in_errors, tokenizer_section

if TYPE_CHECKING:
    from tinylm.tokenizer import Tokenizer
    from tinylm.tokenizer.vocab_editing import EditedTokenizer

app = typer.Typer(cls=CommandGroup, add_completion=False, no_args_is_help=True, help="Train, apply, compare and edit tokenizers.")
for command in (tokenizer_report.report, tokenizer_report.compare, tokenizer_report.explain, tokenizer_report.sweep):
    app.command()(command)
app.command()(tokenizer_export.export)
OVERWRITE = typer.Option(False, "--overwrite", help="Replace an existing file.")


@app.command()
def train(
    source: list[str] = typer.Argument(..., help="Texts to train on."),
    out_: str = typer.Option(..., "--out", help="The tokenizer.json to write."),
    kind: str = typer.Option("bpe", "--kind", help=f"Kind of tokenizer: {', '.join(KINDS)}."),
    vocab_size: int | None = typer.Option(
        None, "--vocab-size", help=f"Number of tokens, including special and added tokens. Default: {DEFAULT_VOCAB_SIZE}."
    ),
    allow_smaller: bool = typer.Option(
        False, "--allow-smaller", help="If the text is too small for the vocabulary size, learn fewer tokens instead of failing."
    ),
    split: str | None = typer.Option(
        None,
        "--split",
        help="How to split text into words, whose boundaries tokens never cross: gpt4 (default), gpt2, llama3, whitespace, none or "
        "a regular expression. For the kinds wordpiece and word: bert (default), whitespace or a regular expression.",
    ),
    digits: int | None = typer.Option(None, "--digits", help="Maximum number of digits in a token. Default: 2 with --split gpt4."),
    normalize: list[str] | None = typer.Option(
        None,
        "--normalize",
        help="Normalization: nfc, nfd, nfkc, nfkd, lowercase or strip_accents. Can be repeated. Decoding does not reverse it.",
    ),
    alphabet: str | None = typer.Option(
        None,
        "--alphabet",
        help="Initial tokens: bytes, text (all characters in the text), a number N (the N most frequent characters), or a string "
        "with the characters themselves.",
    ),
    byte_fallback: bool | None = typer.Option(
        None,
        "--byte-fallback/--no-byte-fallback",
        help="Encode characters outside the alphabet as bytes (default) or as the unknown token.",
    ),
    min_frequency: int | None = typer.Option(
        None, "--min-frequency", help="Minimum number of occurrences for a merge, word or character. Default: 1."
    ),
    max_token_length: int | None = typer.Option(
        None, "--max-token-length", help="Maximum token length, in bytes with `--alphabet bytes`, otherwise in characters."
    ),
    special: list[str] | None = typer.Option(None, "--special", help="An additional control token. Can be repeated."),
    added: list[str] | None = typer.Option(None, "--added", help="A string that is always one token. Can be repeated."),
    max_megabytes: int | None = typer.Option(
        None, "--max-megabytes", help="To limit memory, train on at most this many megabytes, sampled evenly. Default: 64."
    ),
    overwrite: bool = OVERWRITE,
    field: str = FIELD,
    template: str | None = TEMPLATE,
    errors: str = ERRORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Train a tokenizer on text."""
    from tinylm.text.sources import Corpus, Piece, describe
    from tinylm.text.split import scan
    from tinylm.tokenizer import training

    path = checked_output_file(out_, overwrite)
    section = tokenizer_section(
        kind,
        vocab_size=vocab_size,
        allow_smaller=allow_smaller or None,
        split=split,
        digits=digits,
        normalize=normalize or None,
        alphabet=alphabet,
        byte_fallback=byte_fallback,
        min_frequency=min_frequency,
        max_token_length=max_token_length,
        special_tokens=special or None,
        added_tokens=added or None,
        max_megabytes=max_megabytes,
    )
    reporter = ConsoleReporter(stderr_console(), quiet=quiet)
    start = time.perf_counter()
    with (
        Corpus(source, field=field, template=template, errors=checked_errors(errors)) as corpus,
        reporter.progress("training", None, "B") as advance,
    ):
        n_characters = 0

        def with_progress() -> Iterator[Piece]:
            nonlocal n_characters
            for piece in corpus.pieces():
                yield piece
                n_characters += len(piece.text)
                advance(n_characters)

        scanned = scan(corpus.pieces())
        if not scanned.documents:
            raise InputError("the text is empty", where=describe(source))
        with option_names_in_errors():
            tokenizer = training.train(section, with_progress(), reporter.warn, scanned.bytes)
    tokenizer.save(path)
    seconds = time.perf_counter() - start
    size = f"{pluralize(tokenizer.vocab_size, 'token')}" + (f" from {pluralize(n_characters, 'character')}" if n_characters else "")
    reporter.note(f"{tokenizer.kind} tokenizer: {size}, fingerprint {tokenizer.fingerprint[:12]}")
    _print_result(out_, tokenizer, {"seconds": seconds}, json)


def _print_result(path: str, tokenizer: Tokenizer, extra: dict[str, Any], json: bool) -> None:
    """Print the path of a new tokenizer. With `json`, also print its properties and the `extra` keys."""
    if not json:
        write_stdout(path)
        return
    properties = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    print_json({"tokenizer": path, **properties, **extra})


@app.command()
def encode(
    source: str = typer.Argument("-", help="A SOURCE, or - for standard input."),
    tokenizer: str | None = TOKENIZER,
    run: str | None = RUN,
    format: str = typer.Option(
        "ids",
        "--format",
        help="ids: token ids separated by spaces, one document per line. tokens: one token per line. jsonl: one document per line.",
    ),
    allow_special: bool = typer.Option(False, "--allow-special", help="Encode text that spells a special token as that token."),
    dropout: float = typer.Option(
        0.0, "--dropout", min=0.0, max=0.999, help="For the kind bpe: skip this fraction of the merges at random."
    ),
    seed: int = typer.Option(0, "--seed", min=0, help="Random seed for --dropout."),
    field: str = FIELD,
    template: str | None = TEMPLATE,
    errors: str = ERRORS,
    quiet: bool = QUIET,
) -> None:
    """Print the token ids of a text."""
    from tinylm.text.sources import Corpus, is_missing

    if format not in ("ids", "tokens", "jsonl"):
        raise InputError(f"must be ids, tokens or jsonl, not {format!r}", where="--format")
    if dropout and allow_special:
        raise InputError("these options are mutually exclusive", where="--dropout, --allow-special")
    loaded = load_tokenizer(tokenizer, run, quiet)
    loaded.encoder.note = ConsoleReporter(stderr_console(), quiet=quiet).note
    if is_missing(source):
        raise InputError(
            "no such file or folder", where=source, hint='to encode a text, pipe it in: echo "hello" | tinylm tokenize encode'
        )
    with Corpus([source], field=field, template=template, errors=checked_errors(errors)) as corpus:
        encoded = _encoded(loaded, corpus.pieces(keep_empty=True), allow_special, dropout, seed)
        if format == "jsonl":
            for ids in _documents(encoded):
                write_stdout(json_module.dumps({"ids": ids, "tokens": _token_texts(loaded, ids)}, ensure_ascii=False))
        elif format == "tokens":
            for array, _ in encoded:
                if len(array):
                    tokens = (json_module.dumps(token, ensure_ascii=False) for token in _token_texts(loaded, array.tolist()))
                    write_stdout("\n".join(tokens))
        else:
            _print_ids(encoded)


def _print_ids(encoded: Any) -> None:
    """Print ids as they arrive, separated by spaces, with one line per document."""
    separator = None  # written before more ids of the same document; None before the first document
    for array, starts_document in encoded:
        ids = array.tolist()
        if separator is not None and starts_document:
            write_stdout("")
        continued = "" if starts_document or separator is None or not ids else separator
        write_stdout(continued + " ".join(map(str, ids)), end="")
        separator = " " if ids or (separator and not starts_document) else ""
    if separator is not None:
        write_stdout("")


def _encoded(tokenizer: Tokenizer, pieces: Any, allow_special: bool, dropout: float, seed: int) -> Iterator[tuple[Any, bool]]:
    """Encode the pieces. Yield (ids, whether the ids start a document)."""
    if dropout:
        from tinylm.tokenizer.dropout import DropoutEncoder

        return DropoutEncoder(tokenizer, dropout, seed).encode_pieces(pieces)
    if allow_special:
        return tokenizer.encode_pieces_with_special(pieces)
    return tokenizer.encode_pieces(pieces)


def _documents(encoded: Any) -> Iterator[list[int]]:
    """Yield the ids of each document."""
    ids: list[int] | None = None
    for array, starts_document in encoded:
        if starts_document and ids is not None:
            yield ids
            ids = None
        ids = ids if ids is not None else []
        ids += array.tolist()
    if ids is not None:
        yield ids


def _token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text of each token. Special tokens have no text, so their names are returned instead."""
    table = tokenizer.token_bytes
    return [table[id].decode("utf-8", "replace") or str(tokenizer.backend.id_to_token(id)) for id in ids]


@app.command()
def decode(
    source: str = typer.Argument("-", help="A file with ids, in the output format of `encode`, or - for standard input."),
    tokenizer: str | None = TOKENIZER,
    run: str | None = RUN,
    quiet: bool = QUIET,
) -> None:
    """Print the text of token ids. No newline is added at the end."""
    loaded = load_tokenizer(tokenizer, run, quiet)
    decoder, size = loaded.byte_decoder(), loaded.vocab_size
    with ExitStack() as stack:
        if source == "-":
            stream = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", errors="replace")
        else:
            try:
                stream = stack.enter_context(open(source, encoding="utf-8", errors="replace"))
            except OSError as error:
                raise InputError(error.strerror or "cannot be read", where=source) from None
        sys.stdout.flush()
        written = False
        for word in _words(stream):
            if not re.fullmatch("[0-9]{1,9}", word) or int(word) >= size:
                if written:  # start the error message on a new line
                    write_stdout("")
                where = "standard input" if source == "-" else source
                raise InputError(f"{word[:40]!r} is not an id below {size:,}", where=where)
            text = decoder.push(int(word))
            written = written or bool(text)
            sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def _words(stream: io.TextIOBase) -> Iterator[str]:
    """Yield the words in a stream. The stream is read in blocks, because a line may not fit in memory."""
    rest = ""
    while block := stream.read(1 << 16):
        words = (rest + block).split()
        rest = words.pop() if words and not block[-1].isspace() else ""
        yield from words
    if rest:
        yield rest


TOKENS = typer.Argument(..., help="The tokens, as text.")
EDIT_OUT = typer.Option(..., "--out", help="The tokenizer.json to write, or the new run folder with --run.")
CHECK_ON = typer.Option(
    "builtin:python-docs", "--check-on", help="A SOURCE for checking that lines without the tokens are still encoded as before."
)


@dataclass(frozen=True)
class EditOptions:
    """Options shared by `add` and `remove`."""

    tokens: list[str]
    out: str
    tokenizer: str | None
    run: str | None
    checkpoint: str | None
    check_on: str
    overwrite: bool
    json: bool
    quiet: bool


@app.command()
def add(
    token: list[str] = TOKENS,
    out_: str = EDIT_OUT,
    special: bool = typer.Option(
        False, "--special", help="Add the tokens as control tokens, which text is encoded as only with --allow-special."
    ),
    tokenizer: str | None = TOKENIZER,
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    check_on: str = CHECK_ON,
    overwrite: bool = OVERWRITE,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Add tokens to a tokenizer or a run. The embedding of a new token is the mean embedding of the tokens that it replaces."""
    from tinylm.tokenizer import vocab_editing

    options = EditOptions(token, out_, tokenizer, run, checkpoint, check_on, overwrite, json, quiet)
    _edit(lambda loaded: vocab_editing.add(loaded, token, special=special), options)


@app.command()
def remove(
    token: list[str] = TOKENS,
    out_: str = EDIT_OUT,
    tokenizer: str | None = TOKENIZER,
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    check_on: str = CHECK_ON,
    overwrite: bool = OVERWRITE,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Remove tokens from a tokenizer or a run, with their merges and embedding rows. The remaining tokens are renumbered."""
    from tinylm.tokenizer import vocab_editing

    options = EditOptions(token, out_, tokenizer, run, checkpoint, check_on, overwrite, json, quiet)
    _edit(lambda loaded: vocab_editing.remove(loaded, token), options)


def _edit(change: Callable[[Tokenizer], EditedTokenizer], options: EditOptions) -> None:
    """Edit a tokenizer, check the result on a text, and write the new tokenizer.json or run."""
    from tinylm.errors import WorkError
    from tinylm.text.sources import Corpus
    from tinylm.tokenizer import Tokenizer, vocab_editing

    for token in options.tokens:
        checked_text(token, "TOKEN")
    reporter = ConsoleReporter(stderr_console(), quiet=options.quiet)
    if options.tokenizer is not None and (options.run is not None or options.checkpoint is not None):
        raise InputError("these options are mutually exclusive", where="--tokenizer, --run, --checkpoint")
    run = open_run(options.run, stderr_console(), quiet=options.quiet) if options.tokenizer is None else None
    path = Path(options.out) if run is not None else checked_output_file(options.out, options.overwrite)
    if run is not None and options.overwrite:
        raise InputError("runs are never overwritten", where="--overwrite", hint="choose another folder with --out")
    loaded = run.tokenizer if run is not None else Tokenizer.load(str(options.tokenizer))
    edited = change(loaded)
    with Corpus([options.check_on]) as corpus:
        check = vocab_editing.check_encoding(loaded, edited, options.tokens, corpus.pieces())
    if check.unchanged != check.unaffected:
        raise WorkError(
            f"{pluralize(check.unaffected - check.unchanged, 'line')} without the tokens would be encoded differently; "
            "nothing was written"
        )
    if run is not None:
        from tinylm.training import vocabulary

        vocabulary.write_edited_run(run, edited, path, checkpoint=options.checkpoint, reporter=reporter)
    else:
        edited.tokenizer.save(path)
    if edited.also_removed:
        reporter.note(
            f"also removed, because they were merged from the removed tokens: {', '.join(map(repr, edited.also_removed))}"
        )
    reporter.note(
        f"{loaded.vocab_size:,} -> {edited.tokenizer.vocab_size:,} tokens; checked on {options.check_on}: all "
        f"{pluralize(check.unaffected, 'line')} without these tokens (of {check.lines:,} lines) are encoded as before"
    )
    extra = {"also_removed": edited.also_removed, "lines_checked": check.unaffected, "lines_unchanged": check.unchanged}
    _print_result(options.out, edited.tokenizer, extra, options.json)
