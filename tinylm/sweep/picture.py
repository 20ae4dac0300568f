"""Plot a sweep: the primary metric against the first numeric key, with one line for each setting of the other keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinylm.paths import atomic_file
from tinylm.sweep.settings import shortened
from tinylm.sweep.summary import Group, Summary

_MAX_LINES = 8
"""With more lines than this, the legend would hide the plot, so the runs are drawn as unconnected points without a legend."""


def draw(summary: Summary, path: Path) -> None:
    """Plot `summary` and save the image at `path`. Error bars show one standard deviation over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scored = [group for group in summary.groups if group.mean is not None]
    keys = [key for key in (scored[0].values if scored else {}) if len({group.values.get(key) for group in scored}) > 1]
    numeric = [key for key in keys if all(_number(group.values[key]) is not None for group in scored)]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    short = shortened(keys)
    if numeric:
        x_key = numeric[0]
        lines: dict[str, list[Group]] = {}
        others = [key for key in keys if key != x_key]
        for group in scored:
            lines.setdefault(", ".join(f"{short[key]} {group.values[key]}" for key in others), []).append(group)
        connected = len(lines) <= _MAX_LINES
        for label, groups in lines.items():
            groups.sort(key=lambda group: _number(group.values[x_key]) or 0.0)
            positions = [_number(group.values[x_key]) for group in groups]
            _errorbar(axes, positions, groups, "o-" if connected else "o", label if connected else "", None if connected else "C0")
        axes.set_xlabel(short[x_key])
        values = [value for group in scored if (value := _number(group.values[x_key])) is not None]
        if min(values) > 0 and max(values) / min(values) >= 8:
            axes.set_xscale("log")
        if connected and others:
            axes.legend()
    else:
        labels = [", ".join(f"{short[key]} {group.values[key]}" for key in keys) or "all" for group in scored]
        _errorbar(axes, list(range(len(scored))), scored, "o", "", "C0")
        axes.set_xticks(range(len(scored)), labels, rotation=30, ha="right")
    axes.set_ylabel(summary.metric.axis)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=144, format=path.suffix[1:])
    pyplot.close(figure)


def _errorbar(axes: Any, positions: list[Any], groups: list[Group], style: str, label: str, color: str | None) -> None:
    deviations = [group.deviation or 0.0 for group in groups]
    axes.errorbar(positions, [group.mean for group in groups], yerr=deviations, fmt=style, capsize=3, label=label, color=color)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
