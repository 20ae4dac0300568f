"""N-gram models survive a round trip through ARPA files, and KenLM computes the same probabilities from these files."""

from __future__ import annotations

import gzip
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


def _with_words(path: Path, *lines: str) -> Path:
    """Write an ARPA file of order 2 with these additional unigrams."""
    unigrams = ["-1\t<unk>\t0", "0\t<s>\t-0.3", "-1\t</s>\t0", "-0.5\thello\t-0.2", *lines]
    bigrams = ["-0.1\t<s> hello", "-0.2\thello </s>"]
    header = f"\\data\\\nngram 1={len(unigrams)}\nngram 2={len(bigrams)}\n"
    sections = "\n".join(["", "\\1-grams:", *unigrams, "", "\\2-grams:", *bigrams, "", "\\end\\", ""])
    path.write_text(header + sections, encoding="utf-8")
    return path


@pytest.mark.parametrize("logprob", ["-99", "-100", "-inf"])
def test_a_word_with_probability_zero_has_a_finite_loss_and_can_be_exported(logprob: str, tmp_path: Path) -> None:
    import_model(_with_words(tmp_path / "a.arpa", f"{logprob}\tnever\t0"), tmp_path / "run")
    run = Run.open(tmp_path / "run")
    (tmp_path / "text.txt").write_text("hello never", encoding="utf-8")
    assert np.isfinite(evaluate_run(run, [str(tmp_path / "text.txt")], device="cpu").perplexity.loss)
    tables, words = arpa.read(tmp_path / "a.arpa")
    arpa.write(tmp_path / "b.arpa", tables, words, words.index(arpa.END))
    np.testing.assert_allclose(arpa.read(tmp_path / "b.arpa")[0].probabilities[0], tables.probabilities[0], rtol=1e-5)


def test_a_word_that_ends_in_the_end_token_keeps_its_backoff_weight(tmp_path: Path) -> None:
    tables, words = arpa.read(_with_words(tmp_path / "a.arpa", "-1\tx</s>\t-0.7"))
    arpa.write(tmp_path / "b.arpa", tables, words, words.index(arpa.END))
    np.testing.assert_allclose(arpa.read(tmp_path / "b.arpa")[0].backoffs[0], tables.backoffs[0], rtol=1e-5)


def test_a_file_with_another_name_or_compression_is_imported(tmp_path: Path) -> None:
    path = _with_words(tmp_path / "model.lm")
    (tmp_path / "model.arpa.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert [
        import_model(file, tmp_path / file.name.replace(".", "-")).vocab_size for file in (path, tmp_path / "model.arpa.gz")
    ] == [3, 3]


def test_numbers_and_words_that_cannot_be_read_are_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a complete ARPA file: a number in line 10 is too large"):
        arpa.read(_with_words(tmp_path / "a.arpa", "-1\tbig\t400"))
    path = tmp_path / "latin1.arpa"
    path.write_bytes(_with_words(tmp_path / "a.arpa", "-1\tcafé").read_text(encoding="utf-8").encode("latin-1"))
    with pytest.raises(InputError, match="contains a word that is not UTF-8"):
        arpa.read(path)


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
