"""`tinylm plot`: plot the training curves of runs."""

from __future__ import annotations

from pathlib import Path

import typer

from .console import write_stdout

app = typer.Typer(add_completion=False)


@app.command()
def plot(
    run: list[str] = typer.Argument(..., help="Run folders."),
    out_: str = typer.Option(..., "--out", help="The image file: .png, .svg or .pdf."),
    name: list[str] | None = typer.Option(
        None,
        "--metric",
        help="A held-out metric, such as bits_per_byte, or lr, grad_norm or tokens_per_second. Can be repeated; each metric has "
        "its own panel. Default: the metric that selects the best checkpoint, or bits_per_byte if the tokenizers differ.",
    ),
) -> None:
    """Plot a held-out metric of runs as thick lines with markers. For the loss, also plot the training loss as thin lines.

    More than ten runs are grouped: runs that differ only in the seed are drawn as their mean, with a band from the lowest to the
    highest value.
    """
    from tinylm.evaluation.curve_plot import draw
    from tinylm.run import Run

    path = Path(out_)
    draw([Run.open(folder, embeddings=True) for folder in run], name or [], path)
    write_stdout(str(path))
