"""Draw vectors as a two-dimensional map: a self-contained HTML page with zoom, search and nearest neighbors, or an image."""

from __future__ import annotations

import base64
import html
import json
import os
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError, missing_extra
from tinylm.paths import atomic_file, atomic_write_text

PROJECTIONS = ("pca", "umap", "tsne")
SUFFIXES = (".html", ".png", ".svg", ".pdf")
_NEIGHBORS = 10
"""Number of neighbors that the page shows for each name."""


def draw(vectors: Vectors, path: Path, *, projection: str = "pca", max_names: int = 2000, labels: int = 150, seed: int = 0) -> int:
    """Draw the first `max_names` names to `path`, in the format of its suffix. Returns the number of names drawn.

    `labels` is the number of labeled points in an image. Raises `InputError` if an optional dependency is missing or there are
    fewer than three vectors.
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
    """Project normalized vectors to points (names, 2). PCA also returns the share of the variance that the points explain."""
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
    """Return the first two principal components (rows, 2) and the share of the variance that they explain.

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


def page(vectors: Vectors, points: np.ndarray, projection: str, explained: float | None) -> str:
    """Return a self-contained HTML document. Neighbors are computed from the full vectors, not from the projected points."""
    normalized = vectors.normalized[: len(points)]
    near = np.empty((len(points), min(_NEIGHBORS, len(points) - 1)), dtype=np.int64)
    for start in range(0, len(points), 512):
        scores = normalized[start : start + 512] @ normalized.T
        scores[np.arange(len(scores)), np.arange(start, start + len(scores))] = -np.inf
        near[start : start + 512] = np.argsort(-scores, axis=1, kind="stable")[:, : near.shape[1]]
    similarities = np.einsum("nd,nkd->nk", normalized, normalized[near])
    data = {
        "names": [vectors.display_name(row).encode("utf-8", "replace").decode() for row in range(len(points))],
        "points": np.round(points / max(float(np.abs(points).max()), 1e-12), 5).tolist(),
        "near": near.tolist(),
        "similarities": np.round(similarities, 3).tolist(),
        "counts": None if vectors.counts is None else vectors.counts[: len(points)].tolist(),
    }
    variance = "" if explained is None else f" ({explained:.0%} of the variance)"
    title = f"{len(points):,} of {len(vectors):,} vectors, {projection}{variance}"
    encoded = base64.b64encode(json.dumps(data).encode()).decode("ascii")  # base64, so that a name cannot close the script element
    template = resources.files("tinylm.embedding").joinpath("map.html").read_text(encoding="utf-8")
    return template.replace("@TITLE@", html.escape(title)).replace("@DATA@", encoded)


def _draw_image(vectors: Vectors, points: np.ndarray, path: Path, labels: int) -> None:
    try:
        import matplotlib
    except ImportError:
        raise missing_extra("plot", "drawing an image") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(12, 9), layout="constrained")
    axes.scatter(points[:, 0], points[:, 1], s=5, alpha=0.4, linewidths=0)
    for row in range(min(labels, len(points))):
        text = vectors.display_name(row)
        text = text if text.isprintable() else text.encode("unicode_escape").decode()
        axes.annotate(text, points[row], fontsize=7, alpha=0.9, parse_math=False)
    axes.margins(0.08)
    axes.set_axis_off()
    with atomic_file(path) as temporary:
        saved = temporary.with_suffix(path.suffix)  # matplotlib chooses the format by the suffix
        figure.savefig(saved, dpi=150)
        shutil.copyfile(saved, temporary)
        os.unlink(saved)
    pyplot.close(figure)
