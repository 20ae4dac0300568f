"""`tinylm export`: a run's model for other people's programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from .console import (
    CHECKPOINT,
    JSON,
    QUIET,
    RUN,
    THREADS,
    ConsoleReporter,
    open_run,
    print_json,
    show_facts,
    size,
    stderr,
    stdout,
)

if TYPE_CHECKING:
    from tinylm.interchange.exporting import Exported

app = typer.Typer(add_completion=False)
FORMATS = ("hf", "gguf", "onnx")
TYPES = ("f32", "f16", "q8_0", "q4_0")


@app.command()
def export(
    path: str = typer.Argument(..., help="The folder (hf) or file (gguf, onnx) to write."),
    to: str = typer.Option(
        ..., "--to", help="hf: a Hugging Face folder. gguf: a file for llama.cpp. onnx: a file for onnxruntime."
    ),
    type_: str | None = typer.Option(None, "--type", help="How a GGUF file stores matrices: f32, f16, q8_0 or q4_0; default: f32."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an export that is there."),
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    threads: int | None = THREADS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Export a model, and prove it: what was written is loaded again and compared on real text, or nothing is left."""
    from tinylm.errors import InputError, did_you_mean

    if to not in FORMATS:
        raise InputError(f"must be hf, gguf or onnx, not {to!r}", where="--to", hint=did_you_mean(to, FORMATS))
    if type_ is not None and to != "gguf":
        raise InputError("only means something with --to gguf", where="--type")
    if type_ not in (None, *TYPES):
        raise InputError(f"must be f32, f16, q8_0 or q4_0, not {type_!r}", where="--type", hint=did_you_mean(type_, TYPES))
    console = stderr()
    opened = open_run(run, console, quiet=quiet)
    opened.checkpoint(checkpoint)  # what is not there is told before torch is loaded

    from tinylm.device import set_threads
    from tinylm.interchange.exporting import export as write

    set_threads(threads)
    reporter = ConsoleReporter(console, quiet=quiet)
    done = write(opened, to, path, checkpoint=checkpoint, type=type_ or "f32", overwrite=overwrite, reporter=reporter)  # type: ignore[arg-type]
    if json:
        print_json(done.as_dict())
        return
    show_facts(stdout(), _rows(done))


def _rows(done: Exported) -> list[tuple[str, str]]:
    stored = f", {done.type}" if done.to == "gguf" else ""
    rows = [
        ("written", f"{done.path} ({size(done.bytes)}{stored})"),
        ("model", f"{done.run} {done.checkpoint} as {done.architecture}"),
        ("same model", f"logits differ by {done.largest_difference:.1e} at most, on {done.tokens_compared:,} tokens of real text"),
        ("loaded with", ", ".join(done.verified_with)),
    ]
    if done.perplexity is not None and done.run_perplexity is not None:
        change = done.perplexity / done.run_perplexity - 1
        rows.append(("perplexity", f"{done.perplexity:.4f}, of the run {done.run_perplexity:.4f} ({change:+.3%})"))
    if done.same_greedy is not None:
        rows.append(("greedy text", f"{done.same_greedy} of 20 tokens as llama.cpp writes them"))
    return rows
