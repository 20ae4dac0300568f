"""Draw training curves of runs as an image with one panel per metric. Requires matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.errors import InputError, did_you_mean, missing_extra
from tinylm.evaluation.curves import Curve, Replicates, comparable_metric, curve, group_by_recipe, tokenizers_differ
from tinylm.evaluation.metrics import LOSS, METRICS, Metric
from tinylm.paths import atomic_file
from tinylm.run import Run

FORMATS = (".png", ".svg", ".pdf")
MAX_RUNS = 10
"""If there are more runs than this, they are grouped by recipe. If there are also more groups, only the best are in color."""
_HIGHLIGHTED = 5
_ANNOTATED = 3
"""Maximum number of curves for which the best value is written next to the curve."""
_MAX_MARKERS = 30
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#b5548c", "#c58900", "#3a9bdc", "#6a4c93", "#8c5a3c", "#4d4d4d", "#7f8c00")
"""Colors that can be distinguished on white with any type of color vision. Markers also distinguish the runs."""
_MARKERS = "os^DvPX<>h"
_GRAY, _TEXT, _GRID = "#b8bcc4", "#2b2f36", "#e6e8ec"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.edgecolor": "#9aa0a8",
    "axes.labelcolor": _TEXT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlecolor": _TEXT,
    "axes.titlepad": 10,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.color": _TEXT,
    "xtick.color": "#5c636d",
    "ytick.color": "#5c636d",
}


@dataclass(frozen=True)
class StepSeries:
    """A quantity that is logged during training."""

    key: str
    label: str


STEP_SERIES = {
    series.key: series
    for series in (
        StepSeries("lr", "learning rate"),
        StepSeries("grad_norm", "gradient norm"),
        StepSeries("tokens_per_second", "tokens per second"),
    )
}


@dataclass(frozen=True)
class _Line:
    """A curve and its appearance. `low` and `high` are the bounds of a band around the curve."""

    label: str
    curve: Curve
    color: str
    marker: str
    width: float
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def draw(runs: Sequence[Run], names: Sequence[str], path: Path) -> None:
    """Plot the named metrics. If there are no names, plot the metric that is comparable across all runs.

    Raises `InputError` for an unknown metric or file format, or if a run does not have the metric.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}", where="--out")
    for run in runs:
        if not any(line["kind"] == "step" for line in run.metrics()):
            raise InputError("the run has no metrics yet", where=str(run.path))
    panels = [_metric(name) for name in names] or [comparable_metric(runs)]
    try:
        import matplotlib
    except ImportError:
        raise missing_extra("plot", "plotting") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(
            len(panels), figsize=(8, 4.8 if len(panels) == 1 else 1 + 3.1 * len(panels)), sharex=True, squeeze=False
        )
        figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
        groups = group_by_recipe(runs) if len(runs) > MAX_RUNS else [Replicates((run,)) for run in runs]
        for panel, axis in zip(panels, axes[:, 0], strict=True):
            _draw_panel(axis, panel, groups, _labels(groups))
        _label_tokens(axes[-1, 0], runs)
        _add_legend(figure, axes[0, 0])
        _save(figure, path)
        pyplot.close(figure)


def _metric(name: str) -> Metric | StepSeries:
    if name in METRICS:
        return METRICS[name]
    if name in STEP_SERIES:
        return STEP_SERIES[name]
    raise InputError(f"unknown metric: {name}", where="--metric", hint=did_you_mean(name, [*METRICS, *STEP_SERIES]))


def _labels(groups: Sequence[Replicates]) -> list[str]:
    """Return a short name for each group: the name of its first run folder, or its path if two folders have the same name."""
    names = [group.runs[0].name for group in groups]
    labels = names if len(set(names)) == len(names) else [str(group.runs[0].path) for group in groups]
    return [
        label if len(group.runs) == 1 else f"{label} (mean and range of {len(group.runs)} seeds)"
        for label, group in zip(labels, groups, strict=True)
    ]


def _draw_panel(axis: Any, panel: Metric | StepSeries, groups: Sequence[Replicates], labels: Sequence[str]) -> None:
    lines = [_line(panel, group, label, number) for number, (group, label) in enumerate(zip(groups, labels, strict=True))]
    if len(lines) > MAX_RUNS:
        lines = _highlight_best(lines, panel)
    if panel is LOSS and len(lines) <= MAX_RUNS:
        for line, group in zip(lines, groups, strict=True):
            if len(group.runs) == 1:
                training = curve(group.runs[0], "loss", "step")
                axis.plot(training.tokens, training.values, color=line.color, alpha=0.4, linewidth=0.9, zorder=1)
    for line in lines:
        _draw_line(axis, line, is_evaluation=isinstance(panel, Metric))
    if isinstance(panel, Metric):
        axis.set_title(f"Held-out {panel.label}{panel.direction}")
        axis.set_ylabel(panel.axis)
        if len(lines) <= _ANNOTATED:
            axis.margins(y=0.1)  # leave room for the values
            for line in lines:
                _annotate_best(axis, line, panel)
    else:
        axis.set_title(panel.label.capitalize())
    _format_values(axis, panel)
    _limit_values(axis, lines, panel)


def _line(panel: Metric | StepSeries, group: Replicates, label: str, number: int) -> _Line:
    kind = "eval" if isinstance(panel, Metric) else "step"
    curves = [curve(run, panel.key, kind) for run in group.runs]
    for run, run_curve in zip(group.runs, curves, strict=True):
        if not len(run_curve.values) and (kind == "step" or any(line["kind"] == "eval" for line in run.metrics())):
            name = panel.name if isinstance(panel, Metric) else panel.key
            raise InputError(f"the run does not measure {name}", where=str(run.path), hint="choose another --metric")
    color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
    if len(curves) == 1:
        return _Line(label, curves[0], color, marker, 2.0)
    tokens = min((run_curve.tokens for run_curve in curves), key=len)
    values = np.array([np.interp(tokens, run_curve.tokens, run_curve.values) for run_curve in curves])
    return _Line(label, Curve(tokens, values.mean(0)), color, marker, 2.0, values.min(0), values.max(0))


def _highlight_best(lines: Sequence[_Line], panel: Metric | StepSeries) -> list[_Line]:
    """Return the lines in drawing order: first all others in gray, then the lines with the best final values in color."""
    sign = 1 if isinstance(panel, StepSeries) or panel.lower_is_better else -1
    order = sorted(range(len(lines)), key=lambda number: sign * lines[number].curve.values[-1])
    best, others = order[:_HIGHLIGHTED], order[_HIGHLIGHTED:]
    gray = [
        _Line(f"{len(others)} others" if rank == 0 else "", lines[number].curve, _GRAY, "", 1.0)
        for rank, number in enumerate(others)
    ]
    colored = [
        _Line(lines[number].label, lines[number].curve, _COLORS[rank], _MARKERS[rank], 2.0, lines[number].low, lines[number].high)
        for rank, number in enumerate(best)
    ]
    return [*gray, *colored]


def _draw_line(axis: Any, line: _Line, *, is_evaluation: bool) -> None:
    markers = line.marker if is_evaluation and len(line.curve.tokens) <= _MAX_MARKERS else ""
    width = line.width if is_evaluation else 1.3
    axis.plot(
        line.curve.tokens, line.curve.values, color=line.color, linewidth=width, marker=markers, markersize=4.5, label=line.label
    )
    if line.low is not None:
        axis.fill_between(line.curve.tokens, line.low, line.high, color=line.color, alpha=0.18, linewidth=0)


def _annotate_best(axis: Any, line: _Line, metric: Metric) -> None:
    from matplotlib.patheffects import withStroke

    if not len(line.curve.values):
        return
    best = int(np.argmin(line.curve.values) if metric.lower_is_better else np.argmax(line.curve.values))
    axis.annotate(
        metric.formatted(line.curve.values[best]),
        (line.curve.tokens[best], line.curve.values[best]),
        xytext=(0, -7 if metric.lower_is_better else 7),
        textcoords="offset points",
        ha="right",
        va="top" if metric.lower_is_better else "bottom",
        color=line.color,
        fontweight="bold",
        fontsize=9,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
    )


def _format_values(axis: Any, panel: Metric | StepSeries) -> None:
    from matplotlib.ticker import EngFormatter, PercentFormatter

    if isinstance(panel, Metric) and "%" in panel.format:
        axis.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    elif isinstance(panel, StepSeries) and panel.key == "tokens_per_second":
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    if isinstance(panel, StepSeries):
        axis.set_ylim(bottom=0)
        axis.locator_params(axis="y", nbins=5)


def _limit_values(axis: Any, lines: Sequence[_Line], panel: Metric | StepSeries) -> None:
    """Limit the y-axis so that the first training losses do not compress the rest of the panel."""
    if panel is LOSS and lines and all(len(line.curve.values) for line in lines):
        first, lowest = (function(function(line.curve.values) for line in lines) for function in (max, min))
        margin = max(first - lowest, 0.1)
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, lowest - 0.6 * margin), min(high, first + 0.6 * margin))


def _label_tokens(axis: Any, runs: Sequence[Run]) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_xlabel("training tokens (of each run's own tokenizer)" if tokenizers_differ(runs) else "training tokens")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlim(left=0)


def _add_legend(figure: Any, axis: Any) -> None:
    """Add a legend below the panels. It lists the runs and, if thick and thin lines are drawn, explains the difference."""
    from matplotlib.lines import Line2D

    handles, labels = axis.get_legend_handles_labels()
    if any(line.get_zorder() == 1 for line in axis.get_lines()):
        single = len(handles) == 1
        color = handles[0].get_color() if single else "#70767f"
        thick = Line2D([], [], color=color, linewidth=2, marker="o", markersize=4.5)
        thin = Line2D([], [], color=color, linewidth=0.9, alpha=0.6)
        if single:
            handles, labels = [thick, thin], [f"{labels[0]}, held-out loss", "training loss of each step"]
        else:
            handles, labels = [*handles, thick, thin], [*labels, "held-out loss", "training loss of each step"]
    longest = max(map(len, labels), default=0)
    columns = max(1, min(len(labels), 100 // (longest + 8)))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def _save(figure: Any, path: Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=144, format=path.suffix[1:])
