"""`tinylm plot`: loss curves of runs as a picture."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import typer

from .console import out

app = typer.Typer(add_completion=False)


@app.command()
def plot(
    run: list[str] = typer.Argument(..., help="Run folders."),
    out_: str = typer.Option(..., "--out", help="The picture: .png, .svg or .pdf."),
    bits_per_byte: bool = typer.Option(False, "--bits-per-byte", help="Only the held-out curve, in bits per byte."),
) -> None:
    """Draw the loss curves of runs: training thin, held-out thick with points."""
    from tinylm.errors import InputError, need_extra
    from tinylm.paths import whole_file
    from tinylm.run import Run

    try:
        import matplotlib
    except ImportError:
        raise need_extra("plot", "drawing curves") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    path = Path(out_)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError("must end in .png, .svg or .pdf", where="--out")
    opened = [Run.open(folder, embeddings=True) for folder in run]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for index, one in enumerate(opened):
        lines = list(one.metrics())
        steps = [line for line in lines if line["kind"] == "step"]
        evaluations = [line for line in lines if line["kind"] == "eval"]
        if not steps:
            raise InputError("no metrics yet", where=str(one.path))
        color = f"C{index}"
        key = "val_bits_per_byte" if bits_per_byte else "val_loss"
        if not bits_per_byte:
            axes.plot([line["tokens"] for line in steps], [line["loss"] for line in steps], color=color, alpha=0.4, linewidth=1)
        axes.plot(
            [line["tokens"] for line in evaluations],
            [line[key] for line in evaluations],
            "o-",
            color=color,
            label=f"{one.name}, held-out",
        )
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel("bits per byte" if bits_per_byte else "nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(path) as temporary:
        drawn = temporary.with_suffix(path.suffix)
        figure.savefig(drawn, dpi=144)
        shutil.copyfile(drawn, temporary)
        os.unlink(drawn)
    pyplot.close(figure)
    out(str(path))
