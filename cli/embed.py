"""`tinylm embed`: learn vectors of words and tokens, ask them, judge them, draw them, carry them elsewhere."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tinylm.errors import InputError, did_you_mean

from . import embedding_queries
from .console import (
    CHECKPOINT,
    DEVICE,
    ERRORS,
    FIELD,
    JSON,
    QUIET,
    RUN,
    THREADS,
    ConsoleReporter,
    Conversation,
    Verbs,
    checked_errors,
    count,
    duration,
    open_run,
    out,
    print_json,
    seconds_of,
    show_facts,
    size,
    stderr,
)

if TYPE_CHECKING:
    from tinylm.embedding.vectors import Vectors
    from tinylm.embedding_pipeline import EmbeddingResult
    from tinylm.recipe import EmbeddingRecipe

app = typer.Typer(cls=Verbs, add_completion=False, no_args_is_help=True, help="Learn, ask, judge and reuse embeddings.")
FOLDER, VECTORS = embedding_queries.FOLDER, embedding_queries.VECTORS


@app.command()
def train(
    source: list[str] = typer.Argument(..., help="SOURCEs to learn from."),
    out_: str | None = typer.Option(None, "--out", help="The folder; default: embeddings/NAME."),
    name: str | None = typer.Option(None, "--name", help="What to call them; default: the method's name."),
    method: str = typer.Option("skipgram", "--method", help="skipgram, cbow or glove."),
    dimensions: int | None = typer.Option(None, "--dimensions", "-d", help="Numbers in a vector; default 100."),
    window: int | None = typer.Option(None, "--window", help="Words on each side; default 5, for glove 15."),
    negatives: int | None = typer.Option(None, "--negatives", help="Negative samples; default 5."),
    subsample: float | None = typer.Option(None, "--subsample", help="Thin out words above this share; default 1e-3."),
    epochs: int | None = typer.Option(None, "--epochs", help="Passes over the text; default 5, for glove 25."),
    lr: float | None = typer.Option(None, "--lr", help="Learning rate; default .025, for cbow and glove .05."),
    min_count: int | None = typer.Option(None, "--min-count", help="Leave rarer ones out; default 5, for tokens 1."),
    max_size: int | None = typer.Option(None, "--max-size", help="Keep only so many words."),
    keep_case: bool = typer.Option(False, "--keep-case", help="Words as they are written, not in lower case."),
    tokenizer: str | None = typer.Option(
        None, "--tokenizer", "-t", help="Vectors of the tokens of this tokenizer.json or run, not of words."
    ),
    probe: list[str] | None = typer.Option(None, "--probe", help="Show what is near this word while training; may be repeated."),
    set_: list[str] | None = typer.Option(None, "--set", metavar="SECTION.KEY=VALUE", help="Any other key of the recipe."),
    seed: int | None = typer.Option(None, "--seed", min=0, help="Default 1337."),
    resume: bool = typer.Option(False, "--resume", help="Go on from the newest whole checkpoint."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Begin anew where vectors are."),
    stop_after: str | None = typer.Option(None, "--stop-after", metavar="TIME", help="Save and stop after 90s, 55m or 2h."),
    threads: int | None = typer.Option(
        None, "--threads", min=1, help="CPU threads; the vectors do not depend on it. Default: one per core."
    ),
    field: str = FIELD,
    errors: str = ERRORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Learn vectors from text. The same as `tinylm train` with a recipe of `kind: embeddings`."""
    from tinylm.run import claim

    vocabulary = {"kind": "words", "lowercase": not keep_case, "max_size": max_size, "min_count": min_count}
    if tokenizer is not None:
        for option, value in (("--keep-case", keep_case), ("--max-size", max_size)):
            if value:
                raise InputError("only means something for words", where=option)
        vocabulary = {"kind": "tokens", "tokenizer": tokenizer, "min_count": min_count}
    sections: dict[str, dict[str, Any]] = {
        "data": {"train": source, "field": field, "errors": checked_errors(errors)},
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
    seconds, folder = seconds_of(stop_after), Path(out_ or FOLDER / recipe.name)
    claim(folder, resume, overwrite)
    run_recipe(recipe, folder, resume, overwrite, seconds, threads, json, quiet)


_OPTIONS = {
    "data.train": "SOURCE",
    "data.field": "--field",
    "vocabulary.tokenizer": "--tokenizer",
    "watch.probes": "--probe",
    "method.name": "--method",
    "method": "--method",
}


def _recipe(sections: dict[str, dict[str, Any]], top: dict[str, Any], overrides: Sequence[str]) -> EmbeddingRecipe:
    """The recipe that the options describe. Raises `InputError` that names the option at fault."""
    from tinylm.recipe import RecipeError, loads_any

    given = {section: {key: value for key, value in keys.items() if value is not None} for section, keys in sections.items()}
    document = {"kind": "embeddings", **given, **{key: value for key, value in top.items() if value is not None}}
    try:
        recipe = loads_any(json_module.dumps(document), overrides)
    except RecipeError as error:
        raise InputError("\nerror: ".join(_as_option(problem) for problem in error.problems)) from None
    return recipe  # type: ignore[return-value]  # its kind says so


def _as_option(problem: str) -> str:
    where, _, rest = problem.partition(": ")
    if where.startswith("--set"):
        return problem
    key, _, message = rest.partition(": ")
    return f"{_OPTIONS.get(key, '--' + key.rpartition('.')[2].replace('_', '-'))}: {message}"


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
    """Train a recipe of `kind: embeddings` and show how it goes and what came out."""
    from tinylm.embedding_pipeline import train_embeddings

    from .embed_live import PlainEmbeddingView, QuietEmbeddingView, TerminalEmbeddingView

    console = stderr()
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
    _show_trained(result, console, json, quiet)
    if result.signal_number is not None:
        raise SystemExit(128 + result.signal_number)


def _show_trained(result: EmbeddingResult, console: Conversation, json: bool, quiet: bool) -> None:
    if not quiet:
        memory = "" if result.peak_memory_bytes is None else f", peak memory {size(result.peak_memory_bytes)}"
        show_facts(
            console,
            [
                ("vectors", f"{result.names:,} of {result.dimensions} dimensions, {result.step:,} of {result.steps:,} steps"),
                (
                    "time",
                    f"{duration(result.train_seconds)} at {count(result.tokens_per_second)} a second, "
                    f"{duration(result.seconds)} in all{memory}",
                ),
            ],
        )
        if result.stopped != "done":
            console.say(f"stopped early and saved; go on with: tinylm train {result.run} --resume", "yellow")
    if json:
        document = asdict(result)
        del document["signal_number"]
        print_json(document)
    else:
        out(result.vectors or result.run)


@app.command("from-run")
def from_run(
    source: list[str] | None = typer.Argument(None, help="SOURCEs whose tokens are embedded in context, for --which contextual."),
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    which: str = typer.Option("input", "--which", help="input, output, or contextual: the mean of a layer over the occurrences."),
    layer: int | None = typer.Option(None, "--layer", min=0, help="For contextual: after so many blocks; default: after half."),
    words: bool = typer.Option(False, "--words", help="For contextual: vectors of words, the mean over their tokens."),
    min_count: int = typer.Option(1, "--min-count", min=1, help="For contextual: leave out what occurs less often."),
    out_: str = typer.Option(..., "--out", help="The .safetensors file to write."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing file."),
    device: str = DEVICE,
    threads: int | None = THREADS,
    field: str = FIELD,
    errors: str = ERRORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Take the vectors out of a trained language model."""
    if which not in ("input", "output", "contextual"):
        hint = did_you_mean(which, ("input", "output", "contextual"))
        raise InputError(f"must be input, output or contextual, not {which!r}", where="--which", hint=hint)
    if which == "contextual" and not source:
        raise InputError("needs a SOURCE whose tokens stand in a context", where="--which contextual")
    if which != "contextual":
        for option, value in (
            ("SOURCE", source),
            ("--layer", layer is not None),
            ("--words", words),
            ("--min-count", min_count > 1),
        ):
            if value:
                raise InputError("only means something with --which contextual", where=option)
    target = _new_file(out_, overwrite)
    console = stderr()
    opened = open_run(run, console, quiet=quiet)
    saved = opened.checkpoint(checkpoint)

    from tinylm.device import resolve, set_threads
    from tinylm.embedding.from_run import contextual, static

    set_threads(threads)
    if which != "contextual":
        vectors = static(opened, saved, which)
    else:
        reporter = ConsoleReporter(console, quiet=quiet)
        vectors = contextual(
            opened,
            saved,
            source or (),
            layer=layer,
            words=words,
            min_count=min_count,
            field=field,
            errors=checked_errors(errors),
            device=resolve(device),
            reporter=reporter,
        )
    vectors.save(target)
    _wrote(target, vectors, json)


def _new_file(path: str, overwrite: bool) -> Path:
    target = Path(path)
    if target.is_dir():
        raise InputError("is a folder", where=path, hint="name the file to write")
    if target.exists() and not overwrite:
        raise InputError("exists already", where=path, hint="--overwrite replaces it")
    return target


def _wrote(path: Path, vectors: Vectors, json: bool, **more: Any) -> None:
    if json:
        print_json({"file": str(path), "names": len(vectors), "dimensions": vectors.dimensions, **more})
    else:
        out(str(path))


for verb in (embedding_queries.nearest, embedding_queries.analogy, embedding_queries.similarity):
    app.command()(verb)
app.command("odd-one-out")(embedding_queries.odd_one_out)
app.command("eval")(embedding_queries.evaluate)


@app.command()
def export(
    out_: str = typer.Argument(..., metavar="FILE", help="The file to write; its suffix names the format unless --to does."),
    vectors: str | None = VECTORS,
    to: str | None = typer.Option(None, "--to", help="word2vec, word2vec-binary, glove, safetensors or projector."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing file."),
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Write vectors for other programs: gensim, GloVe's tools, the TensorFlow projector."""
    from tinylm.embedding.formats import write

    target = _new_file(out_, overwrite)
    loaded = embedding_queries.opened(vectors, quiet)
    mapped = write(loaded, target, to)
    if mapped and not quiet:
        stderr().say("some names hold white space: all are written byte-mapped; `embed import --byte-mapped` undoes it", "yellow")
    _wrote(target, loaded, json, byte_mapped=mapped)


@app.command("import")
def import_(
    file: str = typer.Argument(..., help="Vectors in any of the formats."),
    out_: str = typer.Option(..., "--out", help="The .safetensors file to write."),
    from_: str | None = typer.Option(None, "--from", help="The format, where its suffix and first bytes do not tell."),
    byte_mapped: bool = typer.Option(False, "--byte-mapped", help="Undo what `export` did to names that hold white space."),
    tokens: bool = typer.Option(False, "--tokens", help="The names are a tokenizer's, byte-mapped (`Ġthe`), and shown as text."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing file."),
    json: bool = JSON,
) -> None:
    """Read vectors of other programs."""
    from dataclasses import replace

    from tinylm.embedding.formats import read

    if byte_mapped and tokens:
        raise InputError("the names of tokens stay as they are", where="--byte-mapped, --tokens")
    target = _new_file(out_, overwrite)
    if target.suffix != ".safetensors":
        raise InputError("must end in .safetensors", where="--out", hint="`embed export` writes the other formats")
    loaded = read(Path(file), from_, undo_byte_mapping=byte_mapped)
    loaded = replace(loaded, byte_mapped=True) if tokens else loaded
    loaded.save(target)
    _wrote(target, loaded, json)


@app.command()
def plot(
    out_: str = typer.Argument(..., metavar="FILE", help="A page (.html) to zoom and search, or a picture (.png, .svg, .pdf)."),
    vectors: str | None = VECTORS,
    projection: str = typer.Option("pca", "--projection", help="pca, or with tinylm[umap]: umap, tsne."),
    most: int = typer.Option(2000, "--most", min=3, help="Draw the first so many names, the most frequent."),
    labels: int = typer.Option(150, "--labels", min=0, help="Names written into a picture; a page shows them as one zooms in."),
    seed: int = typer.Option(1337, "--seed", min=0),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing file."),
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Draw a map on which similar words lie together."""
    from tinylm.embedding.plot import PROJECTIONS, SUFFIXES, draw

    target = _new_file(out_, overwrite)
    if target.suffix not in SUFFIXES:
        raise InputError(f"must end in {', '.join(SUFFIXES)}", where=out_)
    if projection not in PROJECTIONS:
        hint = did_you_mean(projection, PROJECTIONS)
        raise InputError(f"must be {', '.join(PROJECTIONS)}, not {projection!r}", where="--projection", hint=hint)
    loaded = embedding_queries.opened(vectors, quiet)
    drawn = draw(loaded, target, projection=projection, most=most, labels=labels, seed=seed)
    if json:
        print_json({"file": str(target), "projection": projection, "names": drawn})
    else:
        out(str(target))
