"""Draw curves in a terminal with Braille dots or markers, with labeled axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.align import Align
from rich.console import Group, RenderableType
from rich.text import Text

_BRAILLE_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bit of each dot in a Braille character, indexed by row (0 to 3) and column (0 or 1)."""
LABEL_WIDTH = 8
"""Width of the y-axis labels in characters."""


@dataclass(frozen=True)
class Curve:
    """A curve of (x, y) points with x in [0, 1]. If `marker` is set, the marker is drawn at every point instead of a dotted
    line."""

    points: Sequence[tuple[float, float]]
    style: str
    name: str = ""
    marker: str | None = None


@dataclass(frozen=True)
class Axes:
    """The format of a chart's y labels, and the labels at both ends of its x axis."""

    y_format: str = ".3f"
    x_start: str = ""
    x_end: str = ""


def legend(curves: Sequence[Curve], unit: str, indent: int = LABEL_WIDTH) -> Text:
    """Return one line that shows how each curve is drawn, and the unit of the y axis."""
    text = Text(" " * indent)
    for curve in curves:
        text.append(curve.marker or chr(0x2824) * 2, style=curve.style)  # two horizontal Braille dots
        text.append(f" {curve.name}  ")
    return text + Text(unit, style="dim")


def draw_curves(curves: Sequence[Curve], width: int, height: int, axes: Axes = Axes()) -> RenderableType:
    """Draw curves, with their minimum and maximum labeled on the y axis. Later curves are drawn on top."""
    values = [y for curve in curves for _, y in curve.points if math.isfinite(y)] or [0.0]
    low, high = min(values), max(values)
    span = max(high - low, 1e-9)
    cells = [[(" ", 0, "")] * width for _ in range(height)]
    for curve in curves:
        points = _finite(curve.points) if curve.marker else _interpolate(curve.points, 2 * width)
        for x, y in points:
            row = round((high - y) / span * (4 * height - 1))
            column = min(int(x * 2 * width), 2 * width - 1)
            if curve.marker:
                cells[row // 4][column // 2] = (curve.marker, 0, curve.style)
                continue
            _, dots, _ = cells[row // 4][column // 2]
            dots |= _BRAILLE_DOTS[row % 4][column % 2]
            cells[row // 4][column // 2] = (chr(0x2800 + dots), dots, curve.style)
    lines = []
    for index, line in enumerate(cells):
        label = {0: f"{high:{axes.y_format}} ", height - 1: f"{low:{axes.y_format}} "}.get(index, "").rjust(LABEL_WIDTH)
        text = Text().append(label, style="dim")
        for character, _, style in line:
            text.append(character, style=style)
        lines.append(text)
    if axes.x_start or axes.x_end:
        gap = max(1, width - len(axes.x_start) - len(axes.x_end))
        lines.append(Text(" " * LABEL_WIDTH + axes.x_start + " " * gap + axes.x_end, style="dim"))
    return Align.left(Group(*lines))


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _interpolate(points: Sequence[tuple[float, float]], columns: int) -> list[tuple[float, float]]:
    """Connect the points with straight lines, with one point per column. Drop non-finite points."""
    interpolated = list(points[:1])
    for (x0, y0), (x1, y1) in pairwise(points):
        steps = max(1, int((x1 - x0) * columns))
        interpolated += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(1, steps + 1)]
    return _finite(interpolated)
