"""Draw a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tinylm.errors import InputError, missing_extra
from tinylm.paths import atomic_file

_FORMATS = (".png", ".svg", ".pdf")
_MAX_NUMBERS = 20
"""Maximum number of labels for which the cells show numbers."""


def draw(confusion: np.ndarray, labels: Sequence[str], path: Path) -> None:
    """Draw the confusion matrix (labels, labels) to a .png, .svg or .pdf file. The color shows each cell's share of its row.

    Raises `InputError` for any other suffix, or if matplotlib is not installed.
    """
    if path.suffix.lower() not in _FORMATS:
        raise InputError(f"the file name must end in {', '.join(_FORMATS)}", where=f"--plot {path}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("plot", "--plot") from None
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    size = max(4.0, 0.28 * len(labels) + 2)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("predicted label")
    axes.set_ylabel("true label")
    if len(labels) <= _MAX_NUMBERS:
        for (row, column), count in np.ndenumerate(confusion):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=color, fontsize="small")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower())
