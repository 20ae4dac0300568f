"""A map is the two main directions; its page holds everything it needs and nothing that could break out of it."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest

from tinylm.embedding.plot import draw, pca, project
from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError


def data_of(page: str) -> dict[str, list]:
    found = re.search(r'atob\("([^"]*)"\)', page)
    assert found is not None
    return json.loads(base64.b64decode(found[1]))


def test_pca_is_that_of_the_covariance() -> None:
    rows = np.random.default_rng(0).standard_normal((200, 6)) * [1, 5, 1, 3, 1, 1]
    points, share = pca(rows)
    values = np.sort(np.linalg.eigvalsh(np.cov(rows.T)))[::-1]
    np.testing.assert_allclose(points.var(axis=0, ddof=1), values[:2])
    assert share == pytest.approx(values[:2].sum() / values.sum())
    assert abs(np.corrcoef(points[:, 0], rows[:, 1])[0, 1]) > 0.9


def test_a_page_holds_names_points_and_true_neighbours(learned: Vectors, tmp_path: Path) -> None:
    assert draw(learned, tmp_path / "map.html", most=300) == 300
    page = (tmp_path / "map.html").read_text()
    data = data_of(page)
    assert data["names"] == list(learned.names[:300])
    some = Vectors(learned.names[:300], learned.matrix[:300])
    for row in (0, 17, 299):
        assert [data["names"][near] for near in data["near"][row]] == [one.token for one in some.nearest(some.names[row], 10)]
    assert np.abs(data["points"]).max() == 1
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", page), "it loads nothing"
    assert "@DATA@" not in page
    assert "@TITLE@" not in page


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    names = ["</script><script>alert(1)</script>", '"', "\udcff", "a\nb"]
    draw(Vectors(names, np.eye(4, dtype=np.float32)), tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text()
    assert "alert" not in page
    assert data_of(page)["names"] == [*names[:2], "?", "a\nb"]


def test_pictures(learned: Vectors, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs tinylm[plot]")
    awkward = Vectors(["$x$", "a\nb", "_^{", *learned.names[3:50]], learned.matrix[:50])
    draw(awkward, tmp_path / "map.png", labels=50)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_tsne_keeps_clusters_together_and_its_seed() -> None:
    pytest.importorskip("sklearn", reason="needs tinylm[umap]")
    centers = np.repeat(np.eye(3, 8), 20, axis=0)
    rows = (centers + np.random.default_rng(0).standard_normal((60, 8)) * 0.05).astype(np.float32)
    points, share = project(rows, "tsne", 1)
    assert share is None
    assert (points == project(rows, "tsne", 1)[0]).all()
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (distances.argmin(axis=1) // 20 == np.arange(60) // 20).all()


def test_too_few(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 vectors are too few"):
        draw(Vectors(["a", "b"], np.eye(2, dtype=np.float32)), tmp_path / "map.html")
