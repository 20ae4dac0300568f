"""`tinylm explain`: a guided tour from characters to a gradient step, with numbers from the user's own model."""

from __future__ import annotations

import typer
from rich.text import Text

from .console import (
    CHECKPOINT,
    DEVICE,
    JSON,
    QUIET,
    RUN,
    THREADS,
    ConsoleReporter,
    checked_output_file,
    checked_text,
    open_run,
    print_fields,
    print_json,
    stderr_console,
    stdout_console,
)

app = typer.Typer(add_completion=False)


@app.command()
def explain(
    text: str = typer.Option("The for statement is used to iterate", "--text", "-t", help="The text that the tour follows."),
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    out: str | None = typer.Option(
        None, "--out", "-o", help="Write one HTML page that works offline. Default: print to the terminal."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing file."),
    seed: int = typer.Option(0, "--seed", min=0, help="Random seed for the sampled token."),
    device: str = DEVICE,
    threads: int | None = THREADS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Explain a model step by step: characters, tokens, vectors, attention, prediction, loss and one gradient step."""
    checked_text(text, "--text")
    file = None if out is None else checked_output_file(out, overwrite)
    console = stderr_console()
    opened = open_run(run, console, quiet=quiet)
    opened.checkpoint(checkpoint)  # report a missing checkpoint before torch is imported

    from tinylm.device import set_threads
    from tinylm.inspection.overview import inspect_text
    from tinylm.inspection.tour import as_html, tour
    from tinylm.paths import atomic_write_text

    set_threads(threads)
    reporter = ConsoleReporter(console, quiet=quiet)
    result = inspect_text(opened, text, checkpoint=checkpoint, device=device, reporter=reporter)
    steps = tour(result, seed=seed)
    if file is not None:
        atomic_write_text(file, as_html(steps, f"How {opened.name} {result.checkpoint.name} works"))
        console.print_line(f"wrote {file}", "dim")
    if json:
        rows = [{"title": step.title, "text": step.text, "numbers": [list(pair) for pair in step.numbers]} for step in steps]
        print_json({"run": str(opened.path), "checkpoint": result.checkpoint.name, "step": result.checkpoint.step, "steps": rows})
    elif file is None:
        output = stdout_console()
        for number, step in enumerate(steps, 1):
            if number > 1:
                output.print()
            output.print(Text(f"{number}. {step.title}", style="bold"))
            output.print(Text(step.text), soft_wrap=not output.is_terminal)
            if step.numbers:
                print_fields(output, step.numbers)
