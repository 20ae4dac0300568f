"""Draw a confusion matrix."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tinylm.errors import InputError, TinylmWarning, missing_extra
from tinylm.paths import atomic_file

_FORMATS = (".png", ".svg", ".pdf")
_MAX_NUMBERS = 20
"""Maximum number of labels for which the cells show numbers."""


def check_drawable(path: Path) -> None:
    """Raise `InputError` if `path` is a folder or does not end in .png, .svg or .pdf, or if matplotlib is not installed."""
    if path.is_dir():
        raise InputError("is a folder", where=f"--plot {path}", hint="pass the path of a file")
    if path.suffix.lower() not in _FORMATS:
        raise InputError(f"the file name must end in {', '.join(_FORMATS)}", where=f"--plot {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise missing_extra("plot", "--plot") from None


def draw(confusion: np.ndarray, labels: Sequence[str], path: Path) -> None:
    """Draw the confusion matrix (labels, labels) to a .png, .svg or .pdf file. The color shows each cell's share of its row.

    Warns if the font lacks characters of the labels. Raises `InputError` if the file cannot be drawn (see `check_drawable`).
    """
    check_drawable(path)
    from matplotlib.figure import Figure

    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    size = max(4.0, 0.28 * len(labels) + 2)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=90, parse_math=False)
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.set_xlabel("predicted label")
    axes.set_ylabel("true label")
    if len(labels) <= _MAX_NUMBERS:
        for (row, column), count in np.ndenumerate(confusion):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=color, fontsize="small")
    with atomic_file(path) as temporary, warnings.catch_warnings(record=True) as caught:
        figure.savefig(temporary, format=path.suffix[1:].lower())
    if any("missing from" in str(warning.message) for warning in caught):
        text = "the font of the confusion matrix lacks characters of some labels, which are drawn as boxes"
        warnings.warn(text, TinylmWarning, stacklevel=2)
