"""`tinylm tokenize`: train tokenizers, apply them, judge them. Never loads torch."""

from __future__ import annotations

import io
import json as json_module
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from tinylm.errors import InputError, did_you_mean

from .console import (
    ERRORS,
    FIELD,
    JSON,
    QUIET,
    ConsoleReporter,
    Verbs,
    checked_errors,
    out,
    print_json,
    show_facts,
    stderr,
    stdout,
    things,
)

app = typer.Typer(cls=Verbs, add_completion=False, no_args_is_help=True, help="Train, apply and judge tokenizers.")
KINDS = ("bpe", "char", "byte")
TOKENIZER = typer.Option(None, "--tokenizer", "-t", help="A tokenizer.json.")
RUN = typer.Option(None, "--run", "-r", help="A run folder, whose tokenizer is used.")


@app.command()
def train(
    source: list[str] = typer.Argument(..., help="SOURCEs to learn from."),
    out_: str = typer.Option(..., "--out", help="Where to write the tokenizer.json."),
    kind: str = typer.Option("bpe", "--kind", help="bpe, char or byte."),
    vocab_size: int | None = typer.Option(None, "--vocab-size", help="Tokens wanted, for bpe; default 8192."),
    split: str | None = typer.Option(None, "--split", help="For bpe: gpt4 (default), gpt2 or a regular expression."),
    digits: int | None = typer.Option(None, "--digits", help="For split gpt4: longest run of digits in a token; default 2."),
    most_megabytes: int | None = typer.Option(None, "--most-megabytes", help="For bpe: learn from this much text; default 64."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing file."),
    field: str = FIELD,
    errors: str = ERRORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Train a tokenizer on text."""
    from tinylm.text.sources import Corpus, describe
    from tinylm.text.split import scan
    from tinylm.tokenizer import training

    path = Path(out_)
    if path.is_dir():
        raise InputError("is a folder", where=out_, hint="name the file to write")
    if path.exists() and not overwrite:
        raise InputError("exists already", where=out_, hint="--overwrite replaces it")
    section = _section(kind, vocab_size, split, digits, most_megabytes)
    reporter = ConsoleReporter(stderr(), quiet=quiet)
    start = time.perf_counter()
    with Corpus(source, field=field, errors=checked_errors(errors)) as corpus, reporter.progress("training", None, "B") as advance:
        seen = 0

        def watched() -> Iterator[Any]:
            nonlocal seen
            for piece in corpus.pieces():
                yield piece
                seen += len(piece.text)
                advance(seen)

        found = scan(corpus.pieces())
        if not found.documents:
            raise InputError("the text is empty", where=describe(source))
        tokenizer = training.train(section, watched(), reporter.warn, found.bytes)
    tokenizer.save(path)
    seconds = time.perf_counter() - start
    learned = f" from {things(seen, 'character')}" if seen else ""
    reporter.note(f"{tokenizer.kind}, {things(tokenizer.vocab_size, 'token')}{learned}, fingerprint {tokenizer.fingerprint[:12]}")
    if json:
        print_json(
            {
                "tokenizer": out_,
                "kind": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size,
                "seconds": seconds,
                "fingerprint": tokenizer.fingerprint,
            }
        )
    else:
        out(out_)


def _section(kind: str, vocab_size: int | None, split: str | None, digits: int | None, most_megabytes: int | None) -> Any:
    """The same section that a recipe's `tokenizer:` would be, with the same checks."""
    from tinylm.recipe import RecipeError, loads

    if kind not in KINDS:
        raise InputError(f"must be one of {', '.join(KINDS)}, not {kind!r}", where="--kind", hint=did_you_mean(kind, KINDS))
    keys = {"kind": kind, "vocab_size": vocab_size, "split": split, "digits": digits, "most_megabytes": most_megabytes}
    for key, value in keys.items():
        if kind != "bpe" and key != "kind" and value is not None:
            raise InputError("only kind bpe has it", where=f"--{key.replace('_', '-')}")
    if kind == "bpe" and vocab_size is None:
        keys["vocab_size"] = 8192
    written = {key: value for key, value in keys.items() if value is not None}
    text = json_module.dumps({"data": {"train": "-"}, "training": {"steps": 1}, "tokenizer": written}, ensure_ascii=False)
    try:
        return loads(text, check_files=False).tokenizer
    except RecipeError as error:
        problem = error.problems[0].removeprefix("recipe:1: tokenizer.")
        key, _, message = problem.partition(": ")
        raise InputError(message or problem, where=f"--{key.replace('_', '-')}" if message else "--kind") from None


def _tokenizer(tokenizer: str | None, run: str | None) -> Any:
    from tinylm.run import Run
    from tinylm.tokenizer import Tokenizer

    if (tokenizer is None) == (run is None):
        raise InputError("name one tokenizer", hint="with --tokenizer PATH or --run RUN")
    return Tokenizer.load(tokenizer) if tokenizer is not None else Run.open(str(run)).tokenizer


@app.command()
def encode(
    source: str = typer.Argument("-", help="A file, or - for standard input."),
    tokenizer: str | None = TOKENIZER,
    run: str | None = RUN,
    format: str = typer.Option(
        "ids", "--format", help="ids: separated by spaces, a line per document. tokens: one per line. jsonl: a document per line."
    ),
    field: str = FIELD,
    errors: str = ERRORS,
) -> None:
    """Print the token ids of a text."""
    from tinylm.text.sources import Corpus

    if format not in ("ids", "tokens", "jsonl"):
        raise InputError(f"must be ids, tokens or jsonl, not {format!r}", where="--format")
    loaded = _tokenizer(tokenizer, run)
    with Corpus([source], field=field, errors=checked_errors(errors)) as corpus:
        if format == "jsonl":
            for ids in _documents(loaded.encode_pieces(corpus.pieces())):
                out(json_module.dumps({"ids": ids, "tokens": _shown(loaded, ids)}, ensure_ascii=False))
            return
        between = ""
        for array, starts in loaded.encode_pieces(corpus.pieces()):
            ids = array.tolist()
            if format == "tokens":
                out("\n".join(json_module.dumps(token, ensure_ascii=False) for token in _shown(loaded, ids)))
            else:
                out(("\n" if starts and between else between) + " ".join(map(str, ids)), end="")
                between = " "
        if between:
            out("")


def _documents(encoded: Any) -> Iterator[list[int]]:
    ids: list[int] = []
    for array, starts in encoded:
        if starts and ids:
            yield ids
            ids = []
        ids += array.tolist()
    if ids:
        yield ids


def _shown(tokenizer: Any, ids: list[int]) -> list[str]:
    table = tokenizer.token_bytes
    return [table[id].decode("utf-8", "replace") for id in ids]


@app.command()
def decode(
    source: str = typer.Argument("-", help="A file of ids as `encode` prints them, or - for standard input."),
    tokenizer: str | None = TOKENIZER,
    run: str | None = RUN,
) -> None:
    """Print the text of token ids, exactly, with nothing added."""
    loaded = _tokenizer(tokenizer, run)
    table = loaded.token_bytes
    with ExitStack() as stack:
        if source == "-":
            stream = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", errors="replace")
        else:
            try:
                stream = stack.enter_context(open(source, encoding="utf-8", errors="replace"))
            except OSError as error:
                raise InputError(error.strerror or "cannot be read", where=source) from None
        sys.stdout.flush()
        for word in _words(stream):
            if not re.fullmatch("[0-9]{1,9}", word) or int(word) >= len(table):
                raise InputError(f"{word[:40]!r} is not an id below {len(table):,}", where=source)
            sys.stdout.buffer.write(table[int(word)])
    sys.stdout.buffer.flush()


def _words(stream: Any) -> Iterator[str]:
    rest = ""
    while block := stream.read(1 << 16):
        words = (rest + block).split()
        rest = words.pop() if words and not block[-1].isspace() else ""
        yield from words
    if rest:
        yield rest


@app.command()
def report(
    source: list[str] = typer.Argument(..., help="SOURCEs to judge it on, best text it was not trained on."),
    tokenizer: str | None = TOKENIZER,
    run: str | None = RUN,
    field: str = FIELD,
    errors: str = ERRORS,
    json: bool = JSON,
) -> None:
    """How well a tokenizer fits a text: compression, coverage, balance, round trip, speed."""
    from tinylm.text.sources import Corpus
    from tinylm.tokenizer.report import report as make_report

    loaded = _tokenizer(tokenizer, run)
    with Corpus(source, field=field, errors=checked_errors(errors)) as corpus:
        found = make_report(loaded, corpus.pieces())
    name = tokenizer or str(Path(str(run)) / "tokenizer.json")
    if json:
        print_json({"tokenizer": name, **asdict(found)})
        return
    sizes = ((found.documents, "document"), (found.bytes, "byte"), (found.words, "word"), (found.tokens, "token"))
    rows = (
        ("tokenizer", f"{name}: {found.kind}, {found.vocab_size:,} tokens"),
        ("text", ", ".join(things(*size) for size in sizes)),
        ("bytes per token", f"{found.bytes_per_token:.3f}"),
        ("tokens per word", f"{found.tokens_per_word:.3f}"),
        ("unused tokens", f"{found.unused_tokens:,} of {found.vocab_size:,}"),
        ("unknown tokens", f"{found.unknown_tokens:,}"),
        ("Rényi efficiency", f"{found.renyi_efficiency:.3f}"),
        ("round-trip failures", f"{found.round_trip_failures:,}"),
        ("encoding", f"{found.encode_megabytes_per_second:.2f} MB/s on one core"),
        ("most frequent", "  ".join(f"{token!r} {times:,}" for token, times in found.frequent_tokens)),
        ("longest", "  ".join(repr(token) for token in found.longest_tokens)),
    )
    show_facts(stdout(), rows)
