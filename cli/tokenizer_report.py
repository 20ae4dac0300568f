"""`tinylm tokenize report`, `compare`, `explain` and `sweep`: evaluate, explain and choose tokenizers."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

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
    TEMPLATE,
    ConsoleReporter,
    checked_errors,
    checked_text,
    format_count,
    pluralize,
    print_fields,
    print_json,
    stderr_console,
    stdout_console,
    write_stdout,
)
from .tokenizer_options import TOKENIZER, load_tokenizer, option_names_in_errors, tokenizer_section

if TYPE_CHECKING:
    from tinylm.tokenizer.report import TokenizerReport
    from tinylm.tokenizer.vocab_sweep import VocabSweep

_COLORS = ("black on bright_cyan", "black on bright_yellow", "black on bright_green", "black on bright_magenta")
_BAR_WIDTH = 40
_MAX_FILES = 50


def report(
    source: list[str] = typer.Argument(..., help="Texts to encode, preferably texts that the tokenizer was not trained on."),
    tokenizer: str | None = TOKENIZER,
    run: str | None = RUN,
    baselines: bool = typer.Option(True, help="Compare with a GPT-2-style vocabulary of the same size."),
    field: str = FIELD,
    template: str | None = TEMPLATE,
    errors: str = ERRORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Report how well a tokenizer fits a text: compression, coverage, balance, round trip and speed."""
    from tinylm.text.sources import Corpus
    from tinylm.tokenizer.report import BASELINE_TEXT, build_report, bytes_per_token, gpt2_style

    loaded = load_tokenizer(tokenizer, run, quiet)
    loaded.encoder.note = ConsoleReporter(stderr_console(), quiet=quiet).note
    with Corpus(source, field=field, template=template, errors=checked_errors(errors)) as corpus:
        result = build_report(loaded, corpus.files())
        baseline = bytes_per_token(gpt2_style(loaded.vocab_size), corpus.pieces()) if baselines else None
    name = tokenizer or (str(Path(run) / "tokenizer.json") if run else "the run's tokenizer.json")
    if json:
        document = {"tokenizer": name, **asdict(result), "fingerprint": loaded.fingerprint}
        print_json({**document, "baselines": {"bytes": 1.0, "gpt2_style": baseline}})
        return
    description = f"{name}: {result.kind}, {pluralize(result.vocab_size, 'token')}, fingerprint {loaded.fingerprint[:12]}"
    comparison = f"; GPT-2-style vocabulary trained on {BASELINE_TEXT}: {baseline:.3f}" if baseline is not None else ""
    _print_report(result, description, f"single bytes: 1.000{comparison}")


def _print_report(result: TokenizerReport, description: str, baselines: str) -> None:
    from tinylm.tokenizer.report import RARE_COUNT

    sizes = ((result.documents, "document"), (result.bytes, "byte"), (result.words, "word"), (result.tokens, "token"))
    rows = [
        ("tokenizer", description),
        ("text", ", ".join(pluralize(*size) for size in sizes)),
        ("bytes per token", f"{result.bytes_per_token:.3f} ({baselines})"),
        ("tokens per word", f"{result.tokens_per_word:.3f}"),
        ("split words", f"{result.words_split:.1%} of words are split into several tokens"),
        ("unused tokens", f"{result.unused_tokens:,} of {result.vocab_size:,}"),
        ("rare tokens", f"{result.rare_tokens:,} used, but fewer than {RARE_COUNT} times"),
        ("unknown tokens", f"{result.unknown_tokens:,}"),
        ("Rényi efficiency", f"{result.renyi_efficiency:.3f} (1 if all tokens are equally frequent)"),
        ("round-trip failures", pluralize(result.round_trip_failures, "line") if result.round_trip_failures else "0"),
        ("encoding speed", f"{result.encode_megabytes_per_second:.2f} MB/s"),
        ("most frequent tokens", "  ".join(f"{token!r} {times:,}" for token, times in result.frequent_tokens)),
        ("longest tokens", "  ".join(repr(token) for token in result.longest_tokens)),
    ]
    rows += [
        (f"failure {number}", f"{failure.file}:{failure.line}: {failure.text!r} is decoded as {failure.decoded!r}")
        for number, failure in enumerate(result.failures, 1)
    ]
    print_fields(stdout_console(), rows)
    _print_histogram(result.token_lengths)
    if len(result.files) > 1:
        table = _table("file", "bytes", "tokens", "bytes per token", "unknown tokens")
        for file in result.files[:_MAX_FILES]:
            table.add_row(
                file.name, f"{file.bytes:,}", f"{file.tokens:,}", f"{file.bytes_per_token:.3f}", f"{file.unknown_tokens:,}"
            )
        stdout_console().print(table)
        if len(result.files) > _MAX_FILES:
            write_stdout(f"and {len(result.files) - _MAX_FILES:,} more files (--json lists them)")


def _print_histogram(lengths: list[int]) -> None:
    """Print a histogram of token lengths in bytes. The last bar includes all longer tokens."""
    write_stdout("token length in bytes, and the share of the text's tokens with that length")
    highest, total = max(*lengths, 1), max(sum(lengths), 1)
    for size, number in enumerate(lengths):
        if number:
            label = f"{size}" if size < len(lengths) - 1 else f"{size}+"
            write_stdout(f"  {label:>3}  {'#' * max(1, round(_BAR_WIDTH * number / highest)):<{_BAR_WIDTH}} {number / total:6.1%}")


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def compare(
    tokenizer: list[str] = typer.Argument(
        ...,
        help="tokenizer.json files, folders that contain one, FILE.tiktoken[:SPLIT], tiktoken:NAME, or sentencepiece .model files.",
    ),
    on: list[str] = typer.Option(..., "--on", help="A text to encode. Can be repeated."),
    field: str = FIELD,
    template: str | None = TEMPLATE,
    errors: str = ERRORS,
    json: bool = JSON,
) -> None:
    """Compare several tokenizers on the same text."""
    from tinylm.text.sources import Corpus
    from tinylm.tokenizer.adapters import open_tokenizer
    from tinylm.tokenizer.report import build_report

    adapters = [open_tokenizer(path) for path in tokenizer]
    with Corpus(on, field=field, template=template, errors=checked_errors(errors)) as corpus:
        reports = [build_report(adapter, corpus.files()) for adapter in adapters]
    if json:
        print_json([{"tokenizer": path, **asdict(result)} for path, result in zip(tokenizer, reports, strict=True)])
        return
    table = _table(
        "tokenizer",
        "kind",
        "vocabulary",
        "tokens",
        "bytes per token",
        "tokens per word",
        "split words",
        "unused tokens",
        "unknown tokens",
        "Rényi efficiency",
        "round-trip failures",
        "MB/s",
    )
    for path, result in zip(tokenizer, reports, strict=True):
        table.add_row(
            path,
            result.kind,
            f"{result.vocab_size:,}",
            f"{result.tokens:,}",
            f"{result.bytes_per_token:.3f}",
            f"{result.tokens_per_word:.3f}",
            f"{result.words_split:.1%}",
            f"{result.unused_tokens / result.vocab_size:.1%}",
            f"{result.unknown_tokens:,}",
            f"{result.renyi_efficiency:.3f}",
            f"{result.round_trip_failures:,}",
            f"{result.encode_megabytes_per_second:.1f}",
        )
    stdout_console().print(table)


def explain(
    text: str = typer.Argument(..., help="The text, or - for standard input."),
    tokenizer: str | None = TOKENIZER,
    run: str | None = RUN,
    html: str | None = typer.Option(None, "--html", help="Also write the explanation to this HTML file."),
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Explain how a text is encoded: the merges of each word (BPE) or its best-scoring segmentations (unigram)."""
    from tinylm.paths import atomic_write_text
    from tinylm.tokenizer.explain import as_html, visible
    from tinylm.tokenizer.explain import explain as explain_text

    loaded = load_tokenizer(tokenizer, run, quiet)
    if text == "-":
        with open(0, encoding="utf-8", errors="surrogateescape", newline="") as stdin:
            text = stdin.read()
    explanation = explain_text(loaded, checked_text(text, "TEXT"))
    if html is not None:
        atomic_write_text(Path(html), as_html(explanation, f"{explanation.kind} tokens"))
    if json:
        print_json(explanation)
        return
    console = stdout_console()
    for word in explanation.words:
        console.print(Text(visible(word.text), style="bold" if console.is_terminal else ""), soft_wrap=True)
        for step in word.steps:
            console.print(_step_line(console, step.description, step.parts), soft_wrap=True)
    tokens = explanation.tokens
    console.print(_step_line(console, pluralize(len(tokens), "token"), [token.text for token in tokens]), soft_wrap=True)
    ids = (f"{token.id}" + (f" ({token.score:.2f})" if token.score is not None else "") for token in tokens)
    label = "ids (log p)" if explanation.kind == "unigram" else "ids"
    console.print(f"{label}: {' '.join(ids)}", soft_wrap=True)
    if html is not None:
        ConsoleReporter(stderr_console(), quiet=quiet).note(f"wrote {html}")


def _step_line(console: Console, label: str, parts: list[str]) -> Text:
    """Format a step and the resulting parts of the word.

    The parts are colored if the terminal supports colors, and otherwise separated by vertical bars.
    """
    from tinylm.tokenizer.explain import visible

    shown = [visible(part) for part in parts]
    plain = console.no_color or not console.is_terminal
    return Text(f"  {label:<36} ", style="dim" if not plain else "") + (Text("|".join(shown)) if plain else _colored(shown))


def _colored(parts: list[str]) -> Text:
    text = Text()
    for index, part in enumerate(parts):
        text.append(part, style=_COLORS[index % len(_COLORS)])
    return text


def sweep(
    source: list[str] = typer.Argument(..., help="Texts to train on."),
    sizes: str = typer.Option("512,1024,2048,4096,8192,16384", "--sizes", help="Vocabulary sizes, separated by commas."),
    kind: str = typer.Option("bpe", "--kind", help="The kind of tokenizer: bpe, unigram, wordpiece or word."),
    split: str | None = typer.Option(None, "--split", help="The pretokenizer, as in `tokenize train`."),
    recipe: str = typer.Option(
        "quickstart", "--recipe", help="The recipe that defines the model and the batch size for the comparison."
    ),
    set_: list[str] | None = SET,
    heldout: float = typer.Option(
        0.1,
        "--heldout",
        min=0.001,
        max=0.9,
        help="Fraction of the text to hold out for evaluation, taken from the end of the text.",
    ),
    plot: str | None = typer.Option(None, "--plot", help="Also draw a chart: a .png, .svg or .pdf file."),
    field: str = FIELD,
    template: str | None = TEMPLATE,
    errors: str = ERRORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Compare vocabulary sizes by bytes per token and by their cost in parameters and compute, and suggest one."""
    from tinylm.recipe import load
    from tinylm.text.sources import Corpus, describe
    from tinylm.text.split import by_tail, scan
    from tinylm.tokenizer.vocab_sweep import sweep_vocab_sizes

    from .recipe_files import find_recipe

    requested = _parse_sizes(sizes)
    if plot is not None and Path(plot).suffix not in (".png", ".svg", ".pdf"):
        raise InputError("must end in .png, .svg or .pdf", where="--plot")
    section = tokenizer_section(kind, vocab_size=max(requested), allow_smaller=True, split=split)
    loaded_recipe = load(find_recipe(recipe), set_ or (), check_files=False)
    reporter = ConsoleReporter(stderr_console(), quiet=quiet)
    with Corpus(source, field=field, template=template, errors=checked_errors(errors)) as corpus:
        scanned = scan(corpus.pieces())
        if not scanned.characters:
            raise InputError("the text is empty", where=describe(source))
        parts = by_tail(scanned, heldout)
        with option_names_in_errors():
            result = sweep_vocab_sizes(
                section,
                requested,
                lambda: parts.select(corpus.pieces(), "train"),
                lambda: parts.select(corpus.pieces(), "heldout"),
                loaded_recipe.model,
                loaded_recipe.training.global_batch_size * loaded_recipe.model.context_length,
                reporter.warn,
            )
    if plot is not None:
        _plot_sweep(result, plot)
        reporter.note(f"wrote {plot}")
    if json:
        print_json(result)
    else:
        _print_sweep(result, recipe)


def _parse_sizes(text: str) -> list[int]:
    try:
        sizes = [int(part.replace("_", "")) for part in text.split(",")]
    except ValueError:
        raise InputError(f"must be numbers separated by commas, not {text!r}", where="--sizes") from None
    if min(sizes) < 1 or len(sizes) > 50:
        raise InputError("must be at most 50 numbers, each at least 1", where="--sizes")
    return sizes


def _print_sweep(sweep: VocabSweep, recipe: str) -> None:
    from tinylm.tokenizer.vocab_sweep import BYTES_PER_ENTRY, MIN_OCCURRENCES

    table = _table(
        "vocabulary",
        "bytes per token",
        "embedding parameters",
        "share of model",
        "text per step",
        "MFLOPs per byte",
        "rare tokens",
    )
    for result in sweep.sizes:
        table.add_row(
            f"{result.vocab_size:,}" + (" *" if result.vocab_size == sweep.suggested else ""),
            f"{result.bytes_per_token:.3f}",
            format_count(result.embedding_parameters),
            f"{result.embedding_share:.1%}",
            f"{format_count(result.bytes_per_step, space=' ')}B",
            f"{result.flops_per_byte / 1e6:.2f}",
            f"{result.rare_tokens:.1%}",
        )
    stdout_console().print(table)
    write_stdout(f"model and batch size of the {recipe} recipe: {pluralize(sweep.tokens_per_step, 'token')} per step")
    write_stdout(f"rare tokens: share of the multi-byte tokens that occur fewer than {MIN_OCCURRENCES} times in the training text")
    write_stdout(f"* suggested: {sweep.suggested:,}, {sweep.reason}")
    if sweep.suggested_by_new != sweep.suggested:
        write_stdout(
            f"`tinylm new` would choose at most {sweep.suggested_by_new:,} for this text: one token per {BYTES_PER_ENTRY:,} bytes, "
            "and fewer for a short training run. It considers how often each token is trained, not the compute"
        )


def _plot_sweep(sweep: VocabSweep, path: str) -> None:
    from tinylm.errors import missing_extra
    from tinylm.paths import atomic_file

    try:
        import matplotlib
    except ImportError:
        raise missing_extra("plot", "drawing a sweep") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    sizes = [result.vocab_size for result in sweep.sizes]
    axes.plot(sizes, [result.bytes_per_token for result in sweep.sizes], "o-", color="C0", label="held-out bytes per token (left)")
    axes.axvline(sweep.suggested, color="0.7", linestyle="--", label=f"suggested: {sweep.suggested:,}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
    axes.minorticks_off()
    axes.set_xlabel("vocabulary size")
    axes.set_ylabel("bytes per token")
    costs = axes.twinx()
    costs.plot(
        sizes,
        [100 * result.embedding_share for result in sweep.sizes],
        "s-",
        color="C1",
        label="embedding share of model, % (right)",
    )
    lowest = min(result.flops_per_byte for result in sweep.sizes)
    costs.plot(
        sizes,
        [100 * result.flops_per_byte / lowest for result in sweep.sizes],
        "^-",
        color="C2",
        label="FLOPs per byte, % of the lowest (right)",
    )
    costs.set_ylabel("%")
    lines = axes.get_lines() + costs.get_lines()
    names = [str(line.get_label()) for line in lines]
    figure.legend(lines, names, fontsize="small", loc="outside upper center", ncols=2)
    with atomic_file(Path(path)) as temporary:
        figure.savefig(temporary, format=os.path.splitext(path)[1][1:], dpi=150)
    pyplot.close(figure)
