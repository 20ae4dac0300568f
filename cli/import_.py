"""`tinylm import`: turn a Hugging Face folder or a nanoGPT checkpoint into a run."""

from __future__ import annotations

import typer

from .console import JSON, QUIET, THREADS, ConsoleReporter, format_count, print_fields, print_json, stderr_console, write_stdout

app = typer.Typer(add_completion=False)


@app.command()
def import_(
    source: str = typer.Argument(
        ..., help="Hugging Face folder (GPT-2, Llama, Mistral, Qwen2, Qwen3, tinylm) or nanoGPT's ckpt.pt."
    ),
    out_: str = typer.Option(..., "--out", help="Run folder to create."),
    tokenizer: str | None = typer.Option(
        None, "--tokenizer", "-t", help="tokenizer.json to use instead of the one beside the weights."
    ),
    context: int | None = typer.Option(None, "--context", min=1, help="Shorten the context length, which saves memory."),
    trust_pickle: bool = typer.Option(
        False, "--trust-pickle", help="Allow pickle files. Only tensors and plain values are loaded."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing run."),
    threads: int | None = THREADS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Import weights as a run, to sample from it, evaluate it, or fine-tune it with model.init_from."""
    from pathlib import Path

    from tinylm.errors import InputError

    if not Path(source).exists():
        raise InputError("no such file or folder", where=source)

    from tinylm.device import set_threads
    from tinylm.interchange.importing import import_model

    set_threads(threads)
    console = stderr_console()
    result = import_model(
        source,
        out_,
        tokenizer=tokenizer,
        context=context,
        trust_pickle=trust_pickle,
        overwrite=overwrite,
        reporter=ConsoleReporter(console, quiet=quiet),
    )
    if json:
        print_json(result.as_dict())
        return
    if not quiet:
        sizes = f"vocabulary {result.vocab_size:,}, context {result.context_length:,}"
        rows = [("model", f"{result.preset}, {format_count(result.parameters)} parameters, {sizes}")]
        if result.largest_difference is not None:
            difference = f"{result.largest_difference:.1e} between its logits and those of {result.verified_with}"
            rows.append(("max difference", f"{difference}, on {result.tokens_compared:,} tokens"))
        print_fields(console, rows)
    write_stdout(result.run)
