"""tiktoken is used only if it returns the same ids as `tokenizers`."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizer.samples import UNIGRAM

from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, encoding, training


def test_a_backend_that_returns_different_ids_is_replaced_and_reported(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(encoding, "tiktoken_engine", lambda tokenizer_json, fallback: lambda texts: [[0] for _ in texts])
    fresh = Tokenizer(tokenizers.Tokenizer.from_str(bpe.backend.to_str()))
    fresh.encoder.note = notes.append
    (ids, _) = next(fresh.encode_pieces([Piece("the for statement", True)]))
    assert ids.tolist() == bpe.encode("the for statement")
    assert notes == ["tiktoken produces different ids for this tokenizer; encoding with tokenizers instead, which is slower"]


def test_tiktoken_matches_tokenizers_and_passes_long_texts_to_the_fallback(bpe: Tokenizer, english: str) -> None:
    pytest.importorskip("tiktoken")
    engine = encoding.tiktoken_engine(bpe.tokenizer_json, lambda texts: [[-1] for _ in texts])
    assert engine is not None
    texts = english[:20_000].split("\n")
    assert engine(texts) == [encoded.ids for encoded in bpe.backend.encode_batch(texts, add_special_tokens=False)]
    assert engine(["x" * 501]) == [[-1]], "tiktoken takes quadratic time in the length of a word"
    unigram = training.train(UNIGRAM, [Piece("abc abd", True)], lambda _: None)
    assert encoding.tiktoken_engine(unigram.tokenizer_json, engine) is None
