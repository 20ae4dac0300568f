"""`tinylm import`: turn a Hugging Face folder, a nanoGPT checkpoint or an ARPA file into a run."""

from __future__ import annotations

import typer

from .console import JSON, QUIET, THREADS, ConsoleReporter, format_count, print_fields, print_json, stderr_console, write_stdout

app = typer.Typer(add_completion=False)


@app.command()
def import_(
    source: str = typer.Argument(
        ...,
        help="A Hugging Face model folder, a nanoGPT ckpt.pt, an ARPA file, or hf:OWNER/NAME to download a model from the Hub.",
    ),
    out_: str = typer.Option(..., "--out", help="The run folder to create."),
    tokenizer: str | None = typer.Option(
        None, "--tokenizer", "-t", help="A tokenizer.json to use instead of the one next to the weights."
    ),
    context: int | None = typer.Option(
        None, "--context", min=1, metavar="N", help="Reduce the context length to N tokens to save memory."
    ),
    trust_pickle: bool = typer.Option(
        False, "--trust-pickle", help="Allow pickle files. Only tensors and plain values are loaded."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing run."),
    threads: int | None = THREADS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Import a model as a run that you can sample from, evaluate, or fine-tune with model.init_from."""
    from pathlib import Path

    from tinylm.errors import InputError

    if not source.startswith("hf:") and not Path(source).exists():
        is_name = source.count("/") <= 1 and not source.startswith((".", "/", "~"))
        hint = (
            f"to download a model from the Hugging Face Hub, write hf:{source if '/' in source else 'OWNER/' + source}"
            if is_name
            else None
        )
        raise InputError("no such file or folder", where=source, hint=hint)

    from tinylm.device import set_threads
    from tinylm.interchange.importing import import_model
    from tinylm.run import Run

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
            compared = "logits" if Run.open(result.run).has_head else "hidden states"
            difference = (
                f"{result.largest_difference:.1e} between the imported model's {compared} and those of {result.verified_with}"
            )
            rows.append(("max difference", f"{difference}, on {result.tokens_compared:,} tokens"))
        print_fields(console, rows)
    write_stdout(result.run)
