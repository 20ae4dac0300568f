"""`tinylm tokenize`: train tokenizers, apply them, change them; to judge them see `tokenizer_report`. Loads torch only to change a run."""

from __future__ import annotations

import io
import json as json_module
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer

from tinylm.errors import InputError, did_you_mean

from . import tokenizer_report
from .console import (
    CHECKPOINT,
    ERRORS,
    FIELD,
    JSON,
    QUIET,
    RUN,
    ConsoleReporter,
    Verbs,
    checked_errors,
    checked_text,
    open_run,
    out,
    print_json,
    stderr,
    things,
)

app = typer.Typer(cls=Verbs, add_completion=False, no_args_is_help=True, help="Train, apply, judge and change tokenizers.")
for verb in (tokenizer_report.report, tokenizer_report.compare, tokenizer_report.explain, tokenizer_report.sweep):
    app.command()(verb)
KINDS = ("bpe", "unigram", "wordpiece", "word", "char", "byte")
TOKENIZER = tokenizer_report.TOKENIZER
OVERWRITE = typer.Option(False, "--overwrite", help="Replace an existing file.")


@app.command()
def train(
    source: list[str] = typer.Argument(..., help="SOURCEs to learn from."),
    out_: str = typer.Option(..., "--out", help="Where to write the tokenizer.json."),
    kind: str = typer.Option("bpe", "--kind", help=f"{', '.join(KINDS)}."),
    vocab_size: int | None = typer.Option(None, "--vocab-size", help="Tokens wanted, all included; default 8192."),
    allow_smaller: bool = typer.Option(False, "--allow-smaller", help="Take the largest vocabulary that the text supports."),
    split: str | None = typer.Option(
        None, "--split", help="gpt4 (default), gpt2, llama3, whitespace, none or a regular expression; wordpiece and word: bert."
    ),
    digits: int | None = typer.Option(None, "--digits", help="Longest run of digits in a token."),
    normalize: list[str] | None = typer.Option(
        None, "--normalize", help="nfc, nfd, nfkc, nfkd, lowercase, strip_accents; may be repeated; default none."
    ),
    alphabet: str | None = typer.Option(
        None, "--alphabet", help="bytes, text (its characters), a number of characters, or the characters themselves."
    ),
    byte_fallback: bool | None = typer.Option(
        None, "--byte-fallback/--no-byte-fallback", help="Characters outside the alphabet: as bytes (default) or unknown."
    ),
    min_frequency: int | None = typer.Option(None, "--min-frequency", help="Occurrences needed to become a token; default 1."),
    max_token_length: int | None = typer.Option(None, "--max-token-length", help="Most bytes or characters in a token."),
    special: list[str] | None = typer.Option(None, "--special", help="A further control token; may be repeated."),
    added: list[str] | None = typer.Option(None, "--added", help="A string that is always one token; may be repeated."),
    max_megabytes: int | None = typer.Option(
        None, "--max-megabytes", help="Count words in this much text at most; default 64. Less needs less memory."
    ),
    overwrite: bool = OVERWRITE,
    field: str = FIELD,
    errors: str = ERRORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Train a tokenizer on text."""
    from tinylm.text.sources import Corpus, describe
    from tinylm.text.split import scan
    from tinylm.tokenizer import training

    path = _writable(out_, overwrite)
    section = section_of(
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
    _answer(out_, tokenizer, {"seconds": seconds}, json)


def _answer(path: str, tokenizer: Any, more: dict[str, Any], json: bool) -> None:
    if not json:
        out(path)
        return
    facts = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    print_json({"tokenizer": path, **facts, **more})


def _writable(path: str, overwrite: bool) -> Path:
    if Path(path).is_dir():
        raise InputError("is a folder", where=path, hint="name the file to write")
    if Path(path).exists() and not overwrite:
        raise InputError("exists already", where=path, hint="--overwrite replaces it")
    return Path(path)


def section_of(kind: str, **options: Any) -> Any:
    """The same section that a recipe's `tokenizer:` would be, with the same checks; options that are None are left out."""
    from tinylm.recipe import RecipeError, loads, schema

    if kind not in KINDS:
        raise InputError(f"must be one of {', '.join(KINDS)}, not {kind!r}", where="--kind", hint=did_you_mean(kind, KINDS))
    sections = dict(zip(KINDS, schema.LEARNED, strict=True))
    known = sections[kind].model_fields
    for key, value in options.items():
        if value is not None and key not in known:
            having = [name for name, section in sections.items() if key in section.model_fields]
            which = f"only kind {having[0]} has" if len(having) == 1 else f"only kinds {', '.join(having)} have"
            raise InputError(f"{which} it", where=_option(key))
    if "vocab_size" in known:
        options["vocab_size"] = 8192 if options.get("vocab_size") is None else options["vocab_size"]
        options["allow_smaller"] = bool(options.get("allow_smaller"))
    alphabet = options.get("alphabet")
    if alphabet is not None and alphabet.isdecimal():
        options["alphabet"] = int(alphabet)
    for text in (
        options.get("split"),
        options.get("alphabet"),
        *(options.get("special_tokens") or ()),
        *(options.get("added_tokens") or ()),
    ):
        if isinstance(text, str):
            checked_text(text, "--split, --alphabet, --special, --added")
    written = {"kind": kind, **{key: value for key, value in options.items() if value is not None}}
    text = json_module.dumps({"data": {"train": "-"}, "training": {"steps": 1}, "tokenizer": written}, ensure_ascii=False)
    try:
        return loads(text, check_files=False).tokenizer
    except RecipeError as error:
        problem = error.problems[0].removeprefix("recipe:1: tokenizer.")
        key, _, message = problem.partition(": ")
        raise InputError(message or problem, where=_option(key) if message else "--kind") from None


def _option(key: str) -> str:
    return "--" + {"special_tokens": "special", "added_tokens": "added"}.get(key, key).replace("_", "-")


@app.command()
def encode(
    source: str = typer.Argument("-", help="A file, or - for standard input."),
    tokenizer: str | None = TOKENIZER,
    run: str | None = RUN,
    format: str = typer.Option(
        "ids", "--format", help="ids: separated by spaces, a line per document. tokens: one per line. jsonl: a document per line."
    ),
    allow_special: bool = typer.Option(False, "--allow-special", help="Text that spells a special token becomes that token."),
    dropout: float = typer.Option(0.0, "--dropout", min=0.0, max=0.999, help="Kind bpe: leave out this share of merges at random."),
    seed: int = typer.Option(0, "--seed", min=0, help="For --dropout."),
    field: str = FIELD,
    errors: str = ERRORS,
    quiet: bool = QUIET,
) -> None:
    """Print the token ids of a text."""
    from tinylm.text.sources import Corpus

    if format not in ("ids", "tokens", "jsonl"):
        raise InputError(f"must be ids, tokens or jsonl, not {format!r}", where="--format")
    if dropout and allow_special:
        raise InputError("cannot go together", where="--dropout, --allow-special")
    loaded = tokenizer_report.tokenizer_of(tokenizer, run, quiet)
    loaded.encoder.note = ConsoleReporter(stderr(), quiet=quiet).note
    with Corpus([source], field=field, errors=checked_errors(errors)) as corpus:
        encoded = _encoded(loaded, corpus.pieces(), allow_special, dropout, seed)
        if format == "jsonl":
            for ids in _documents(encoded):
                out(json_module.dumps({"ids": ids, "tokens": _shown(loaded, ids)}, ensure_ascii=False))
            return
        between = ""
        for array, starts in encoded:
            ids = array.tolist()
            if format == "tokens":
                if ids:
                    out("\n".join(json_module.dumps(token, ensure_ascii=False) for token in _shown(loaded, ids)))
            else:
                out(("\n" if starts and between else between) + " ".join(map(str, ids)), end="")
                between = " " if ids else between
        if between:
            out("")


def _encoded(tokenizer: Any, pieces: Any, allow_special: bool, dropout: float, seed: int) -> Iterator[tuple[Any, bool]]:
    if dropout:
        from tinylm.tokenizer.dropout import DropoutEncoder

        return DropoutEncoder(tokenizer, dropout, seed).encode_pieces(pieces)
    if allow_special:
        return tokenizer.encode_pieces_with_special(pieces)  # type: ignore[no-any-return]
    return tokenizer.encode_pieces(pieces)  # type: ignore[no-any-return]


def _documents(encoded: Any) -> Iterator[list[int]]:
    ids: list[int] = []
    begun = False
    for array, starts in encoded:
        if starts and begun:
            yield ids
            ids = []
        begun = True
        ids += array.tolist()
    if begun:
        yield ids


def _shown(tokenizer: Any, ids: list[int]) -> list[str]:
    table = tokenizer.token_bytes
    return [table[id].decode("utf-8", "replace") or tokenizer.backend.id_to_token(id) for id in ids]


@app.command()
def decode(
    source: str = typer.Argument("-", help="A file of ids as `encode` prints them, or - for standard input."),
    tokenizer: str | None = TOKENIZER,
    run: str | None = RUN,
    quiet: bool = QUIET,
) -> None:
    """Print the text of token ids, exactly, with nothing added."""
    loaded = tokenizer_report.tokenizer_of(tokenizer, run, quiet)
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
        for word in _words(stream):
            if not re.fullmatch("[0-9]{1,9}", word) or int(word) >= size:
                raise InputError(f"{word[:40]!r} is not an id below {size:,}", where=source)
            sys.stdout.buffer.write(decoder.push(int(word)))
    sys.stdout.buffer.flush()


def _words(stream: Any) -> Iterator[str]:
    rest = ""
    while block := stream.read(1 << 16):
        words = (rest + block).split()
        rest = words.pop() if words and not block[-1].isspace() else ""
        yield from words
    if rest:
        yield rest


TOKENS = typer.Argument(..., help="The tokens, as text.")
EDIT_OUT = typer.Option(..., "--out", help="The tokenizer.json, or with --run the run folder, to write.")
PROVE_ON = typer.Option("builtin:python-docs", "--prove-on", help="SOURCE whose lines without the tokens must encode as before.")


@app.command()
def add(
    token: list[str] = TOKENS,
    out_: str = EDIT_OUT,
    special: bool = typer.Option(False, "--special", help="Control tokens, which text becomes only with --allow-special."),
    tokenizer: str | None = TOKENIZER,
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    prove_on: str = PROVE_ON,
    overwrite: bool = OVERWRITE,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Add tokens to a tokenizer, or to a run: each new embedding row is the mean of the rows of its old pieces."""
    from tinylm.tokenizer import editing

    _edit(
        lambda loaded: editing.add(loaded, token, special=special),
        token,
        out_,
        tokenizer,
        run,
        checkpoint,
        prove_on,
        overwrite,
        json,
        quiet,
    )


@app.command()
def remove(
    token: list[str] = TOKENS,
    out_: str = EDIT_OUT,
    tokenizer: str | None = TOKENIZER,
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    prove_on: str = PROVE_ON,
    overwrite: bool = OVERWRITE,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Take tokens out of a tokenizer, or of a run: merges are repaired, embedding rows dropped, ids close up."""
    from tinylm.tokenizer import editing

    _edit(lambda loaded: editing.remove(loaded, token), token, out_, tokenizer, run, checkpoint, prove_on, overwrite, json, quiet)


def _edit(
    change: Any,
    tokens: list[str],
    out_: str,
    tokenizer: str | None,
    run: str | None,
    checkpoint: str | None,
    prove_on: str,
    overwrite: bool,
    json: bool,
    quiet: bool,
) -> None:
    from tinylm.errors import WorkError
    from tinylm.text.sources import Corpus
    from tinylm.tokenizer import Tokenizer, editing

    for token in tokens:
        checked_text(token, "TOKEN")
    reporter = ConsoleReporter(stderr(), quiet=quiet)
    if tokenizer is not None and (run is not None or checkpoint is not None):
        raise InputError("name a tokenizer or a run", where="--tokenizer, --run, --checkpoint")
    opened = open_run(run, stderr(), quiet=quiet) if tokenizer is None else None
    path = Path(out_) if opened is not None else _writable(out_, overwrite)
    if opened is not None and overwrite:
        raise InputError("a run is never written over", where="--overwrite", hint="name another folder with --out")
    loaded = opened.tokenizer if opened is not None else Tokenizer.load(str(tokenizer))
    edited = change(loaded)
    with Corpus([prove_on]) as corpus:
        proof = editing.prove(loaded, edited, tokens, corpus.pieces())
    if proof.same != proof.without:
        raise WorkError(f"{proof.without - proof.same:,} lines without the tokens would be encoded otherwise; nothing was written")
    if opened is not None:
        from tinylm.training import vocabulary

        vocabulary.apply(opened, edited, path, checkpoint=checkpoint, reporter=reporter)
    else:
        edited.tokenizer.save(path)
    if edited.also_removed:
        reporter.note(f"also gone, for they could only be made from these: {', '.join(map(repr, edited.also_removed))}")
    reporter.note(
        f"{loaded.vocab_size:,} -> {edited.tokenizer.vocab_size:,} tokens; {things(proof.without, 'line')} of {prove_on} without "
        f"the tokens ({proof.lines:,} in all) encode as before"
    )
    more = {"also_removed": edited.also_removed, "lines_checked": proof.without, "lines_same": proof.same}
    _answer(out_, edited.tokenizer, more, json)
