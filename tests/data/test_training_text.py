"""Test that overlap with a training text can be measured from its record in a run folder, even with another tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinylm.data import training_text
from tinylm.data.ngrams import sample_ngrams
from tinylm.data.prepare import encode_to_shard
from tinylm.data.shards import Shard
from tinylm.data.training_text import TrainingText, measure, open_training_texts, percent, save_training_texts
from tinylm.errors import InputError
from tinylm.recipe.schema import BpeTokenizer, ByteTokenizer
from tinylm.reporting import CollectingReporter
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


@pytest.fixture(scope="module")
def tokenizers(english: str) -> tuple[Tokenizer, Tokenizer]:
    pieces = [Piece(english[:20_000], True)]
    bpe = training.train(BpeTokenizer(kind="bpe", vocab_size=400), pieces, lambda text: None)
    return bpe, training.train(ByteTokenizer(kind="byte"), pieces, lambda text: None)


def encode(tokenizer: Tokenizer, folder: Path, *documents: str) -> Shard:
    return encode_to_shard(folder, "text", iter([Piece(text, True) for text in documents]), tokenizer, lambda size: None)


def test_overlap_is_found_with_either_tokenizer(tokenizers: tuple[Tokenizer, Tokenizer], english: str, tmp_path: Path) -> None:
    for own, other in (tokenizers, tokenizers[::-1]):
        train = TrainingText(("a.txt",), sample_ngrams(encode(own, tmp_path / own.kind, english[:20_000])), own)
        known = encode(other, tmp_path / "known", english[2000:6000])
        new = encode(other, tmp_path / "new", "".join(reversed(english[30_000:34_000])))
        ((found,), (missing,)) = (measure([train], text, other) for text in (known, new))
        assert found.share is not None
        assert found.share > 0.98
        assert missing.share == 0
        del known, new


def test_training_texts_can_be_saved_and_opened(tokenizers: tuple[Tokenizer, Tokenizer], english: str, tmp_path: Path) -> None:
    own, other = tokenizers
    shard = encode(own, tmp_path / "own", english[:9000])
    texts = [
        TrainingText(("a.txt", "b.txt"), sample_ngrams(shard), own),
        TrainingText(("c.txt",), sample_ngrams(encode(other, tmp_path / "other", english[9000:18_000])), other, "base"),
        TrainingText(("weights",), None, own, "imported"),
    ]
    save_training_texts(tmp_path / "record", texts, own)
    opened = open_training_texts(tmp_path / "record", own)
    assert [(text.sources, text.run, text.name) for text in opened] == [(text.sources, text.run, text.name) for text in texts]
    assert [item.share for item in measure(opened, shard, own)] == [item.share for item in measure(texts, shard, own)]
    assert [item.share for item in measure(opened, shard, own)][0::2] == [1, None]


def test_a_large_overlap_causes_a_warning_and_an_unknown_overlap_causes_a_note(
    tokenizers: tuple[Tokenizer, Tokenizer], english: str, tmp_path: Path
) -> None:
    own = tokenizers[0]
    shard = encode(own, tmp_path / "own", english[:9000])
    texts = [TrainingText(("a.txt",), sample_ngrams(shard), own, "base"), TrainingText(("b.txt",), None, own, "imported")]
    reporter = CollectingReporter()
    training_text.warn(measure(texts, shard, own), "the held-out text", reporter)
    (warning,), (note,) = reporter.warnings, reporter.notes
    assert warning.startswith("100% of the held-out text also occurs in the training text of base")
    assert "not known" in note
    assert "training text of imported" in note


@pytest.mark.parametrize("name", ["../ngrams.safetensors", "/etc/passwd", 3, ["x"]])
def test_a_record_with_an_invalid_file_name_is_rejected(
    tokenizers: tuple[Tokenizer, Tokenizer], tmp_path: Path, name: object
) -> None:
    entry = {"run": None, "sources": ["a.txt"], "ngrams": name, "tokenizer": None}
    (tmp_path / "index.json").write_text(json.dumps([entry]))
    with pytest.raises(InputError, match="the record of the training text is missing or damaged"):
        open_training_texts(tmp_path, tokenizers[0])


def test_only_exactly_0_and_1_are_shown_as_0_and_100_percent() -> None:
    assert [percent(share) for share in (0, 0.0001, 0.034, 0.34, 0.998, 1)] == [
        "0%",
        "less than 0.1%",
        "3.4%",
        "34%",
        "more than 99%",
        "100%",
    ]
