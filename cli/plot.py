"""`tinylm plot`: plot the loss curves of runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import typer

from .console import write_stdout

app = typer.Typer(add_completion=False)


@app.command()
def plot(
    run: list[str] = typer.Argument(..., help="Run folders."),
    out_: str = typer.Option(..., "--out", help="The image file: .png, .svg or .pdf."),
    bits_per_byte: bool = typer.Option(False, "--bits-per-byte", help="Plot only the held-out curve, in bits per byte."),
) -> None:
    """Plot the loss curves of runs: training loss as a thin line, held-out loss as a thick line with markers."""
    from tinylm.errors import InputError, missing_extra
    from tinylm.paths import atomic_file
    from tinylm.run import Run

    try:
        import matplotlib
    except ImportError:
        raise missing_extra("plot", "plotting") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    path = Path(out_)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError("must end in .png, .svg or .pdf", where="--out")
    opened = [Run.open(folder, embeddings=True) for folder in run]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for index, opened_run in enumerate(opened):
        lines = list(opened_run.metrics())
        steps = [line for line in lines if line["kind"] == "step"]
        evaluations = [line for line in lines if line["kind"] == "eval"]
        if not steps:
            raise InputError("the run has no metrics yet", where=str(opened_run.path))
        color = f"C{index}"
        key = "val_bits_per_byte" if bits_per_byte else "val_loss"
        if not bits_per_byte:
            axes.plot([line["tokens"] for line in steps], [line["loss"] for line in steps], color=color, alpha=0.4, linewidth=1)
        axes.plot(
            [line["tokens"] for line in evaluations],
            [line[key] for line in evaluations],
            "o-",
            color=color,
            label=f"{opened_run.name}, held-out",
        )
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel("bits per byte" if bits_per_byte else "nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as temporary:
        image = temporary.with_suffix(path.suffix)  # matplotlib chooses the format by the suffix
        figure.savefig(image, dpi=144)
        shutil.copyfile(image, temporary)
        os.unlink(image)
    pyplot.close(figure)
    write_stdout(str(path))
