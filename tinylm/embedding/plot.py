"""A map of vectors: a page that works offline, to zoom, search and hover, or a picture."""

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
from tinylm.errors import InputError, need_extra
from tinylm.paths import whole_file, write_whole

PROJECTIONS = ("pca", "umap", "tsne")
SUFFIXES = (".html", ".png", ".svg", ".pdf")
_NEAREST = 10


def draw(vectors: Vectors, path: Path, *, projection: str = "pca", most: int = 2000, labels: int = 150, seed: int = 0) -> int:
    """Draw the first `most` names into `path`, whose suffix says how; how many were drawn.

    Raises `InputError` for a missing extra, or for fewer than three vectors.
    """
    units = vectors.units[:most]
    if len(units) < 3:
        raise InputError(f"{len(units)} vectors are too few for a map")
    points, explained = project(units, projection, seed)
    if path.suffix == ".html":
        write_whole(path, page(vectors, points, projection, explained))
    else:
        _picture(vectors, points, path, labels)
    return len(points)


def project(units: np.ndarray, projection: str, seed: int) -> tuple[np.ndarray, float | None]:
    """Points (names, 2), and for PCA the share of the variance that they show."""
    if projection == "pca":
        return pca(units)
    try:
        if projection == "umap":
            import umap

            projected = umap.UMAP
        else:
            from sklearn import manifold

            projected = manifold.TSNE
    except ImportError:
        raise need_extra("umap", f"a map by {projection}") from None
    own: dict[str, Any] = {"perplexity": min(30.0, len(units) / 4)}
    if projection == "umap":
        own = {"n_neighbors": min(15, len(units) - 1), "n_jobs": 1}  # its seed holds for one job alone
    made = projected(n_components=2, metric="cosine", random_state=seed, init="random", **own)
    points = np.asarray(made.fit_transform(units), dtype=np.float64)
    return points - points.mean(axis=0), None


def pca(units: np.ndarray) -> tuple[np.ndarray, float]:
    """The two directions of most variance; each points to where its largest loading is positive."""
    centered = units.astype(np.float64) - units.mean(axis=0, dtype=np.float64)
    _, singular, directions = np.linalg.svd(centered, full_matrices=False)
    axes = np.zeros((2, units.shape[1]))
    axes[: min(2, len(directions))] = directions[:2]
    signs = np.sign(axes[np.arange(2), np.abs(axes).argmax(axis=1)])
    points: np.ndarray = centered @ (axes * np.where(signs == 0, 1, signs)[:, None]).T
    total = float((singular**2).sum())
    return points, float((singular[:2] ** 2).sum()) / total if total else 0.0


def page(vectors: Vectors, points: np.ndarray, projection: str, explained: float | None) -> str:
    """One HTML document that needs nothing else. Neighbours are those of the full vectors, not of the map."""
    units = vectors.units[: len(points)]
    near = np.empty((len(points), min(_NEAREST, len(points) - 1)), dtype=np.int64)
    for start in range(0, len(points), 512):
        scores = units[start : start + 512] @ units.T
        scores[np.arange(len(scores)), np.arange(start, start + len(scores))] = -np.inf
        near[start : start + 512] = np.argsort(-scores, axis=1, kind="stable")[:, : near.shape[1]]
    similarities = np.einsum("nd,nkd->nk", units, units[near])
    data = {
        "names": [vectors.shown(row).encode("utf-8", "replace").decode() for row in range(len(points))],
        "points": np.round(points / max(float(np.abs(points).max()), 1e-12), 5).tolist(),
        "near": near.tolist(),
        "similarities": np.round(similarities, 3).tolist(),
        "counts": None if vectors.counts is None else vectors.counts[: len(points)].tolist(),
    }
    share = "" if explained is None else f", which shows {explained:.0%} of the variance"
    title = f"{len(points):,} of {len(vectors):,} vectors by {projection}{share}"
    packed = base64.b64encode(json.dumps(data).encode()).decode("ascii")  # names cannot end the script that holds them
    template = resources.files("tinylm.embedding").joinpath("page.html").read_text(encoding="utf-8")
    return template.replace("@TITLE@", html.escape(title)).replace("@DATA@", packed)


def _picture(vectors: Vectors, points: np.ndarray, path: Path, labels: int) -> None:
    try:
        import matplotlib
    except ImportError:
        raise need_extra("plot", "drawing a picture") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(12, 9), layout="constrained")
    axes.scatter(points[:, 0], points[:, 1], s=5, alpha=0.4, linewidths=0)
    for row in range(min(labels, len(points))):
        text = vectors.shown(row)
        text = text if text.isprintable() else text.encode("unicode_escape").decode()
        axes.annotate(text, points[row], fontsize=7, alpha=0.9, parse_math=False)
    axes.margins(0.08)
    axes.set_axis_off()
    with whole_file(path) as temporary:
        drawn = temporary.with_suffix(path.suffix)
        figure.savefig(drawn, dpi=150)
        shutil.copyfile(drawn, temporary)
        os.unlink(drawn)
    pyplot.close(figure)
