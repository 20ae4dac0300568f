"""Fixtures for command-line tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def recipe_file(text_file: Path, tmp_path: Path) -> Path:
    """A recipe file for a tiny model, which tests modify with --set."""
    recipe = {
        "name": "tiny",
        "data": {"train": str(text_file)},
        "tokenizer": {"kind": "bpe", "vocab_size": 400},
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 32},
        "training": {"steps": 2, "global_batch_size": 4, "precision": "fp32"},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
