"""Tokenizers read from sentencepiece models produce the ids of the sentencepiece library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizer.samples import odd_texts

from tinylm.data.prepare import prepare
from tinylm.errors import InputError, TinylmWarning
from tinylm.recipe.schema import DataSection, FileTokenizer
from tinylm.reporting import SILENT
from tinylm.tokenizer import END_OF_TEXT, Tokenizer

spm = pytest.importorskip("sentencepiece")
pytest.importorskip("google.protobuf")

EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
"""The normalization of Llama, Mistral and Gemma."""
MODELS: dict[str, dict[str, Any]] = {
    "unigram": {},
    "unigram with bytes": {"byte_fallback": True, **EXACT},
    "unigram without a prefix": {"add_dummy_prefix": False},
    "unigram across words": {"split_by_whitespace": False},
    "unigram with symbols": {"user_defined_symbols": ["<mask>", "def"]},
    "bpe": {"model_type": "bpe"},
    "bpe with bytes and runs of spaces": {
        "model_type": "bpe",
        "byte_fallback": True,
        "allow_whitespace_only_pieces": True,
        **EXACT,
    },
}
PLAIN = (
    "",
    " ",
    "  two  spaces  ",
    "</s><unk><s>",
    "<0x41>",
    "a\n\nb\tc\r\n",
    "▁ a▁b",
    "def <mask> x<mask>",
    "日本語 naïve Ａ １２ ﬁ ½",
    *(" " * count + "if" for count in range(3, 40)),
)


def train(folder: Path, english: str, **options: Any) -> Path:
    (folder / "text.txt").write_text(english[:60_000], encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "sp"), minloglevel=2, **{"vocab_size": 500, **options}
    )
    return folder / "sp.model"


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_ids_and_decoded_texts_are_those_of_sentencepiece(options: dict[str, Any], english: str, tmp_path: Path) -> None:
    file = train(tmp_path, english, **options)
    reference, tokenizer = spm.SentencePieceProcessor(model_file=str(file)), Tokenizer.load(file)
    assert tokenizer.vocab_size == reference.get_piece_size()
    assert tokenizer.end_of_text == reference.eos_id()
    exact = options.get("normalization_rule_name") == "identity"
    real = (english[start : start + 5000] for start in range(60_000, 160_000, 5000))
    for text in [*real, *PLAIN, *(odd_texts(200) if exact else [])]:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids
        if options.get("byte_fallback"):
            assert tokenizer.decode(ids) == reference.decode(ids)


def test_a_saved_copy_encodes_like_the_model(english: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(train(tmp_path, english, byte_fallback=True, **EXACT))
    tokenizer.save(tmp_path / "tokenizer.json")
    copy = Tokenizer.load(tmp_path / "tokenizer.json")
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode(english[:5000]) == tokenizer.encode(english[:5000])
    assert Tokenizer.load(tmp_path).fingerprint == copy.fingerprint


def test_pieces_with_the_same_score_are_merged_from_left_to_right(english: str, tmp_path: Path) -> None:
    """In the models of Llama, all runs of spaces have the same score."""
    from sentencepiece import sentencepiece_model_pb2

    file = train(tmp_path, english, model_type="bpe", byte_fallback=True, **EXACT)
    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    for piece, length in zip(proto.pieces[-5:], (2, 4, 3, 5, 8), strict=True):
        piece.piece, piece.score = "▁" * length, -1e9
    file.write_bytes(proto.SerializeToString())
    reference, tokenizer = spm.SentencePieceProcessor(model_file=str(file)), Tokenizer.load(file)
    for count in range(60):
        text = "a" + " " * count + "if" + " " * (count // 2)
        assert tokenizer.encode(text) == reference.encode(text)
    proto.pieces[-1].piece = "qq"
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="have the same score, which is not supported"):
        Tokenizer.load(file)


def test_a_model_without_an_end_of_text_token_gets_one(english: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(train(tmp_path, english, eos_id=-1))
    assert tokenizer.end_of_text == 500
    assert 500 not in tokenizer.encode(f"a {END_OF_TEXT} b")


def test_a_bpe_model_with_user_defined_symbols_causes_a_warning(english: str, tmp_path: Path) -> None:
    file = train(tmp_path, english, model_type="bpe", user_defined_symbols=["<mask>"], **EXACT)
    with pytest.warns(TinylmWarning, match="the text after the symbol is encoded with a space before it, unlike"):
        tokenizer = Tokenizer.load(file)
    reference = spm.SentencePieceProcessor(model_file=str(file))
    assert tokenizer.encode(english[:5000]) == reference.encode(english[:5000])
    assert reference.piece_to_id("<mask>") in tokenizer.encode("a <mask> b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "char"}, "only models of the types unigram and bpe"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix is not supported"),
        ({"user_defined_symbols": ["a  b"]}, "normalizes its user-defined symbol 'a  b'"),
        ({"model_type": "bpe", "user_defined_symbols": ["<x>"]}, "user-defined symbols and remove_extra_whitespaces"),
    ],
)
def test_a_model_that_a_tokenizer_json_cannot_express_is_rejected(
    options: dict[str, Any], message: str, english: str, tmp_path: Path
) -> None:
    file = train(tmp_path, english, **options)
    with pytest.raises(InputError, match=message) as error:
        Tokenizer.load(file)
    assert error.value.where == str(file)


def test_a_damaged_model_and_a_missing_package_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sp.model"
    for content in (b"", b"not a model"):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"sp\.model: not a sentencepiece model"):
            Tokenizer.load(file)
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(InputError, match=r"tinylm\[compare\]"):
        Tokenizer.load(file)


def test_a_text_is_prepared_with_a_sentencepiece_model(english: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path / "cache"))
    file = train(tmp_path, english, byte_fallback=True, **EXACT)
    data = DataSection.model_validate({"train": str(tmp_path / "text.txt")})
    prepared = prepare(data, FileTokenizer(kind="file", path=str(file)), SILENT)
    (start, end), reference = prepared.train.documents()[0], spm.SentencePieceProcessor(model_file=str(file))
    text = prepared.tokenizer.decode(prepared.train.tokens[start:end])
    assert text == english[: len(text)]
    assert prepared.train.tokens[start:end].tolist() == reference.encode(text)
