"""Training reads a folder that `tinylm prepare` wrote, and rejects recipes that do not match it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinylm.curation.preparation import Preparation
from tinylm.curation.settings import Settings
from tinylm.data.estimate import estimate_text_size
from tinylm.data.prepare import prepare
from tinylm.errors import InputError
from tinylm.pipeline import train
from tinylm.recipe import Recipe, loads
from tinylm.recipe.schema import BpeTokenizer, require_text
from tinylm.reporting import SILENT, CollectingReporter
from tinylm.run import Run
from tinylm.text.sources import Corpus

RECIPE = """
data: {{train: {source}{heldout}}}
tokenizer: {{kind: bpe, vocab_size: 400}}
model: {{n_layer: 1, n_head: 2, n_embd: 32, context_length: 32}}
training: {{steps: 2, global_batch_size: 4, precision: fp32}}
"""


@pytest.fixture(scope="module")
def corpus(english: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents from which nothing is removed."""
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = [english[start * 2000 : start * 2000 + 1500] for start in range(30)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def folder(corpus: Path) -> Path:
    """The prepared text. Tests must not modify it."""
    settings = Settings(
        (str(corpus),),
        heldout_share=0.2,
        without=("clean", "gopher", "c4", "fineweb"),
        tokenizer=BpeTokenizer(kind="bpe", vocab_size=400),
    )
    Preparation(settings, corpus.parent / "prepared").run(1, lambda report: None)
    return corpus.parent / "prepared"


def recipe(source: Path, heldout: str = "", *overrides: str) -> Recipe:
    return loads(RECIPE.format(source=source, heldout=heldout), overrides)


def test_training_on_a_prepared_text_equals_training_on_the_text_itself(corpus: Path, folder: Path, tmp_path: Path) -> None:
    plain = train(recipe(corpus, ", heldout: {share: 0.2, by: document}"), tmp_path / "plain", device="cpu")
    prepared = train(recipe(folder), tmp_path / "prepared", device="cpu")
    assert prepared.metrics == plain.metrics
    weights = [tmp_path / name / "checkpoints" / "step-000002" / "model.safetensors" for name in ("plain", "prepared")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    texts = Run.open(tmp_path / "prepared").training_texts()
    assert [text.sources for text in texts] == [(str(folder),)]


def test_the_tokenizer_can_also_be_named_by_its_path(folder: Path) -> None:
    named = recipe(folder, "", "tokenizer={path: %s}" % (folder / "tokenizer.json"))
    prepared = prepare(require_text(named.data), named.tokenizer, SILENT)
    assert prepared.train.counts.documents + prepared.heldout.counts.documents == 30


def test_the_size_of_a_prepared_text_is_known_exactly(folder: Path) -> None:
    loaded = recipe(folder)
    prepared = prepare(require_text(loaded.data), loaded.tokenizer, SILENT)
    size = estimate_text_size(loaded.data, loaded.tokenizer, SILENT)
    assert (size.exact, size.vocab_size) == (True, 400)
    assert (size.train_tokens, size.heldout_tokens) == (len(prepared.train), len(prepared.heldout))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenizer.vocab_size=500", "encoded with another tokenizer"),
        ("tokenizer={kind: char}", "encoded with another tokenizer"),
        ("tokenizer.dropout=0.1", "without dropout"),
        ("data.heldout=0.3", "data.heldout: cannot be changed"),
        ("data.test=0.1", "data.test: cannot be changed"),
        ("data.field=body", "data.field: cannot be changed"),
        ("data.errors=replace", "data.errors: cannot be changed"),
    ],
)
def test_a_recipe_that_does_not_match_is_rejected(override: str, message: str, folder: Path) -> None:
    loaded = recipe(folder, "", override)
    with pytest.raises(InputError, match=message):
        prepare(require_text(loaded.data), loaded.tokenizer, SILENT)


def test_a_recipe_may_repeat_how_the_text_was_split(folder: Path) -> None:
    loaded = recipe(folder, ", heldout: {share: 0.2, by: document}")
    assert prepare(require_text(loaded.data), loaded.tokenizer, SILENT).heldout.counts.documents


def test_another_tokenizer_file_is_rejected(folder: Path, tiny_run: Run) -> None:
    loaded = recipe(folder, "", f"tokenizer={{path: {tiny_run.path / 'tokenizer.json'}}}")
    with pytest.raises(InputError, match=r"tokenizer.path: not the tokenizer of"):
        prepare(require_text(loaded.data), loaded.tokenizer, SILENT)


def test_damaged_tokens_are_rejected(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with open(copy / "train.npy", "r+b") as opened:
        opened.seek(-9, 2)
        opened.write(b"\x07")
    loaded = recipe(copy)
    with pytest.raises(InputError, match="have changed since they were saved"):
        prepare(require_text(loaded.data), loaded.tokenizer, SILENT)


@pytest.mark.parametrize("content", ['{"format": "tinylm-prepared-text"}', '{"format": "tinylm-prepared-text", "tokenizer": 3}'])
def test_a_damaged_manifest_is_rejected(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    loaded = recipe(tmp_path)
    with pytest.raises(InputError, match="the manifest is damaged"):
        prepare(require_text(loaded.data), loaded.tokenizer, SILENT)


def test_a_prepared_text_is_not_read_as_text(folder: Path) -> None:
    with pytest.raises(InputError, match="tinylm prepare"):
        Corpus([str(folder)])


def test_the_sizes_are_reported(folder: Path) -> None:
    reporter, loaded = CollectingReporter(), recipe(folder)
    prepare(require_text(loaded.data), loaded.tokenizer, reporter)
    assert any("documents for training" in note and str(folder) in note for note in reporter.notes)
