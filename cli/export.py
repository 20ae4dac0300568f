"""`tinylm export`: write a run's model as a Hugging Face folder, or as a GGUF, ONNX or ARPA file."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import typer

from .console import (
    CHECKPOINT,
    JSON,
    QUIET,
    RUN,
    THREADS,
    ConsoleReporter,
    format_size,
    open_run,
    print_fields,
    print_json,
    stderr_console,
    stdout_console,
)

if TYPE_CHECKING:
    from tinylm.interchange.exporting import ExportResult

app = typer.Typer(add_completion=False)
FORMATS = ("hf", "gguf", "onnx", "arpa")
TYPES = {"hf": ("f32", "f16", "bf16"), "gguf": ("f32", "f16", "q8_0", "q4_0")}
"""The storage types of each format that has more than one."""

PACKAGES = {
    "hf": (("transformers",), "checking a Hugging Face folder"),
    "gguf": (("gguf", "transformers"), "writing GGUF"),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "writing ONNX"),
}
"""For each format with an extra of this name: the packages that it needs, and for what."""


@app.command()
def export(
    path: str = typer.Argument(..., help="Folder (hf) or file (gguf, onnx, arpa) to write."),
    to: str = typer.Option(
        ...,
        "--to",
        help="hf: Hugging Face folder. gguf: file for llama.cpp. onnx: file for onnxruntime. arpa: text file of an n-gram model.",
    ),
    type_: str | None = typer.Option(
        None, "--type", help="Storage type. hf: f32, f16 or bf16. gguf: f32, f16, q8_0 or q4_0. Default: f32."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing export."),
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    threads: int | None = THREADS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Export a model, load the export, and compare its logits with the original model's on real text. If they differ, discard the
    export."""
    from tinylm.errors import InputError, did_you_mean

    if to not in FORMATS:
        raise InputError(f"must be hf, gguf, onnx or arpa, not {to!r}", where="--to", hint=did_you_mean(to, FORMATS))
    if type_ is not None and to not in TYPES:
        raise InputError("requires --to hf or gguf", where="--type")
    if type_ is not None and type_ not in TYPES[to]:
        choices = f"{', '.join(TYPES[to][:-1])} or {TYPES[to][-1]}"
        raise InputError(f"must be {choices} with --to {to}, not {type_!r}", where="--type", hint=did_you_mean(type_, TYPES[to]))
    console = stderr_console()
    opened = open_run(run, console, quiet=quiet)
    opened.checkpoint(checkpoint)  # report a missing checkpoint before the slow import of torch
    _check_packages(to)

    from tinylm.device import set_threads
    from tinylm.interchange.exporting import export as export_run

    set_threads(threads)
    reporter = ConsoleReporter(console, quiet=quiet)
    result = export_run(opened, to, path, checkpoint=checkpoint, type=type_ or "f32", overwrite=overwrite, reporter=reporter)  # type: ignore[arg-type]
    if json:
        print_json(result.as_dict())
        return
    print_fields(stdout_console(), _rows(result, "logits" if opened.has_head else "hidden states"))


def _check_packages(to: str) -> None:
    """Raise `InputError` if a package that the format needs is not installed. Finding a package is faster than importing it."""
    from tinylm.errors import missing_extra

    packages, purpose = PACKAGES.get(to, ((), ""))
    if any(find_spec(package) is None for package in packages):
        raise missing_extra(to, purpose)


def _rows(result: ExportResult, compared: str) -> list[tuple[str, str]]:
    from tinylm.interchange.gguf import GREEDY_TOKENS

    stored = f", {result.type}" if result.to in TYPES else ""
    rows = [
        ("exported to", f"{result.path} ({format_size(result.bytes)}{stored})"),
        ("model", f"{result.run} {result.checkpoint} as {result.architecture}"),
        ("max difference", f"{result.largest_difference:.1e} in the {compared}, on {result.tokens_compared:,} tokens of real text"),
        ("verified with", ", ".join(result.verified_with)),
    ]
    if result.perplexity is not None and result.run_perplexity is not None:
        change = result.perplexity / result.run_perplexity - 1
        rows.append(("perplexity", f"{result.perplexity:.4f} (run: {result.run_perplexity:.4f}, {change:+.3%})"))
    if result.same_greedy is not None:
        rows.append(("greedy decoding", f"the first {result.same_greedy} of {GREEDY_TOKENS} tokens match llama.cpp"))
    return rows
