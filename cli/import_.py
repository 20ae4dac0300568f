"""`tinylm import`: other people's weights as a run."""

from __future__ import annotations

import typer

from .console import JSON, QUIET, THREADS, ConsoleReporter, count, out, print_json, show_facts, stderr

app = typer.Typer(add_completion=False)


@app.command()
def import_(
    source: str = typer.Argument(
        ..., help="A Hugging Face folder (GPT-2, Llama, Mistral, Qwen2, Qwen3, tinylm), or nanoGPT's ckpt.pt."
    ),
    out_: str = typer.Option(..., "--out", help="The run folder to make."),
    tokenizer: str | None = typer.Option(None, "--tokenizer", "-t", help="A tokenizer.json instead of the one beside the weights."),
    context: int | None = typer.Option(None, "--context", min=1, help="Fewer positions than the model has: less memory."),
    trust_pickle: bool = typer.Option(False, "--trust-pickle", help="Read a pickle (plain values and tensors only)."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace a run that is there."),
    threads: int | None = THREADS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Import weights as a run: sample it, measure it, or train it on with model.init_from."""
    from pathlib import Path

    from tinylm.errors import InputError

    if not Path(source).exists():
        raise InputError("no such file or folder", where=source)

    from tinylm.device import set_threads
    from tinylm.interchange.importing import import_model

    set_threads(threads)
    console = stderr()
    done = import_model(
        source,
        out_,
        tokenizer=tokenizer,
        context=context,
        trust_pickle=trust_pickle,
        overwrite=overwrite,
        reporter=ConsoleReporter(console, quiet=quiet),
    )
    if json:
        print_json(done.as_dict())
        return
    if not quiet:
        sizes = f"{done.vocab_size:,} tokens, context {done.context_length:,}"
        rows = [("model", f"{done.preset}, {count(done.parameters)} parameters, {sizes}")]
        if done.largest_difference is not None:
            same = f"logits differ by {done.largest_difference:.1e} at most from those of {done.verified_with}"
            rows.append(("same model", f"{same}, on {done.tokens_compared:,} tokens"))
        show_facts(console, rows)
    out(done.run)
