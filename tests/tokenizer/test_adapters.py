"""Reports on tokenizers from other libraries agree with reports on tinylm tokenizers."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from tinylm.errors import InputError
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.adapters import open_tokenizer
from tinylm.tokenizer.report import build_report


def test_reports_on_the_same_tokenizer_agree_across_libraries(bpe: Tokenizer, english: str, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    bpe.save(tmp_path / "tokenizer.json")
    ranks = {token: id for id, token in enumerate(bpe.token_bytes[:-1])}
    lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items())
    (tmp_path / "ours.tiktoken").write_text("\n".join(lines) + "\n")
    prefix = str(tmp_path / "sp")
    (tmp_path / "text.txt").write_text(english[:50_000], encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "text.txt"), model_prefix=prefix, vocab_size=500, minloglevel=2)
    files = [("text", [Piece(english[60_000:70_000], True)])]
    ours = build_report(open_tokenizer(str(tmp_path)), files)
    by_tiktoken = build_report(open_tokenizer(f"{tmp_path}/ours.tiktoken:gpt4"), files)
    assert (by_tiktoken.kind, by_tiktoken.round_trip_failures) == ("bpe", 0)
    assert by_tiktoken.tokens == ours.tokens
    by_sentencepiece = build_report(open_tokenizer(f"{prefix}.model"), files)
    assert by_sentencepiece.kind == "unigram"
    assert by_sentencepiece.round_trip_failures > 0, "by default, sentencepiece collapses spaces"
    for path in ("none.model", "none.tiktoken", "none.json"):
        with pytest.raises(InputError, match="no such tokenizer file"):
            open_tokenizer(str(tmp_path / path))
