"""`tinylm sample`: write text with a trained model."""

from __future__ import annotations

import secrets

import typer

from .console import (
    CHECKPOINT,
    DEVICE,
    JSON,
    QUIET,
    RUN,
    THREADS,
    ConsoleReporter,
    checked_text,
    count,
    open_run,
    out,
    print_json,
    stderr,
    things,
)

app = typer.Typer(add_completion=False)


@app.command()
def sample(
    prompt: str = typer.Option("", "--prompt", "-p", help="What the text begins with; empty: a new document."),
    count_: int = typer.Option(1, "-n", min=1, max=1024, help="How many samples."),
    max_new_tokens: int = typer.Option(200, "--max-new-tokens", help="Longest continuation."),
    temperature: float = typer.Option(0.8, "--temperature", help="0 always takes the likeliest token."),
    top_k: int = typer.Option(50, "--top-k", help="Only the K likeliest tokens."),
    top_p: float | None = typer.Option(None, "--top-p", help="Only the likeliest tokens that together have this probability."),
    min_p: float | None = typer.Option(None, "--min-p", help="Only tokens with this share of the likeliest one's probability."),
    repetition_penalty: float = typer.Option(1.0, "--repetition-penalty", help="Above 1: what was written becomes less likely."),
    stop: list[str] | None = typer.Option(None, "--stop", help="End before this text; may be repeated."),
    seed: int | None = typer.Option(None, "--seed", min=0, help="The same seed gives the same text; default: a new one each time."),
    no_stream: bool = typer.Option(False, "--no-stream", help="Print when all is written."),
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    device: str = DEVICE,
    threads: int | None = THREADS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Write text with a trained model."""
    console = stderr()
    for text, option in ((prompt, "--prompt"), *((one, "--stop") for one in stop or ())):
        checked_text(text, option)
    opened = open_run(run, console, quiet=quiet)
    chosen = opened.checkpoint(checkpoint)  # what is not there is told before torch is loaded

    from tinylm.device import resolve, set_threads

    target = resolve(device)
    from tinylm.generation.engine import generate
    from tinylm.generation.sampling import SamplingOptions

    options = SamplingOptions(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, tuple(stop or ()))
    set_threads(threads)
    network = opened.network(chosen, target)
    reporter = ConsoleReporter(console, quiet=quiet)
    tokenizer = opened.tokenizer
    unknown = tokenizer.encode(prompt).count(tokenizer.unknown) if tokenizer.unknown is not None else 0
    if unknown:
        reporter.warn(f"{unknown} characters of the prompt are not in the model's vocabulary")
    seed = secrets.randbelow(2**31) if seed is None else seed
    streaming = count_ == 1 and not json and not no_stream
    if streaming:
        out(prompt, end="")
    samples = generate(
        network,
        tokenizer,
        prompt,
        options,
        count=count_,
        seed=seed,
        on_text=(lambda index, text: out(text, end="")) if streaming else None,
    )
    if json:
        listed = [
            {
                "prompt": sample.prompt,
                "text": sample.text,
                "tokens": len(sample.token_ids),
                "finish_reason": sample.finish_reason,
                "tokens_per_second": sample.tokens_per_second,
            }
            for sample in samples
        ]
        print_json({"run": str(opened.path), "checkpoint": chosen.name, "seed": seed, "samples": listed})
        return
    if streaming:
        out("")
    else:
        out("\n\n---\n\n".join(sample.prompt + sample.text for sample in samples))
    if not quiet:
        total = things(sum(len(sample.token_ids) for sample in samples), "token")
        reasons = ", ".join(dict.fromkeys(sample.finish_reason for sample in samples))
        speed = count(sum(sample.tokens_per_second for sample in samples))
        console.say(f"{total}, {speed} tokens/s, {reasons}, {chosen.name}, --seed {seed}", "dim")
