"""What `tinylm tokenize` says of tokenizers: report, compare, explain, sweep."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinylm.errors import InputError

from .console import (
    ERRORS,
    FIELD,
    JSON,
    QUIET,
    RUN,
    SET,
    ConsoleReporter,
    checked_errors,
    checked_text,
    count,
    open_run,
    out,
    print_json,
    show_facts,
    stderr,
    stdout,
    things,
)

TOKENIZER = typer.Option(None, "--tokenizer", "-t", help="A tokenizer.json.")
_COLORS = ("black on bright_cyan", "black on bright_yellow", "black on bright_green", "black on bright_magenta")
_BAR = 40


def tokenizer_of(tokenizer: str | None, run: str | None, quiet: bool) -> Any:
    """The tokenizer that --tokenizer names, else that of a run."""
    from tinylm.tokenizer import Tokenizer

    if tokenizer is None:
        return open_run(run, stderr(), quiet=quiet).tokenizer
    if run is not None:
        raise InputError("name one tokenizer", where="--tokenizer, --run")
    return Tokenizer.load(tokenizer)


def report(
    source: list[str] = typer.Argument(..., help="SOURCEs to judge it on, best text it was not trained on."),
    tokenizer: str | None = TOKENIZER,
    run: str | None = RUN,
    baselines: bool = typer.Option(True, help="Also measure a GPT-2-style vocabulary of the same size."),
    field: str = FIELD,
    errors: str = ERRORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """How well a tokenizer fits a text: compression, coverage, balance, round trip, speed."""
    from tinylm.text.sources import Corpus
    from tinylm.tokenizer.report import BASELINE_TEXT, bytes_per_token, gpt2_style
    from tinylm.tokenizer.report import report as make_report

    loaded = tokenizer_of(tokenizer, run, quiet)
    loaded.encoder.note = ConsoleReporter(stderr(), quiet=quiet).note
    with Corpus(source, field=field, errors=checked_errors(errors)) as corpus:
        found = make_report(loaded, corpus.files())
        stock = bytes_per_token(gpt2_style(loaded.vocab_size), corpus.pieces()) if baselines else None
    name = tokenizer or (str(Path(run) / "tokenizer.json") if run else "the run's tokenizer.json")
    if json:
        document = {"tokenizer": name, **asdict(found), "fingerprint": loaded.fingerprint}
        print_json({**document, "baselines": {"bytes": 1.0, "gpt2_style": stock}})
        return
    sizes = ((found.documents, "document"), (found.bytes, "byte"), (found.words, "word"), (found.tokens, "token"))
    against = f"; GPT-2-style of {BASELINE_TEXT} {stock:.3f}" if stock is not None else ""
    rows = [
        ("tokenizer", f"{name}: {found.kind}, {found.vocab_size:,} tokens, fingerprint {loaded.fingerprint[:12]}"),
        ("text", ", ".join(things(*size) for size in sizes)),
        ("bytes per token", f"{found.bytes_per_token:.3f} (bytes 1.000{against})"),
        ("tokens per word", f"{found.tokens_per_word:.3f}"),
        ("words split", f"{found.words_split:.1%}"),
        ("unused tokens", f"{found.unused_tokens:,} of {found.vocab_size:,}; {found.rare_tokens:,} used fewer than 5 times"),
        ("unknown tokens", f"{found.unknown_tokens:,}"),
        ("Rényi efficiency", f"{found.renyi_efficiency:.3f}"),
        ("round-trip failures", f"{found.round_trip_failures:,} lines" if found.round_trip_failures else "0"),
        ("encoding", f"{found.encode_megabytes_per_second:.2f} MB/s"),
        ("most frequent", "  ".join(f"{token!r} {times:,}" for token, times in found.frequent_tokens)),
        ("longest", "  ".join(repr(token) for token in found.longest_tokens)),
    ]
    rows += [
        (f"not given back {at}", f"{f.file}:{f.line}: {f.text!r} came back as {f.decoded!r}")
        for at, f in enumerate(found.failures, 1)
    ]
    show_facts(stdout(), rows)
    _histogram(found.token_lengths)
    if len(found.files) > 1:
        table = _table("file", "bytes", "tokens", "bytes per token", "unknown")
        for file in found.files[:50]:
            table.add_row(
                file.name, f"{file.bytes:,}", f"{file.tokens:,}", f"{file.bytes_per_token:.3f}", f"{file.unknown_tokens:,}"
            )
        stdout().print(table)
        if len(found.files) > 50:
            out(f"and {len(found.files) - 50:,} more files (--json lists them)")


def _histogram(lengths: list[int]) -> None:
    """How many of the text's tokens have each length in bytes."""
    out("tokens of the text by their bytes")
    most, total = max(*lengths, 1), max(sum(lengths), 1)
    for size, number in enumerate(lengths):
        if number:
            label = f"{size}" if size < len(lengths) - 1 else f"{size}+"
            out(f"  {label:>3}  {'#' * max(1, round(_BAR * number / most)):<{_BAR}} {number / total:6.1%}")


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def compare(
    tokenizer: list[str] = typer.Argument(
        ..., help="tokenizer.json files or folders, FILE.tiktoken[:SPLIT], tiktoken:NAME, sentencepiece .model files."
    ),
    on: list[str] = typer.Option(..., "--on", help="SOURCE to compare them on; may be repeated."),
    field: str = FIELD,
    errors: str = ERRORS,
    json: bool = JSON,
) -> None:
    """Several tokenizers side by side on the same text."""
    from tinylm.text.sources import Corpus
    from tinylm.tokenizer.codec import open_codec
    from tinylm.tokenizer.report import report as make_report

    codecs = [open_codec(path) for path in tokenizer]
    with Corpus(on, field=field, errors=checked_errors(errors)) as corpus:
        reports = [make_report(codec, corpus.files()) for codec in codecs]
    if json:
        print_json([{"tokenizer": path, **asdict(found)} for path, found in zip(tokenizer, reports, strict=True)])
        return
    columns = (
        "kind",
        "vocabulary",
        "tokens",
        "bytes per token",
        "tokens per word",
        "split",
        "unused",
        "unknown",
        "Rényi",
        "lines lost",
    )
    table = _table("tokenizer", *columns, "MB/s")
    for path, found in zip(tokenizer, reports, strict=True):
        table.add_row(
            path,
            found.kind,
            f"{found.vocab_size:,}",
            f"{found.tokens:,}",
            f"{found.bytes_per_token:.3f}",
            f"{found.tokens_per_word:.3f}",
            f"{found.words_split:.1%}",
            f"{found.unused_tokens / found.vocab_size:.1%}",
            f"{found.unknown_tokens:,}",
            f"{found.renyi_efficiency:.3f}",
            f"{found.round_trip_failures:,}",
            f"{found.encode_megabytes_per_second:.1f}",
        )
    stdout().print(table)


def explain(
    text: str = typer.Argument(..., help="The text; - reads standard input."),
    tokenizer: str | None = TOKENIZER,
    run: str | None = RUN,
    html: str | None = typer.Option(None, "--html", help="Write a page that shows it."),
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """How a text becomes its tokens: merge by merge, or the best path with its scores."""
    from tinylm.paths import write_whole
    from tinylm.tokenizer.explain import as_html
    from tinylm.tokenizer.explain import explain as make_explanation

    loaded = tokenizer_of(tokenizer, run, quiet)
    if text == "-":
        with open(0, encoding="utf-8", errors="surrogateescape", newline="") as stdin:
            text = stdin.read()
    found = make_explanation(loaded, checked_text(text, "TEXT"))
    if html is not None:
        write_whole(Path(html), as_html(found, f"{found.kind} tokens"))
    if json:
        print_json(found)
        return
    console = stdout()
    for word in found.words:
        console.print(Text(_visible(word.text), style="bold" if console.is_terminal else ""), soft_wrap=True)
        for step in word.steps:
            console.print(_line(console, step.what, step.parts), soft_wrap=True)
    tokens = found.tokens
    console.print(_line(console, things(len(tokens), "token"), [token.text for token in tokens]), soft_wrap=True)
    scored = (f"{token.id}" + (f" ({token.score:.2f})" if token.score is not None else "") for token in tokens)
    console.print(f"ids: {' '.join(scored)}", soft_wrap=True)
    if html is not None:
        ConsoleReporter(stderr(), quiet=quiet).note(f"wrote {html}")


def _visible(text: str) -> str:
    from tinylm.tokenizer.explain import visible

    return visible(text)


def _colored(parts: list[str], first: int) -> Text:
    text = Text()
    for at, part in enumerate(parts, first):
        text.append(part, style=_COLORS[at % len(_COLORS)])
    return text


def _line(console: Console, what: str, parts: list[str]) -> Text:
    """A step; its parts in colors on a terminal, with bars between them elsewhere."""
    shown = [_visible(part) for part in parts]
    plain = console.no_color or not console.is_terminal
    return Text(f"  {what:<36} ", style="dim" if not plain else "") + (Text("|".join(shown)) if plain else _colored(shown, 0))


def sweep(
    source: list[str] = typer.Argument(..., help="SOURCEs to learn from."),
    sizes: str = typer.Option("512,1024,2048,4096,8192,16384", "--sizes", help="Vocabulary sizes, with commas."),
    kind: str = typer.Option("bpe", "--kind", help="bpe, unigram, wordpiece or word."),
    split: str | None = typer.Option(None, "--split", help="As for `train`."),
    recipe: str = typer.Option("quickstart", "--recipe", help="RECIPE whose model and batch are meant."),
    set_: list[str] | None = SET,
    heldout: float = typer.Option(0.1, "--heldout", min=0.001, max=0.9, help="Share of the text, its end, to measure on."),
    plot: str | None = typer.Option(None, "--plot", help="Draw it: a .png, .svg or .pdf file."),
    field: str = FIELD,
    errors: str = ERRORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Which vocabulary size: bytes per token against what a model pays for it."""
    from tinylm.recipe import load
    from tinylm.text import split as splitting
    from tinylm.text.sources import Corpus, describe
    from tinylm.tokenizer.sweep import sweep as make_sweep

    from .recipe_files import find
    from .tokenize import section_of

    tried = _sizes(sizes)
    if plot is not None and Path(plot).suffix not in (".png", ".svg", ".pdf"):
        raise InputError("must end in .png, .svg or .pdf", where="--plot")
    section = section_of(kind, vocab_size=max(tried), allow_smaller=True, split=split)
    chosen = load(find(recipe), set_ or (), check_files=False)
    reporter = ConsoleReporter(stderr(), quiet=quiet)
    with Corpus(source, field=field, errors=checked_errors(errors)) as corpus:
        scanned = splitting.scan(corpus.pieces())
        if not scanned.characters:
            raise InputError("the text is empty", where=describe(source))
        division = splitting.by_tail(scanned, heldout)
        found = make_sweep(
            section,
            tried,
            lambda: division.select(corpus.pieces(), "train"),
            lambda: division.select(corpus.pieces(), "heldout"),
            chosen.model,
            chosen.training.global_batch_size * chosen.model.context_length,
            reporter.warn,
        )
    if plot is not None:
        _draw(found, plot)
        reporter.note(f"wrote {plot}")
    if json:
        print_json(found)
        return
    table = _table(
        "vocabulary", "bytes per token", "embedding rows", "share of the model", "text a step", "MFLOP a byte", "seldom seen"
    )
    for size in found.sizes:
        table.add_row(
            f"{size.vocab_size:,}" + (" *" if size.vocab_size == found.suggested else ""),
            f"{size.bytes_per_token:.3f}",
            count(size.embedding_parameters),
            f"{size.embedding_share:.1%}",
            f"{count(size.bytes_per_step)}B",
            f"{size.flops_per_byte / 1e6:.2f}",
            f"{size.seldom_tokens:.1%}",
        )
    stdout().print(table)
    out(f"{things(found.tokens_per_step, 'token')} a step, model of {recipe}")
    out(f"* {found.suggested:,}: {found.reason}")


def _sizes(written: str) -> list[int]:
    try:
        sizes = [int(part.replace("_", "")) for part in written.split(",")]
    except ValueError:
        raise InputError(f"must be numbers with commas between them, not {written!r}", where="--sizes") from None
    if min(sizes) < 1 or len(sizes) > 50:
        raise InputError("must be at most 50 numbers of at least 1", where="--sizes")
    return sizes


def _draw(found: Any, path: str) -> None:
    from tinylm.errors import need_extra
    from tinylm.paths import whole_file

    try:
        import matplotlib
    except ImportError:
        raise need_extra("plot", "drawing a sweep") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    sizes = [size.vocab_size for size in found.sizes]
    axes.plot(sizes, [size.bytes_per_token for size in found.sizes], "o-", color="C0", label="bytes per token, held out (left)")
    axes.axvline(found.suggested, color="0.7", linestyle="--", label=f"suggested: {found.suggested:,}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
    axes.minorticks_off()
    axes.set_xlabel("vocabulary")
    axes.set_ylabel("bytes per token")
    costs = axes.twinx()
    costs.plot(sizes, [100 * size.embedding_share for size in found.sizes], "s-", color="C1", label="embedding share, % (right)")
    least = min(size.flops_per_byte for size in found.sizes)
    costs.plot(
        sizes,
        [100 * size.flops_per_byte / least for size in found.sizes],
        "^-",
        color="C2",
        label="arithmetic per byte, % of the least (right)",
    )
    costs.set_ylabel("%")
    lines = axes.get_lines() + costs.get_lines()
    names = [str(line.get_label()) for line in lines]
    figure.legend(lines, names, fontsize="small", loc="outside upper center", ncols=2)
    with whole_file(Path(path)) as temporary:
        figure.savefig(temporary, format=os.path.splitext(path)[1][1:], dpi=150)
    pyplot.close(figure)
