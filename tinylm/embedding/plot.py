"""Draw vectors as a two-dimensional map: a self-contained HTML page with zoom, search and nearest neighbors, or an image."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.embedding.map_layout import Box, group, place_labels
from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError, missing_extra
from tinylm.paths import atomic_file, atomic_write_text

PROJECTIONS = ("pca", "umap", "tsne")
SUFFIXES = (".html", ".png", ".svg", ".pdf")
_NEIGHBORS = 10
"""Number of neighbors that the page shows for each name."""
_MAX_SCORES = 1 << 25
"""Maximum number of similarities to compute at once."""
_COLORS = ("#1f6fb4", "#c2410c", "#0f7b5f", "#a0327d", "#7a5c00", "#5b4bc4", "#b42318", "#3f6b21")
"""Group colors in an image. Keep them the same as in map.html."""
_LABEL_GAP = 4.0
"""Distance in pixels between a point and its label."""


def draw(vectors: Vectors, path: Path, *, projection: str = "pca", max_names: int = 2000, labels: int = 150, seed: int = 0) -> int:
    """Draw the first `max_names` vectors and write the map to `path`. Returns the number of vectors drawn.

    The suffix of `path` selects the format. `labels` is the maximum number of labels in an image. Raises `InputError` if an
    optional dependency is missing or there are fewer than three vectors.
    """
    normalized = vectors.normalized[:max_names]
    if len(normalized) < 3:
        raise InputError(f"a map needs at least three vectors, not {len(normalized)}")
    points, explained = project(normalized, projection, seed)
    if path.suffix == ".html":
        atomic_write_text(path, page(vectors, points, projection, explained))
    else:
        _draw_image(vectors, points, path, labels)
    return len(points)


def project(normalized: np.ndarray, projection: str, seed: int) -> tuple[np.ndarray, float | None]:
    """Project normalized vectors to points (names, 2). Return the points and, for PCA, the fraction of the variance that they
    explain."""
    if projection == "pca":
        return pca(normalized)
    try:
        if projection == "umap":
            import umap

            reducer = umap.UMAP
        else:
            from sklearn import manifold

            reducer = manifold.TSNE
    except ImportError:
        raise missing_extra("umap", f"--projection {projection}") from None
    options: dict[str, Any] = {"perplexity": min(30.0, len(normalized) / 4)}
    if projection == "umap":
        options = {"n_neighbors": min(15, len(normalized) - 1), "n_jobs": 1}  # UMAP is deterministic only with a single job
    embedding = reducer(n_components=2, metric="cosine", random_state=seed, init="random", **options)
    points = np.asarray(embedding.fit_transform(normalized), dtype=np.float64)
    return points - points.mean(axis=0), None


def pca(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the first two principal components (rows, 2) and the fraction of the variance that they explain.

    The sign of a component is chosen so that its largest loading is positive.
    """
    centered = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    _, singular, directions = np.linalg.svd(centered, full_matrices=False)
    axes = np.zeros((2, rows.shape[1]))
    axes[: min(2, len(directions))] = directions[:2]
    signs = np.sign(axes[np.arange(2), np.abs(axes).argmax(axis=1)])
    points: np.ndarray = centered @ (axes * np.where(signs == 0, 1, signs)[:, None]).T
    total = float((singular**2).sum())
    return points, float((singular[:2] ** 2).sum()) / total if total else 0.0


def _nearest(vectors: Vectors, count: int) -> np.ndarray:
    """Return the rows of the nearest neighbors of the first `count` vectors, (count, neighbors), most similar first.

    All vectors are candidates, including those that are not drawn.
    """
    normalized = vectors.normalized
    near = np.empty((count, min(_NEIGHBORS, len(vectors) - 1)), dtype=np.int64)
    rows = max(1, _MAX_SCORES // len(vectors))
    for start in range(0, count, rows):
        scores = normalized[start : min(start + rows, count)] @ normalized.T
        scores[np.arange(len(scores)), np.arange(start, start + len(scores))] = -np.inf
        best = np.sort(np.argpartition(-scores, near.shape[1] - 1, axis=1)[:, : near.shape[1]], axis=1)
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
        near[start : start + len(scores)] = np.take_along_axis(best, order, axis=1)
    return near


def page(vectors: Vectors, points: np.ndarray, projection: str, explained: float | None) -> str:
    """Return a self-contained HTML document. Neighbors are computed from the original vectors, not from the projected points."""
    normalized = vectors.normalized
    near = _nearest(vectors, len(points))
    similarities = np.einsum("nd,nkd->nk", normalized[: len(points)], normalized[near])
    not_drawn = sorted({*near[near >= len(points)].tolist()})
    number = {row: len(points) + index for index, row in enumerate(not_drawn)}  # their names follow those of the drawn vectors
    data = {
        "names": [_page_name(vectors, row) for row in (*range(len(points)), *not_drawn)],
        "points": np.round(points / max(float(np.abs(points).max()), 1e-12), 5).tolist(),
        "groups": group(normalized[: len(points)]).tolist(),
        "total": len(vectors),
        "near": [[number.get(row, row) for row in rows] for rows in near.tolist()],
        "similarities": np.round(similarities, 3).tolist(),
        "counts": None if vectors.counts is None else vectors.counts[: len(points)].tolist(),
    }
    variance = "" if explained is None else f" ({explained:.0%} of the variance explained)"
    title = f"{len(points):,} of {len(vectors):,} vectors, {projection}{variance}"
    encoded = base64.b64encode(json.dumps(data).encode()).decode("ascii")  # base64, so that a name cannot close the script element
    template = resources.files("tinylm.embedding").joinpath("map.html").read_text(encoding="utf-8")
    return template.replace("@TITLE@", html.escape(title)).replace("@DATA@", encoded)


def _page_name(vectors: Vectors, row: int) -> str:
    return vectors.display_name(row).encode("utf-8", "replace").decode()


def _draw_image(vectors: Vectors, points: np.ndarray, path: Path, labels: int) -> None:
    """Draw points and labels. The most frequent names are labeled first. Labels that would overlap others are skipped."""
    try:
        import matplotlib
    except ImportError:
        raise missing_extra("plot", "drawing an image") from None
    matplotlib.use("Agg")
    from matplotlib import patheffects, pyplot

    figure, axes = pyplot.subplots(figsize=(12, 9), layout="constrained")
    groups = group(vectors.normalized[: len(points)])
    axes.scatter(points[:, 0], points[:, 1], s=9, alpha=0.55, linewidths=0, c=[_COLORS[number] for number in groups])
    axes.margins(0.06)
    axes.set_axis_off()
    figure.canvas.draw()  # from here on, the positions of points in pixels are known
    pixels, frame = axes.transData.transform(points), axes.get_window_extent()
    texts: dict[int, Any] = {}

    def sizes() -> Iterator[tuple[float, float]]:
        for row in range(len(points)):
            name = vectors.display_name(row)
            name = name if name.isprintable() else name.encode("unicode_escape").decode()
            text = texts[row] = axes.text(0, 0, name, fontsize=9, color=_COLORS[groups[row]], parse_math=False)
            text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])
            extent = text.get_window_extent()
            yield extent.width, extent.height

    area = Box(frame.x0, frame.y0, frame.x1, frame.y1)
    for row, left, bottom in place_labels(pixels, sizes(), area, labels, _LABEL_GAP):
        text = texts.pop(row)
        text.set_position(axes.transData.inverted().transform((left, bottom)))
        text.set_verticalalignment("bottom")
    for text in texts.values():
        text.remove()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:])
    pyplot.close(figure)
