"""Decoding restores every encoded text, and text never becomes a control token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizer.samples import random_texts

from tinylm.errors import InputError
from tinylm.recipe.schema import BpeTokenizer, ByteTokenizer, CharTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import END_OF_TEXT, Tokenizer, training
from tinylm.tokenizer.tokenizer import UNKNOWN


@pytest.fixture(scope="module", params=["bpe", "bpe-gpt2", "byte"])
def lossless(request: pytest.FixtureRequest, english: str) -> Tokenizer:
    """Return a tokenizer that can encode and exactly restore every text."""
    section = {
        "bpe": BpeTokenizer(kind="bpe", vocab_size=500),
        "bpe-gpt2": BpeTokenizer(kind="bpe", vocab_size=500, split="gpt2"),
        "byte": ByteTokenizer(kind="byte"),
    }[request.param]
    return training.train(section, [Piece(english[:100_000], True)], print)


@pytest.fixture(scope="module")
def bpe(english: str) -> Tokenizer:
    return training.train(BpeTokenizer(kind="bpe", vocab_size=500), [Piece(english[:100_000], True)], print)


@pytest.fixture(scope="module")
def char(english: str) -> Tokenizer:
    return training.train(CharTokenizer(kind="char"), [Piece(english[:100_000], True)], print)


def reloaded(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    tokenizer.save(folder / "tokenizer.json")
    return Tokenizer.load(folder / "tokenizer.json")


def test_every_text_round_trips_and_never_becomes_a_control_token(lossless: Tokenizer, english: str, tmp_path: Path) -> None:
    texts = ["", *random_texts(3000, english)]
    for tokenizer in (lossless, reloaded(lossless, tmp_path)):
        for text in texts:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.end_of_text not in ids
            assert all(id < tokenizer.vocab_size for id in ids)
            assert sum(tokenizer.token_byte_lengths[ids]) == len(text.encode())


def test_every_character_round_trips(lossless: Tokenizer) -> None:
    characters = "".join(chr(code) for code in range(0x3000) if chr(code) != END_OF_TEXT)
    assert lossless.decode(lossless.encode(characters)) == characters
    for code in (*range(0x500), 0xFFFF, 0x10000, 0x1F642, 0x10FFFF):
        assert lossless.decode(lossless.encode(chr(code))) == chr(code)


@pytest.mark.parametrize("length", [3, 2_000_000])
def test_an_unpaired_surrogate_is_an_error(lossless: Tokenizer, length: int) -> None:
    for half in ("\ud83d", "\udc4d", "\udc80"):
        with pytest.raises(InputError, match="unpaired surrogate, which UTF-8 cannot encode"):
            lossless.encode("a" * length + half)


def test_the_stream_decoder_emits_only_complete_characters(lossless: Tokenizer, english: str) -> None:
    for text in random_texts(500, english):
        text = text.replace("\ufffd", "")
        for ids in (lossless.encode(text), [id for character in text for id in lossless.encode(character)]):
            decoder = lossless.stream_decoder()
            emitted = [decoder.push(id) for id in ids]
            assert not any("\ufffd" in part for part in emitted)
            assert "".join(emitted) == lossless.decode(ids) == text
            assert decoder.finish() == ""


def test_the_stream_decoder_holds_back_an_incomplete_character() -> None:
    tokenizer = training.train(ByteTokenizer(kind="byte"), [], print)
    decoder = tokenizer.stream_decoder()
    assert [decoder.push(id) for id in tokenizer.encode("a🙂é")] == ["a", "", "", "", "🙂", "", "é"]
    decoder = tokenizer.stream_decoder()
    incomplete = tokenizer.encode("🙂")[:2]
    assert [decoder.push(id) for id in incomplete] + [decoder.finish()] == ["", "", "\ufffd"]
    assert tokenizer.decode(incomplete) == "\ufffd"


def test_saving_and_loading_preserves_a_tokenizer(lossless: Tokenizer, char: Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (lossless, char):
        loaded = reloaded(tokenizer, tmp_path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.kind, loaded.vocab_size) == (tokenizer.kind, tokenizer.vocab_size)
        assert (loaded.end_of_text, loaded.unknown) == (tokenizer.end_of_text, tokenizer.unknown)
        assert loaded.token_bytes == tokenizer.token_bytes


def test_transformers_loads_the_file_and_returns_the_same_ids(
    lossless: Tokenizer, char: Tokenizer, english: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    texts = [text for text in random_texts(300, english) if END_OF_TEXT not in text and UNKNOWN not in text] + [english[:20_000]]
    assert len(texts) > 150
    for tokenizer in (lossless, char):
        tokenizer.save(tmp_path / "tokenizer.json")
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        for text in texts:
            ids = tokenizer.encode(text)
            assert theirs.encode(text, add_special_tokens=False) == ids
            if tokenizer.unknown not in ids:
                assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
        assert theirs.convert_tokens_to_ids(END_OF_TEXT) == tokenizer.end_of_text


def test_a_loaded_tokenizer_has_the_right_kind(char: Tokenizer, bpe: Tokenizer, tmp_path: Path) -> None:
    byte = training.train(ByteTokenizer(kind="byte"), [], print)
    assert [reloaded(tokenizer, tmp_path).kind for tokenizer in (char, bpe, byte)] == ["char", "bpe", "byte"]


def test_a_byte_tokenizer_has_a_token_for_each_byte_and_for_the_end_of_text() -> None:
    byte = training.train(ByteTokenizer(kind="byte"), [], print)
    assert byte.vocab_size == 257
    assert sorted(byte.token_bytes) == sorted([b"", *(bytes([value]) for value in range(256))])
    assert b"".join(byte.token_bytes[id] for id in byte.encode("é🙂")) == "é🙂".encode()


def test_a_char_tokenizer_has_one_token_per_character_and_an_unknown_token(char: Tokenizer, english: str) -> None:
    known = sorted(set(english[:100_000]))
    assert char.vocab_size == len(known) + 2
    assert [char.encode(c) for c in known] == [[id] for id in range(len(known))], "in code point order"
    assert "語" not in known
    ids = char.encode("for語🙂🙂x")
    assert [id == char.unknown for id in ids] == [False, False, False, True, True, True, False]
    assert char.decode(ids) == "for\ufffd\ufffd\ufffdx"
    assert char.decode(char.encode(english[:5000])) == english[:5000]


@pytest.mark.parametrize("text", [f"a{END_OF_TEXT}b", f"{UNKNOWN}", f"{END_OF_TEXT * 3}"])
def test_a_char_tokenizer_encodes_special_tokens_in_text_as_characters(text: str, tmp_path: Path) -> None:
    trained = training.train(CharTokenizer(kind="char"), [Piece("<|endoftextunknow|> ab", True)], print)
    for tokenizer in (trained, reloaded(trained, tmp_path)):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text)
        assert not {tokenizer.end_of_text, tokenizer.unknown} & set(ids)
        assert tokenizer.decode(ids) == text


def test_the_end_of_text_token_decodes_to_an_empty_string(bpe: Tokenizer) -> None:
    assert bpe.end_of_text is not None
    assert bpe.decode([*bpe.encode("one"), bpe.end_of_text, *bpe.encode(" two")]) == "one two"
    assert bpe.token_byte_lengths[bpe.end_of_text] == 0


@pytest.mark.parametrize("id", [-1, 500, 10**6])
def test_an_id_outside_the_vocabulary_is_an_error(bpe: Tokenizer, id: int) -> None:
    assert bpe.vocab_size == 500
    with pytest.raises(InputError, match="ids must be between 0 and 499"):
        bpe.decode([1, id])


def test_the_fingerprint_depends_on_the_text_and_every_setting(bpe: Tokenizer, english: str) -> None:
    def fingerprint(text: str = english[:100_000], **settings: object) -> str:
        section = BpeTokenizer.model_validate({"kind": "bpe", "vocab_size": 500, **settings})
        return training.train(section, [Piece(text, True)], print).fingerprint

    assert fingerprint() == bpe.fingerprint
    different = [fingerprint(vocab_size=499), fingerprint(split="gpt2"), fingerprint(digits=1), fingerprint(english[:50_000])]
    assert len({bpe.fingerprint, *different}) == 5


def test_the_fingerprint_does_not_depend_on_the_order_of_keys_in_the_file(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "a.json")
    values = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    (tmp_path / "b.json").write_text(json.dumps(dict(reversed(values.items()))), encoding="utf-8")
    assert (tmp_path / "a.json").read_bytes() != (tmp_path / "b.json").read_bytes()
    assert Tokenizer.load(tmp_path / "b.json").fingerprint == bpe.fingerprint


def test_a_missing_or_invalid_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: no such tokenizer file"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "a.json").write_text('{"version": "1.0"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.json: not a valid tokenizer\.json"):
        Tokenizer.load(tmp_path / "a.json")


def test_text_never_becomes_a_special_token_in_a_tokenizer_from_another_library(english: str, tmp_path: Path) -> None:
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([english[:50_000]], vocab_size=400, special_tokens=["</s>"], show_progress=False)
    theirs.save(str(tmp_path / "theirs.json"))
    tokenizer = Tokenizer.load(tmp_path / "theirs.json")
    assert tokenizer.end_of_text == theirs.token_to_id("</s>")
    text = "a </s> b 🙂"
    assert tokenizer.end_of_text not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(english[:3000]) == theirs.encode(english[:3000]).ids


def test_a_tokenizer_with_an_unsupported_decoder_is_an_error(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a</w>": 1}, unk_token="[UNK]"))
    backend.decoder = tokenizers.decoders.BPEDecoder()
    backend.save(str(tmp_path / "t.json"))
    with pytest.raises(InputError, match=r"t\.json: wordlevel tokenizers with the decoder BPEDecoder are not supported"):
        Tokenizer.load(tmp_path / "t.json")


def test_truncation_and_padding_in_a_file_are_ignored(bpe: Tokenizer, english: str, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
    backend.enable_truncation(5)
    backend.enable_padding(length=1000)
    backend.save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    assert tokenizer.encode(english[:3000]) == bpe.encode(english[:3000])
    assert tokenizer.encode("a") == bpe.encode("a")


def test_the_vocabulary_size_includes_unused_ids(bpe: Tokenizer, tmp_path: Path) -> None:
    tokenizer_json = json.loads(bpe.backend.to_str())
    vocabulary = tokenizer_json["model"]["vocab"]
    vocabulary["a"] = 1000
    (tmp_path / "t.json").write_text(json.dumps(tokenizer_json), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    assert tokenizer.encode("a") == [1000]
    assert tokenizer.vocab_size == 1001
    assert tokenizer.decode([1000]) == "a"
