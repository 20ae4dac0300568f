"""Fixtures for embedding tests: real text, trained vectors and a few hand-written vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tinylm.embedding.formats import read
from tinylm.embedding.vectors import Vectors
from tinylm.embedding_pipeline import train_embeddings
from tinylm.recipe import EmbeddingRecipe, loads_any


def recipe(text: Path, *overrides: str) -> EmbeddingRecipe:
    """Return a recipe that trains small vectors for the words in `text`."""
    base = f"kind: embeddings\ndata: {{train: {text}}}\nmethod: {{dimensions: 16, epochs: 3}}\nwatch: {{probes: [object]}}\n"
    loaded = loads_any(base, overrides)
    assert isinstance(loaded, EmbeddingRecipe)
    return loaded


@pytest.fixture(scope="session")
def reference(english: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python language reference as a text file."""
    path = tmp_path_factory.mktemp("reference") / "reference.txt"
    path.write_text(english, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def learned(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Vectors:
    """Vectors trained for 24 epochs on the language reference."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    train_embeddings(recipe(reference, "method.dimensions=48", "method.epochs=24", "checkpoint.every=0"), folder, threads=1)
    return read(folder)


@pytest.fixture
def small() -> Vectors:
    """Vectors for five words, with cosines that are easy to compute by hand."""
    rows = [[1, 0], [2, 2], [0, 3], [-1, 0], [4, 1]]
    return Vectors(["east", "northeast", "north", "west", "eastward"], np.array(rows, dtype=np.float32), np.arange(5, 0, -1))
