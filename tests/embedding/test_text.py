"""Which words a text has, what the ids of a file are, and what is forgotten."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tinylm.embedding import text as texts
from tinylm.embedding.text import prepare, token_names, words_of
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
def test_words(text: str) -> None:
    assert words_of(text, lowercase=True) == WORDS[text]


def source(folder: Path, *documents: str) -> EmbeddingDataSection:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return EmbeddingDataSection(train=(str(path),))


def test_ids_are_in_the_order_of_the_text_with_rare_words_left_out(tmp_path: Path) -> None:
    data = source(tmp_path, "a b a c", "b a rare B")
    found = prepare(data, WordVocabulary(kind="words", min_count=2), SILENT)
    assert found.units.names == ["a", "b"]
    assert found.units.counts.tolist() == [3, 3]
    assert found.read(0, 99).tolist() == [0, 1, 0, -1, 1, 0, 1]
    kept = prepare(data, WordVocabulary(kind="words", min_count=1, lowercase=False, max_size=2), SILENT)
    assert kept.units.names == ["a", "b"]
    assert kept.units.counts.tolist() == [3, 2]


def test_the_rarest_words_are_forgotten_when_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MOST_WORDS", 50)
    documents = [f"common often common {' '.join(f'w{number}x{n}' for n in range(20))}" for number in range(20)]
    found = prepare(source(tmp_path, *documents), WordVocabulary(kind="words"), SILENT)
    assert dict(zip(found.units.names, found.units.counts.tolist(), strict=True)) == {"common": 40, "often": 20}


def test_nothing_frequent_enough(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing in this text occurs 5 times"):
        prepare(source(tmp_path, "one two three"), WordVocabulary(kind="words"), SILENT)


def test_tokens_of_a_run(tiny_run: Run, text_file: Path) -> None:
    data = EmbeddingDataSection(train=(str(text_file),))
    found = prepare(data, TokenVocabulary(kind="tokens", tokenizer=str(tiny_run.path)), SILENT)
    ids = tiny_run.tokenizer.encode(text_file.read_text())
    names = token_names(tiny_run.tokenizer)
    assert [found.units.names[number] for number in found.read(0, found.length)] == [names[id] for id in ids]
    assert found.units.counts.sum() == len(ids)
    assert len(set(names)) == len(names) == tiny_run.tokenizer.vocab_size
    assert np.all(np.diff(found.units.counts) <= 0)
