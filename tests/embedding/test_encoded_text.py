"""Test that a text is split into words and encoded as ids without rare words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tinylm.embedding import encoded_text
from tinylm.embedding.encoded_text import encode_corpus, split_words, token_names
from tinylm.errors import InputError
from tinylm.recipe.embeddings import EmbeddingDataSection, TokenVocabulary, WordVocabulary
from tinylm.reporting import SILENT
from tinylm.run import Run

WORDS = {
    "The cat's hat, isn't it?": ["the", "cat's", "hat", "isn't", "it"],
    "snake_case = x2 + 3.5": ["snake_case", "x2", "3", "5"],
    "हिन्दी में": ["हिन्दी", "में"],
    "l’été… 'quoted'": ["l’été", "quoted"],
    "": [],
}


@pytest.mark.parametrize("text", WORDS)
def test_a_text_is_split_into_words(text: str) -> None:
    assert split_words(text, lowercase=True) == WORDS[text]


def source(folder: Path, *documents: str) -> EmbeddingDataSection:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return EmbeddingDataSection(train=(str(path),))


def test_the_ids_are_those_of_the_text_without_rare_words(tmp_path: Path) -> None:
    data = source(tmp_path, "a b a c", "b a rare B")
    encoded = encode_corpus(data, WordVocabulary(kind="words", min_count=2), SILENT)
    assert encoded.vocabulary.names == ["a", "b"]
    assert encoded.vocabulary.counts.tolist() == [3, 3]
    assert encoded.read(0, 99).tolist() == [0, 1, 0, -1, 1, 0, 1]
    limited = encode_corpus(data, WordVocabulary(kind="words", min_count=1, lowercase=False, max_size=2), SILENT)
    assert limited.vocabulary.names == ["a", "b"]
    assert limited.vocabulary.counts.tolist() == [3, 2]


def test_the_rarest_words_are_dropped_when_there_are_too_many_distinct_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded_text, "MAX_COUNTED_WORDS", 50)
    documents = [f"common often common {' '.join(f'w{number}x{n}' for n in range(20))}" for number in range(20)]
    encoded = encode_corpus(source(tmp_path, *documents), WordVocabulary(kind="words"), SILENT)
    assert dict(zip(encoded.vocabulary.names, encoded.vocabulary.counts.tolist(), strict=True)) == {"common": 40, "often": 20}


def test_a_text_without_frequent_words_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no words in this text occur 5 times or more"):
        encode_corpus(source(tmp_path, "one two three"), WordVocabulary(kind="words"), SILENT)


def test_a_text_can_be_encoded_with_the_tokenizer_of_a_run(tiny_run: Run, text_file: Path) -> None:
    data = EmbeddingDataSection(train=(str(text_file),))
    encoded = encode_corpus(data, TokenVocabulary(kind="tokens", tokenizer=str(tiny_run.path)), SILENT)
    ids = tiny_run.tokenizer.encode(text_file.read_text())
    names = token_names(tiny_run.tokenizer)
    assert [encoded.vocabulary.names[number] for number in encoded.read(0, encoded.length)] == [names[id] for id in ids]
    assert encoded.vocabulary.counts.sum() == len(ids)
    assert len(set(names)) == len(names) == tiny_run.tokenizer.vocab_size
    assert np.all(np.diff(encoded.vocabulary.counts) <= 0)
