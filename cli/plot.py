"""`tinylm plot`: plot the training curves of runs."""

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
    name: str | None = typer.Option(
        None,
        "--metric",
        help="The held-out metric, such as bits_per_byte. Default: the one that selects the best checkpoint of the first run.",
    ),
) -> None:
    """Plot a held-out metric of runs as a thick line with markers. If it is the loss, the training loss is a thin line."""
    from tinylm.errors import InputError, did_you_mean, missing_extra
    from tinylm.evaluation.metrics import LOSS, METRICS, primary_metric
    from tinylm.paths import atomic_file
    from tinylm.run import Run

    try:
        import matplotlib
    except ImportError:
        raise missing_extra("plot", "plotting") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, PercentFormatter

    path = Path(out_)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError("must end in .png, .svg or .pdf", where="--out")
    if name is not None and name not in METRICS:
        raise InputError(f"unknown metric: {name}", where="--metric", hint=did_you_mean(name, METRICS))
    opened = [Run.open(folder, embeddings=True) for folder in run]
    metric = METRICS[name] if name else primary_metric(line for opened_run in opened for line in opened_run.metrics())
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for index, opened_run in enumerate(opened):
        lines = list(opened_run.metrics())
        steps = [line for line in lines if line["kind"] == "step"]
        evaluations = [line for line in lines if line["kind"] == "eval" and line.get(metric.key) is not None]
        if not steps:
            raise InputError("the run has no metrics yet", where=str(opened_run.path))
        if not evaluations and any(line["kind"] == "eval" for line in lines):
            raise InputError(f"the run does not measure {metric.name}", where=str(opened_run.path), hint="choose another --metric")
        color = f"C{index}"
        if metric is LOSS:
            axes.plot([line["tokens"] for line in steps], [line["loss"] for line in steps], color=color, alpha=0.4, linewidth=1)
        axes.plot(
            [line["tokens"] for line in evaluations],
            [line[metric.key] for line in evaluations],
            "o-",
            color=color,
            label=f"{opened_run.name}, held-out",
        )
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel(metric.axis)
    if "%" in metric.format:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as temporary:
        image = temporary.with_suffix(path.suffix)  # matplotlib chooses the format by the suffix
        figure.savefig(image, dpi=144)
        shutil.copyfile(image, temporary)
        os.unlink(image)
    pyplot.close(figure)
    write_stdout(str(path))
