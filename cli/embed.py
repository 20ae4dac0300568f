"""`tinylm embed`: train, query, evaluate, plot, import and export word and token vectors."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tinylm.errors import InputError, did_you_mean

from . import embedding_queries, styles
from .console import (
    CHECKPOINT,
    DEVICE,
    ERRORS,
    FIELD,
    JSON,
    QUIET,
    RUN,
    TEMPLATE,
    THREADS,
    CommandGroup,
    ConsoleReporter,
    StderrConsole,
    checked_errors,
    checked_output_file,
    format_count,
    format_duration,
    format_size,
    open_run,
    parse_duration,
    print_fields,
    print_json,
    stderr_console,
    write_stdout,
)

if TYPE_CHECKING:
    from tinylm.embedding.vectors import Vectors
    from tinylm.embedding_pipeline import EmbeddingResult
    from tinylm.recipe import EmbeddingRecipe

app = typer.Typer(
    cls=CommandGroup, add_completion=False, no_args_is_help=True, help="Train, query, evaluate and export embeddings."
)
FOLDER, VECTORS = embedding_queries.FOLDER, embedding_queries.VECTORS


@app.command()
def train(
    source: list[str] = typer.Argument(..., help="The text to train on: files, folders, globs, URLs or builtin:NAME."),
    out_: str | None = typer.Option(None, "--out", help="Output folder. Default: embeddings/NAME."),
    name: str | None = typer.Option(None, "--name", help="Name of the vectors. Default: the method."),
    method: str = typer.Option("skipgram", "--method", help="skipgram, cbow or glove."),
    dimensions: int | None = typer.Option(None, "--dimensions", "-d", help="Number of dimensions. Default: 100."),
    window: int | None = typer.Option(
        None, "--window", help="Maximum number of context words on each side. Default: 5, or 15 for glove."
    ),
    negatives: int | None = typer.Option(None, "--negatives", help="Negative samples per word. Default: 5."),
    subsample: float | None = typer.Option(
        None, "--subsample", help="Subsample words that make up a larger fraction of the text than this. Default: 1e-3."
    ),
    epochs: int | None = typer.Option(None, "--epochs", help="Passes over the text. Default: 5, or 25 for glove."),
    lr: float | None = typer.Option(None, "--lr", help="Learning rate. Default: 0.025, or 0.05 for cbow and glove."),
    min_count: int | None = typer.Option(
        None, "--min-count", help="Skip words that occur fewer times than this. Default: 5, or 1 for tokens."
    ),
    max_size: int | None = typer.Option(None, "--max-size", help="Maximum vocabulary size: keep only the most frequent words."),
    keep_case: bool = typer.Option(False, "--keep-case", help="Do not convert words to lower case."),
    tokenizer: str | None = typer.Option(
        None,
        "--tokenizer",
        "-t",
        help="Train token vectors instead of word vectors, using this tokenizer.json or the tokenizer of this run.",
    ),
    probe: list[str] | None = typer.Option(
        None, "--probe", help="Show the neighbors of this word during training. Can be repeated."
    ),
    set_: list[str] | None = typer.Option(
        None, "--set", metavar="SECTION.KEY=VALUE", help="Set any other recipe key. Can be repeated."
    ),
    seed: int | None = typer.Option(None, "--seed", min=0, help="Random seed. Default: 1337."),
    resume: bool = typer.Option(False, "--resume", help="Resume from the newest complete checkpoint."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the run in the output folder."),
    stop_after: str | None = typer.Option(
        None, "--stop-after", metavar="TIME", help="Save and stop after this time, for example 90s, 55m or 2h."
    ),
    threads: int | None = typer.Option(
        None, "--threads", min=1, help="CPU threads; they do not affect the result. Default: one per core."
    ),
    field: str = FIELD,
    template: str | None = TEMPLATE,
    errors: str = ERRORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Train vectors on text. Equivalent to `tinylm train` with a `kind: embeddings` recipe."""
    from tinylm.run import check_run_folder

    vocabulary = {"kind": "words", "lowercase": not keep_case, "max_size": max_size, "min_count": min_count}
    if tokenizer is not None:
        for option, value in (("--keep-case", keep_case), ("--max-size", max_size)):
            if value:
                raise InputError("cannot be combined with --tokenizer", where=option)
        vocabulary = {"kind": "tokens", "tokenizer": tokenizer, "min_count": min_count}
    sections: dict[str, dict[str, Any]] = {
        "data": {"train": source, "field": field, "template": template, "errors": checked_errors(errors)},
        "vocabulary": vocabulary,
        "method": {
            "name": method,
            "dimensions": dimensions,
            "window": window,
            "negatives": negatives,
            "subsample": subsample,
            "epochs": epochs,
            "lr": lr,
        },
        "watch": {"probes": probe},
    }
    recipe = _recipe(sections, {"name": name or method, "seed": seed}, set_ or ())
    seconds, folder = parse_duration(stop_after), Path(out_ or FOLDER / recipe.name)
    check_run_folder(folder, resume, overwrite)
    run_recipe(recipe, folder, resume, overwrite, seconds, threads, json, quiet)


_OPTION_OF_KEY = {
    "data.train": "SOURCE",
    "data.field": "--field",
    "data.template": "--template",
    "vocabulary.tokenizer": "--tokenizer",
    "watch.probes": "--probe",
    "method.name": "--method",
    "method": "--method",
}


def _recipe(sections: dict[str, dict[str, Any]], top: dict[str, Any], overrides: Sequence[str]) -> EmbeddingRecipe:
    """Build a recipe from the options. Raises `InputError` with the option's name instead of the recipe key."""
    from tinylm.recipe import RecipeError, loads_any

    def without_none(keys: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in keys.items() if value is not None}

    given_sections = {section: without_none(keys) for section, keys in sections.items()}
    document = {"kind": "embeddings", **given_sections, **without_none(top)}
    try:
        recipe = loads_any(json_module.dumps(document), overrides)
    except RecipeError as error:
        raise InputError("\nerror: ".join(_as_option(problem) for problem in error.problems)) from None
    return recipe  # type: ignore[return-value]  # because of `kind: embeddings`


def _as_option(problem: str) -> str:
    """Replace the recipe key in an error message with the option: `<recipe>: method.lr: ...` becomes `--lr: ...`."""
    where, _, rest = problem.partition(": ")
    if where.startswith("--set"):
        return problem
    key, _, message = rest.partition(": ")
    return f"{_OPTION_OF_KEY.get(key, '--' + key.rpartition('.')[2].replace('_', '-'))}: {message}"


def run_recipe(
    recipe: EmbeddingRecipe,
    folder: Path,
    resume: bool,
    overwrite: bool,
    stop_after: float | None,
    threads: int | None,
    json: bool,
    quiet: bool,
) -> None:
    """Train a `kind: embeddings` recipe, and print the progress and the result."""
    from tinylm.embedding_pipeline import train_embeddings

    from .embed_live import PlainEmbeddingView, QuietEmbeddingView, TerminalEmbeddingView

    console = stderr_console()
    view: PlainEmbeddingView | QuietEmbeddingView | TerminalEmbeddingView
    if quiet:
        view = QuietEmbeddingView()
    elif console.is_terminal and not console.is_dumb_terminal:
        view = TerminalEmbeddingView(console, f"tinylm embed train {recipe.name}")
    else:
        view = PlainEmbeddingView(console)
    with view if isinstance(view, TerminalEmbeddingView) else nullcontext():
        result = train_embeddings(
            recipe,
            folder,
            resume=resume,
            overwrite=overwrite,
            threads=threads,
            stop_after=stop_after,
            reporter=ConsoleReporter(console, quiet=quiet),
            observer=view,
        )
    _show_result(result, view.unit, console, json, quiet)
    if result.signal_number is not None:
        raise SystemExit(128 + result.signal_number)


def _show_result(result: EmbeddingResult, unit: str, console: StderrConsole, json: bool, quiet: bool) -> None:
    if not quiet:
        memory = "" if result.peak_memory_bytes is None else f"; peak memory {format_size(result.peak_memory_bytes)}"
        print_fields(
            console,
            [
                ("vectors", f"{result.names:,}, {result.dimensions} dimensions"),
                ("steps", f"{result.step:,} of {result.steps:,}"),
                ("training", f"{format_duration(result.train_seconds)}, {format_count(result.tokens_per_second)} {unit}/s"),
                ("total", f"{format_duration(result.seconds)}{memory}"),
            ],
        )
        if result.stopped != "done":
            console.print_line(f"stopped early and saved; resume with: tinylm train {result.run} --resume", styles.WARNING)
    if json:
        document = asdict(result)
        del document["signal_number"]
        print_json(document)
    else:
        write_stdout(result.vectors or result.run)


@app.command("from-run")
def from_run(
    source: list[str] | None = typer.Argument(
        None, help="With --which contextual or sentence: the text, as files, folders, globs, URLs or builtin:NAME."
    ),
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    which: str = typer.Option(
        "input",
        "--which",
        help="input: the input embedding matrix. output: the output embedding matrix. contextual: the mean hidden state of each "
        "token over a text. sentence: one vector for each distinct line of a text file, or record.",
    ),
    pool: str = typer.Option("mean", "--pool", help="For sentence: cls (the first token), mean or last."),
    layer: int | None = typer.Option(
        None, "--layer", min=0, help="For contextual: use the hidden states after this many blocks. Default: half of the blocks."
    ),
    words: bool = typer.Option(False, "--words", help="For contextual: word vectors instead of token vectors."),
    min_count: int = typer.Option(
        1, "--min-count", min=1, help="For contextual: skip tokens or words that occur fewer times than this."
    ),
    out_: str = typer.Option(..., "--out", help="Output file. Its suffix determines the format, as in `embed export`."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing file."),
    device: str = DEVICE,
    threads: int | None = THREADS,
    field: str = FIELD,
    template: str | None = TEMPLATE,
    errors: str = ERRORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Extract vectors from a trained language model."""
    from tinylm.embedding.formats import check_format, write

    choices = ("input", "output", "contextual", "sentence")
    if which not in choices:
        raise InputError(
            f"must be input, output, contextual or sentence, not {which!r}", where="--which", hint=did_you_mean(which, choices)
        )
    if which in ("contextual", "sentence") and not source:
        raise InputError("requires a SOURCE", where=f"--which {which}")
    if pool not in ("cls", "mean", "last"):
        raise InputError(f"must be cls, mean or last, not {pool!r}", where="--pool")
    if pool != "mean" and which != "sentence":
        raise InputError("requires --which sentence", where="--pool")
    if source and which not in ("contextual", "sentence"):
        raise InputError("requires --which contextual or sentence", where="SOURCE")
    if which != "contextual":
        for option, value in (
            ("--layer", layer is not None),
            ("--words", words),
            ("--min-count", min_count > 1),
        ):
            if value:
                raise InputError("requires --which contextual", where=option)
    target = checked_output_file(out_, overwrite)
    check_format(target)
    console = stderr_console()
    model_run = open_run(run, console, quiet=quiet)
    saved = model_run.checkpoint(checkpoint)

    from tinylm.device import resolve, set_threads
    from tinylm.embedding.from_run import contextual_vectors, static_vectors

    set_threads(threads)
    if which == "sentence":
        from tinylm.embedding.sentences import table

        texts = list(embedding_queries.read_texts(source or (), field, template, checked_errors(errors)))
        vectors = table(
            model_run,
            texts,
            pool,
            checkpoint=saved,
            device=resolve(device),
            reporter=ConsoleReporter(console, quiet=quiet),
        )
    elif which != "contextual":
        vectors = static_vectors(model_run, saved, which)
    else:
        reporter = ConsoleReporter(console, quiet=quiet)
        vectors = contextual_vectors(
            model_run,
            saved,
            source or (),
            layer=layer,
            words=words,
            min_count=min_count,
            field=field,
            template=template,
            errors=checked_errors(errors),
            device=resolve(device),
            reporter=reporter,
        )
    _note_byte_mapping(write(vectors, target), quiet)
    _report_written(target, vectors, json)


def _note_byte_mapping(is_mapped: bool, quiet: bool) -> None:
    if is_mapped and not quiet:
        stderr_console().print_line(
            "some words, tokens or sentences contain whitespace, so all were written in byte-mapped form; "
            "read them with `embed import --byte-mapped`",
            styles.WARNING,
        )


def _report_written(path: Path, vectors: Vectors, json: bool, **fields: Any) -> None:
    if json:
        print_json({"file": str(path), "names": len(vectors), "dimensions": vectors.dimensions, **fields})
    else:
        write_stdout(str(path))


for command in (embedding_queries.nearest, embedding_queries.analogy, embedding_queries.similarity):
    app.command()(command)
app.command("odd-one-out")(embedding_queries.odd_one_out)
app.command("eval")(embedding_queries.evaluate)


@app.command()
def export(
    out_: str = typer.Argument(..., metavar="FILE", help="Output file. Its suffix determines the format."),
    vectors: str | None = VECTORS,
    to: str | None = typer.Option(
        None, "--to", help="word2vec, word2vec-binary, glove, safetensors or projector. Default: determined by the suffix."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing file."),
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Write vectors in a format for other programs, such as gensim, GloVe and the TensorFlow Embedding Projector."""
    from tinylm.embedding.formats import write

    target = checked_output_file(out_, overwrite)
    loaded = embedding_queries.load_vectors(vectors, quiet)
    mapped = write(loaded, target, to)
    _note_byte_mapping(mapped, quiet)
    _report_written(target, loaded, json, byte_mapped=mapped)


@app.command("import")
def import_(
    file: str = typer.Argument(..., help="A file in any of the formats of `embed export`."),
    out_: str = typer.Option(..., "--out", help="Output file (.safetensors)."),
    from_: str | None = typer.Option(None, "--from", help="Format. Default: detected from the suffix and the first bytes."),
    byte_mapped: bool = typer.Option(
        False, "--byte-mapped", help="Decode words, tokens or sentences that `embed export` wrote in byte-mapped form."
    ),
    tokens: bool = typer.Option(
        False,
        "--tokens",
        help="The file contains tokens in byte-mapped form (`Ġthe`). Keep this form in the output, but display the tokens as text.",
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing file."),
    json: bool = JSON,
) -> None:
    """Read vectors that another program wrote."""
    from dataclasses import replace

    from tinylm.embedding.formats import read

    if byte_mapped and tokens:
        raise InputError("these options are mutually exclusive", where="--byte-mapped, --tokens")
    target = checked_output_file(out_, overwrite)
    if target.suffix != ".safetensors":
        raise InputError("must end in .safetensors", where="--out", hint="`embed export` writes the other formats")
    loaded = read(Path(file), from_, undo_byte_mapping=byte_mapped)
    loaded = replace(loaded, byte_mapped=True) if tokens else loaded
    loaded.save(target)
    _report_written(target, loaded, json)


@app.command()
def plot(
    out_: str = typer.Argument(
        ..., metavar="FILE", help="Output file: an interactive page (.html) or an image (.png, .svg, .pdf)."
    ),
    vectors: str | None = VECTORS,
    projection: str = typer.Option("pca", "--projection", help="pca, umap or tsne; umap and tsne require tinylm[umap]."),
    max_names: int = typer.Option(2000, "--max-names", min=3, help="Draw only this many of the most frequent words or tokens."),
    labels: int = typer.Option(
        150, "--labels", min=0, help="Number of words or tokens to label in an image. An HTML page shows more when you zoom in."
    ),
    seed: int = typer.Option(1337, "--seed", min=0, help="Random seed for umap and tsne."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing file."),
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Draw a map of the vectors, with similar words close together."""
    from tinylm.embedding.plot import PROJECTIONS, SUFFIXES, draw

    target = checked_output_file(out_, overwrite)
    if target.suffix not in SUFFIXES:
        raise InputError(f"the file name must end in one of {', '.join(SUFFIXES)}", where=out_)
    if projection not in PROJECTIONS:
        hint = did_you_mean(projection, PROJECTIONS)
        raise InputError(f"must be one of {', '.join(PROJECTIONS)}, not {projection!r}", where="--projection", hint=hint)
    loaded = embedding_queries.load_vectors(vectors, quiet)
    drawn = draw(loaded, target, projection=projection, max_names=max_names, labels=labels, seed=seed)
    if json:
        print_json({"file": str(target), "projection": projection, "names": drawn})
    else:
        write_stdout(str(target))
