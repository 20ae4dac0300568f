"""Test that maps show the principal components, that pages are self-contained, and that names cannot inject HTML."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest

from tinylm.embedding.map_layout import Box, group, place_labels
from tinylm.embedding.plot import draw, pca, project
from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError


def data_of(page: str) -> dict[str, list]:
    """Return the data embedded in a page."""
    match = re.search(r'atob\("([^"]*)"\)', page)
    assert match is not None
    return json.loads(base64.b64decode(match[1]))


def test_pca_agrees_with_the_eigenvalues_of_the_covariance() -> None:
    rows = np.random.default_rng(0).standard_normal((200, 6)) * [1, 5, 1, 3, 1, 1]
    points, share = pca(rows)
    values = np.sort(np.linalg.eigvalsh(np.cov(rows.T)))[::-1]
    np.testing.assert_allclose(points.var(axis=0, ddof=1), values[:2])
    assert share == pytest.approx(values[:2].sum() / values.sum())
    assert abs(np.corrcoef(points[:, 0], rows[:, 1])[0, 1]) > 0.9


def test_a_page_contains_names_points_and_neighbors_among_all_vectors(learned: Vectors, tmp_path: Path) -> None:
    assert draw(learned, tmp_path / "map.html", max_names=300) == 300
    page = (tmp_path / "map.html").read_text()
    data = data_of(page)
    assert data["names"][:300] == list(learned.names[:300])
    assert data["total"] == len(learned)
    for row in (0, 17, 299):  # neighbors can be names that are not drawn
        expected = [neighbor.token for neighbor in learned.nearest(learned.names[row], 10)]
        assert [data["names"][near] for near in data["near"][row]] == expected
    assert np.abs(data["points"]).max() == 1
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", page), "the page must not load anything"
    assert "@DATA@" not in page
    assert "@TITLE@" not in page


def test_groups_are_the_clusters_of_well_separated_vectors() -> None:
    generator = np.random.default_rng(0)
    centers = np.eye(4)
    labels = generator.permutation(np.repeat([0, 1, 2, 3], [40, 30, 20, 10]))
    rows = centers[labels] + 0.05 * generator.standard_normal((100, 4))
    groups = group(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    clusters = {tuple(np.flatnonzero(groups == number)) for number in set(groups.tolist())}
    assert all(len({*labels[list(members)]}) == 1 for members in clusters)
    assert (np.diff(np.bincount(groups)) <= 0).all(), "the largest group is the first"


def test_labels_do_not_overlap_and_stay_inside_the_image() -> None:
    points = np.random.default_rng(0).uniform(0, 300, (200, 2))
    placed = list(place_labels(points, [(40.0, 10.0)] * 200, Box(0, 0, 300, 300), 60, 4.0))
    boxes = [Box(left, bottom, left + 40, bottom + 10) for _, left, bottom in placed]
    assert 20 < len(boxes) <= 60
    assert not any(a.overlaps(b) for number, a in enumerate(boxes) for b in boxes[:number])
    assert all(box.left >= 0 and box.bottom >= 0 and box.right <= 300 and box.top <= 300 for box in boxes)


def test_names_cannot_inject_html(tmp_path: Path) -> None:
    names = ["</script><script>alert(1)</script>", '"', "\udcff", "a\nb"]
    draw(Vectors(names, np.eye(4, dtype=np.float32)), tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text()
    assert "alert" not in page
    assert data_of(page)["names"] == [*names[:2], "?", "a\nb"]


def test_an_image_with_unusual_names_is_drawn(learned: Vectors, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs tinylm[plot]")
    unusual = Vectors(["$x$", "a\nb", "_^{", *learned.names[3:50]], learned.matrix[:50])
    draw(unusual, tmp_path / "map.png", labels=50)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_tsne_keeps_clusters_together_and_is_reproducible() -> None:
    pytest.importorskip("sklearn", reason="needs tinylm[umap]")
    centers = np.repeat(np.eye(3, 8), 20, axis=0)
    rows = (centers + np.random.default_rng(0).standard_normal((60, 8)) * 0.05).astype(np.float32)
    points, share = project(rows, "tsne", 1)
    assert share is None
    assert (points == project(rows, "tsne", 1)[0]).all()
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (distances.argmin(axis=1) // 20 == np.arange(60) // 20).all()


def test_fewer_than_three_vectors_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a map needs at least three vectors, not 2"):
        draw(Vectors(["a", "b"], np.eye(2, dtype=np.float32)), tmp_path / "map.html")
