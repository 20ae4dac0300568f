"""N-gram models survive a round trip through ARPA files, and KenLM computes the same probabilities from these files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tinylm.errors import InputError
from tinylm.evaluation.evaluate_run import evaluate_run
from tinylm.interchange import arpa
from tinylm.interchange.exporting import export
from tinylm.interchange.importing import import_model
from tinylm.pipeline import train
from tinylm.recipe import loads
from tinylm.run import Run

RECIPE = """\
data: {{train: {text}}}
tokenizer: {tokenizer}
model: {{architecture: ngram, order: 3, prune: [0, 0, 1]}}
training: {{epochs: 1}}
"""
TOKENIZERS = ["char", "byte", "{kind: bpe, vocab_size: 400}", "{kind: word, vocab_size: 300}"]


@pytest.fixture(params=TOKENIZERS)
def run(request: pytest.FixtureRequest, short_file: Path, tmp_path: Path) -> Run:
    train(loads(RECIPE.format(text=short_file, tokenizer=request.param)), tmp_path / "run", device="cpu")
    return Run.open(tmp_path / "run")


def test_an_exported_model_is_imported_unchanged(run: Run, tmp_path: Path) -> None:
    result = export(run, "arpa", tmp_path / "model.arpa")
    assert result.largest_difference < 1e-4
    import_model(tmp_path / "model.arpa", tmp_path / "imported", tokenizer=run.path / "tokenizer.json")
    imported = Run.open(tmp_path / "imported")
    runs = (run, imported)
    tables = [arpa.tables_of(one_run.network(one_run.checkpoint(), torch.device("cpu"))) for one_run in runs]
    for keys, others in zip(tables[0].keys, tables[1].keys, strict=True):
        np.testing.assert_array_equal(keys, others)
    for probabilities, others in zip(tables[0].probabilities, tables[1].probabilities, strict=True):
        np.testing.assert_allclose(probabilities, others, rtol=2e-6)
    text = str(run.recipe.data.sources()["train"][0])
    losses = [evaluate_run(one_run, [text], device="cpu").perplexity.loss for one_run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("run", ["char"], indirect=True)
def test_kenlm_computes_the_same_probabilities(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("kenlm")
    result = export(run, "arpa", tmp_path / "model.arpa")
    assert any(program.startswith("KenLM") for program in result.verified_with)


def test_a_kenlm_file_is_imported_with_its_words_as_tokens(tmp_path: Path) -> None:
    folder = Path(__file__).resolve().parent.parent / "data" / "kenlm"
    import_model(folder / "order3.arpa", tmp_path / "imported")
    imported = Run.open(tmp_path / "imported")
    assert imported.tokenizer.decode(imported.tokenizer.encode("w1 w2")).split() == ["w1", "w2"]
    scores = evaluate_run(imported, [str(folder / "text.txt")], device="cpu").perplexity
    assert 1 < scores.perplexity < 60


@pytest.mark.parametrize(
    ("old", "new"),
    [("ngram 2=", "ngram 2=9"), ("\\end\\", ""), ("\\data\\\n", "nothing"), ("</s>", "w1"), ("\t<s> w1\t", "\t<s> w1 w1\t")],
)
def test_a_damaged_file_is_rejected(old: str, new: str, tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parent.parent / "data" / "kenlm" / "order3.arpa").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "damaged.arpa").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(InputError, match="not a complete ARPA file"):
        arpa.read(tmp_path / "damaged.arpa")


def test_only_n_gram_models_are_exported(tiny_run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ARPA files contain n-gram models, but this model has the decoder architecture"):
        export(tiny_run, "arpa", tmp_path / "model.arpa")
