"""Neither a text that changes while it is read nor damaged cached or held-out tokens silently produce wrong results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinylm.data.prepare import load_or_train_tokenizer, prepare
from tinylm.data.shards import open_shard
from tinylm.errors import InputError
from tinylm.evaluation.evaluate_run import evaluate_run
from tinylm.paths import cached_file
from tinylm.recipe import Recipe, loads
from tinylm.reporting import SILENT, CollectingReporter
from tinylm.run import Run
from tinylm.text import split
from tinylm.text.sources import Corpus
from tinylm.tokenizer import Tokenizer


def _recipe(text: Path) -> Recipe:
    return loads(f"data: {{train: {text}}}\ntokenizer: {{kind: byte}}\ntraining: {{steps: 1}}\nmodel: {{context_length: 8}}\n")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Write a text that no other test has cached."""
    path = tmp_path / "text.txt"
    path.write_text(f"The text of {tmp_path.name}.\n" * 30)
    return path


def test_a_text_replaced_between_scanning_and_encoding_is_rejected(text: Path) -> None:
    original = text.read_text()
    with Corpus([str(text)]) as corpus:
        scanned = split.scan(corpus.pieces())
        text.write_text(original.replace("text", "TEXT"))  # the same length
        with pytest.raises(InputError, match="the text changed while it was read"):
            list(split.unchanged(corpus.pieces(), scanned, str(text)))
        text.write_text(original)
        assert "".join(piece.text for piece in split.unchanged(corpus.pieces(), scanned, str(text))) == original


def test_a_text_replaced_during_preparation_is_never_cached_as_the_old_text(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, recipe = text.read_text(), _recipe(text)

    def load_and_replace(*arguments: Any) -> Tokenizer:
        text.write_text(original.replace("text", "TEXT"))  # the same length, after the scan
        return load_or_train_tokenizer(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("tinylm.data.prepare.load_or_train_tokenizer", load_and_replace)
        with pytest.raises(InputError, match="the text changed while it was read"):
            prepare(recipe.data, recipe.tokenizer, SILENT)
    text.write_text(original)
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    assert original.startswith(prepared.tokenizer.decode(prepared.train.tokens[:-1].tolist())[:100])


@pytest.mark.parametrize("damage", ["flip", "truncate", "counts"])
def test_damaged_cached_tokens_are_encoded_again_with_a_warning(damage: str, text: Path) -> None:
    recipe, reporter = _recipe(text), CollectingReporter()
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    expected = np.array(prepared.train.tokens)
    file, counts = prepared.folder / "train.npy", prepared.folder / "train.json"
    content = file.read_bytes()
    if damage == "flip":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        counts.write_text(json.dumps({**json.loads(counts.read_text()), "bytes": 2 * prepared.train.counts.bytes}))
    again = prepare(recipe.data, recipe.tokenizer, reporter)
    assert np.array_equal(again.train.tokens, expected)
    assert again.train.counts == prepared.train.counts
    assert len([warning for warning in reporter.warnings if "encoding the text again" in warning]) == 1


def test_a_damaged_cached_file_is_written_again(tmp_path: Path) -> None:
    path, damaged = tmp_path / "cached", []
    for content in ("a", "b"):
        cached_file(path, lambda temporary, content=content: temporary.write_text(content) and None, damaged.append)
        assert path.read_text() == "a", "an undamaged file must be reused"
    path.write_text("c")
    cached_file(path, lambda temporary: temporary.write_text("a") and None, damaged.append)
    assert (path.read_text(), damaged) == ("a", [path])


@pytest.mark.parametrize("key", ["bytes", "documents", "tokens"])
def test_changed_counts_of_the_held_out_text_are_rejected(key: str, tiny_run: Run, tmp_path: Path) -> None:
    shutil.copytree(tiny_run.path, tmp_path / "run")
    file = tmp_path / "run" / "heldout" / "heldout.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, key: 2 * values[key]}))
    with pytest.raises(InputError, match=r"the tokens are (missing or )?damaged"):
        evaluate_run(Run.open(tmp_path / "run"), device="cpu")


@pytest.mark.parametrize(
    "array", [np.zeros((3, 3), np.uint16), np.zeros(9), np.array(5, np.uint16)], ids=["two-dimensional", "float", "scalar"]
)
def test_held_out_arrays_with_the_wrong_type_or_shape_are_rejected(array: np.ndarray, tmp_path: Path) -> None:
    counts = {"documents": 1, "bytes": 7, "characters": 7, "tokens": 7, "unknown_tokens": 0, "end_of_text": 0}
    (tmp_path / "heldout.json").write_text(json.dumps(counts))
    np.save(tmp_path / "heldout.npy", array)
    with pytest.raises(InputError, match="missing or damaged"):
        open_shard(tmp_path, "heldout")
