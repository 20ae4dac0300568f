"""Fixtures for export and import tests: run folders with small random models, and tokenizers trained on real text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import model
from untrained_runs import CONTEXT, MakeRun, save_run

from tinylm.interchange.exporting import ExportResult, export
from tinylm.recipe.schema import BpeTokenizer, ByteTokenizer, CharTokenizer
from tinylm.run import Run
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


@pytest.fixture(scope="session")
def tokenizers(english: str) -> dict[str, Tokenizer]:
    """Return tokenizers that differ in what other programs support: the split pattern, the digits per token, and the kind."""
    sections = {
        "gpt2": BpeTokenizer(kind="bpe", vocab_size=400, split="gpt2"),
        "digits1": BpeTokenizer(kind="bpe", vocab_size=400, digits=1),
        "digits2": BpeTokenizer(kind="bpe", vocab_size=400),
        "digits3": BpeTokenizer(kind="bpe", vocab_size=400, digits=3),
        "byte": ByteTokenizer(kind="byte"),
        "char": CharTokenizer(kind="char"),
    }
    pieces = [Piece(english[:60_000], True)]
    return {name: training.train(section, pieces, lambda text: None) for name, section in sections.items()}


def _run_maker(folder: Path, tokenizers: dict[str, Tokenizer]) -> MakeRun:
    def make(preset: str, *, tokenizer: str = "gpt2", name: str = "run", **parts: Any) -> Run:
        chosen = tokenizers[tokenizer]
        return save_run(folder / name, model(preset, vocab_size=chosen.vocab_size, context_length=CONTEXT, **parts), chosen)

    return make


@pytest.fixture
def make_run(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> MakeRun:
    """`make_run("gpt2", tokenizer="byte", bias=False)` creates a run folder with one checkpoint that has random weights."""
    return _run_maker(tmp_path, tokenizers)


@pytest.fixture(scope="module")
def export_once(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Tokenizer]) -> Callable[..., ExportResult]:
    """`export_once("gpt2", bias=False)` exports a run from `make_run` for transformers. Tests must not modify the folder."""
    results: dict[str, ExportResult] = {}

    def export_to_transformers(preset: str, **parts: Any) -> ExportResult:
        key = repr((preset, parts))
        if key not in results:
            folder = tmp_path_factory.mktemp("exported")
            results[key] = export(_run_maker(folder, tokenizers)(preset, **parts), "hf", folder / "out")
        return results[key]

    return export_to_transformers
