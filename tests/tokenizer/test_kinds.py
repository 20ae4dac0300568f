"""Training is reproducible for every kind of tokenizer, and other libraries can load the saved tokenizer.json."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizer.samples import random_texts, train_on

from tinylm.errors import InputError
from tinylm.recipe import loads
from tinylm.recipe.schema import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    LearnedTokenizer,
    UnigramTokenizer,
    WordPieceTokenizer,
    WordTokenizer,
)
from tinylm.text.sources import Piece
from tinylm.tokenizer import END_OF_TEXT, Tokenizer, training
from tinylm.tokenizer.tokenizer import UNKNOWN

SECTIONS: dict[str, LearnedTokenizer] = {
    "bpe": BpeTokenizer(kind="bpe", vocab_size=700),
    "bpe gpt2": BpeTokenizer(kind="bpe", vocab_size=600, split="gpt2", digits=1),
    "bpe llama3": BpeTokenizer(kind="bpe", vocab_size=600, split="llama3"),
    "bpe whitespace": BpeTokenizer(kind="bpe", vocab_size=600, split="whitespace"),
    "bpe none": BpeTokenizer(kind="bpe", vocab_size=600, split="none"),
    "bpe regex": BpeTokenizer(kind="bpe", vocab_size=600, split=r"[^-]+|-"),
    "bpe added": BpeTokenizer(kind="bpe", vocab_size=600, special_tokens=("<|user|>",), added_tokens=("self.", "for the")),
    "bpe characters": BpeTokenizer(kind="bpe", vocab_size=1000, alphabet="text"),
    "bpe 40 characters": BpeTokenizer(kind="bpe", vocab_size=900, alphabet=40),
    "unigram": UnigramTokenizer(kind="unigram", vocab_size=900),
    "unigram 40 characters": UnigramTokenizer(kind="unigram", vocab_size=900, alphabet=40, split="gpt2"),
    "bpe normalized": BpeTokenizer(kind="bpe", vocab_size=600, normalize=("nfkc", "lowercase", "strip_accents")),
    "bpe without fallback": BpeTokenizer(kind="bpe", vocab_size=600, alphabet=40, byte_fallback=False),
    "unigram without fallback": UnigramTokenizer(kind="unigram", vocab_size=600, alphabet=40, byte_fallback=False),
    "wordpiece": WordPieceTokenizer(kind="wordpiece", vocab_size=600),
    "wordpiece whitespace": WordPieceTokenizer(kind="wordpiece", vocab_size=600, split="whitespace", normalize=("lowercase",)),
    "word": WordTokenizer(kind="word", vocab_size=600, min_frequency=2),
    "char nfc": CharTokenizer(kind="char", normalize=("nfc",)),
}
LOSSLESS = list(SECTIONS)[:11]
"""The tokenizers that can encode and exactly restore every text."""


@pytest.fixture(scope="module")
def trained(english: str) -> dict[str, Tokenizer]:
    return {name: train_on(english[:60_000], section) for name, section in SECTIONS.items()}


@pytest.mark.parametrize("name", SECTIONS)
def test_the_encoder_returns_the_same_ids_as_tokenizers(
    name: str, trained: dict[str, Tokenizer], english: str, tmp_path: Path
) -> None:
    trained[name].save(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    reference.encode_special_tokens = True
    assert tokenizer.kind == SECTIONS[name].kind
    for text in ["", " ", "\n\n  x", *random_texts(400, english), english[:50_000]]:
        ours = [id for ids, _ in tokenizer.encode_pieces([Piece(text, True)]) for id in ids.tolist()]
        assert ours == reference.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
        assert tokenizer.end_of_text not in ours
        if name in LOSSLESS:
            assert tokenizer.decode(ours) == text == reference.decode(ours, skip_special_tokens=False)
            assert not any(id == tokenizer.unknown for id in ours)


@pytest.mark.parametrize("name", ["unigram", "bpe characters", "wordpiece", "word"])
def test_transformers_loads_the_file_and_returns_the_same_ids(
    name: str, trained: dict[str, Tokenizer], english: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    trained[name].save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    texts = [text for text in random_texts(100, english) if END_OF_TEXT not in text and UNKNOWN not in text]
    for text in [*texts, english[:20_000]]:
        assert theirs.encode(text, add_special_tokens=False) == trained[name].encode(text)


def test_text_that_looks_like_a_byte_or_unknown_token_round_trips(trained: dict[str, Tokenizer]) -> None:
    for name in ("unigram", "unigram 40 characters", "bpe characters", "bpe 40 characters"):
        for text in ("<0x41>", "a<0x0A>b", UNKNOWN, f"{END_OF_TEXT}<0x00>"):
            assert trained[name].decode(trained[name].encode(text)) == text


def test_normalization_agrees_with_unicodedata(trained: dict[str, Tokenizer], english: str) -> None:
    def expected(text: str) -> str:
        text = unicodedata.normalize("NFKC", text).lower()
        without_accents = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
        return unicodedata.normalize("NFC", without_accents)

    for text in (english[:30_000], "Ünïcödé ﬁligree ½ ① Ａ", "한국어 Éa\u0301 x²"):
        tokenizer = trained["bpe normalized"]
        assert tokenizer.decode(tokenizer.encode(text)) == expected(text)


def test_kinds_that_drop_white_space_keep_all_other_text(trained: dict[str, Tokenizer], english: str) -> None:
    tokenizer = trained["wordpiece"]
    words = [word for word in english[:60_000].split() if word.isalpha() and word.isascii()]
    text = "  ".join(words)
    assert tokenizer.decode(tokenizer.encode(text)) == " ".join(words)
    assert tokenizer.decode(tokenizer.encode("don't")) == "don ' t"
    assert trained["word"].decode(trained["word"].encode("the zzzzq the")) == "the \ufffd the"


def test_added_tokens_are_always_encoded_and_special_tokens_only_on_request(trained: dict[str, Tokenizer]) -> None:
    tokenizer = trained["bpe added"]
    added = tokenizer.backend.token_to_id("for the")
    assert added in tokenizer.encode("wait for the end")
    text = "<|user|>hello"
    user = tokenizer.backend.token_to_id("<|user|>")
    assert user not in tokenizer.encode(text)
    (ids, _) = next(tokenizer.encode_pieces_with_special([Piece(text, True)]))
    assert ids[0] == user
    assert tokenizer.decode(ids.tolist()) == "hello"


def test_ids_do_not_depend_on_how_a_document_is_divided_into_pieces(trained: dict[str, Tokenizer], english: str) -> None:
    text = english[:30_000]
    for name in ("bpe", "bpe gpt2", "bpe none", "bpe regex", "unigram", "wordpiece", "bpe normalized"):
        whole = trained[name].encode(text)
        for size in (1, 997):
            start = 20_000 if size == 1 else 0
            pieces = [Piece(text[i : i + size], i == start) for i in range(start, len(text), size)]
            ids = [id for part, _ in trained[name].encode_pieces(pieces) for id in part.tolist()]
            assert ids == (whole if start == 0 else trained[name].encode(text[start:]))


def test_ids_of_long_text_do_not_depend_on_its_pieces(
    trained: dict[str, Tokenizer], english: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinylm.tokenizer.encoding.SEGMENT_BYTES", 1000)
    text = english[:4000] + " " + "語é" * 2000 + " " + english[4000:9000] + "x" * 5000
    expected = trained["bpe"].backend.encode(text, add_special_tokens=False).ids
    results = {tuple(expected)}
    for size in (len(text), 4096, 777, 50):
        pieces = [Piece(text[i : i + size], i == 0) for i in range(0, len(text), size)]
        ids = [id for part, _ in trained["bpe"].encode_pieces(pieces) for id in part.tolist()]
        assert trained["bpe"].decode(ids) == text
        results.add(tuple(ids))
    assert len(results) == 1


def test_long_text_without_split_points_is_cut_safely_or_rejected(
    trained: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinylm.tokenizer.encoding.SEGMENT_BYTES", 1000)
    monkeypatch.setattr("tinylm.tokenizer.encoding.MAX_BYTES_WITHOUT_SPLIT_POINT", 4000)
    pieces = [Piece("1234567890" * 50, number == 0) for number in range(20)]
    with pytest.raises(InputError, match="cannot be divided without changing tokens"):
        list(trained["bpe"].encode_pieces(pieces))
    text = "".join(piece.text for piece in pieces)
    for section in (CharTokenizer(kind="char"), ByteTokenizer(kind="byte")):
        tokenizer = train_on(text, section)
        ids = [id for part, _ in tokenizer.encode_pieces(pieces) for id in part.tolist()]
        assert ids == tokenizer.backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
def test_the_error_for_a_vocabulary_that_is_too_small_includes_the_smallest_possible_size(english: str, kind: str) -> None:
    section = {"wordpiece": WordPieceTokenizer, "unigram": UnigramTokenizer, "bpe": BpeTokenizer}[kind]

    def options(size: int) -> dict[str, object]:
        return {"kind": kind, "vocab_size": size, "alphabet": "text", **({} if kind == "wordpiece" else {"byte_fallback": False})}

    with pytest.raises(InputError) as caught:
        train_on(english[:2000], section(**options(10)))
    smallest = int(re.findall(r"set it to at least (\d+)", str(caught.value))[0])
    assert train_on(english[:2000], section(**options(smallest))).vocab_size <= smallest
    with pytest.raises(InputError, match=f"set it to at least {smallest},"):
        train_on(english[:2000], section(**options(smallest - 1)))


@pytest.mark.parametrize("alphabet", ["text", "bytes"])
def test_a_bpe_vocabulary_without_merges_is_still_bpe(alphabet: str) -> None:
    fallback = {"byte_fallback": False} if alphabet == "text" else {}
    assert train_on("ab", BpeTokenizer(kind="bpe", vocab_size=258, alphabet=alphabet, min_frequency=99, **fallback)).kind == "bpe"


def test_documents_are_encoded_separately_and_in_order(trained: dict[str, Tokenizer]) -> None:
    pieces = [Piece("one", True), Piece(" two", False), Piece("three", True), Piece("", True), Piece("four", True)]
    encoded = list(trained["bpe"].encode_pieces(pieces))
    assert [starts for _, starts in encoded] == [True] * 4
    assert [trained["bpe"].decode(ids.tolist()) for ids, _ in encoded] == ["one two", "three", "", "four"]


def test_each_option_limits_the_vocabulary_as_documented(english: str) -> None:
    text = english[:60_000]
    short = train_on(text, BpeTokenizer(kind="bpe", vocab_size=500, max_token_length=3))
    assert max(map(len, short.token_bytes)) == 3
    frequent = train_on(text, BpeTokenizer(kind="bpe", vocab_size=5000, min_frequency=50))
    for token in frequent.token_bytes[256:-1]:
        assert text.encode().count(token) >= 50 or len({*token}) == 1
    pieces = train_on(text, UnigramTokenizer(kind="unigram", vocab_size=800, max_token_length=4))
    assert max(len(token.decode("utf-8", "replace")) for token in pieces.token_bytes) <= 4
    words = train_on(text, WordTokenizer(kind="word", vocab_size=5000, min_frequency=20))
    assert all(text.count(token.decode().strip()) >= 20 for token in words.token_bytes[1:-1])
    dna = train_on("ACGTTGCA" * 100 + "N", BpeTokenizer(kind="bpe", vocab_size=300, alphabet="ACGT", byte_fallback=False))
    assert [dna.backend.id_to_token(id) for id in range(5)] == [UNKNOWN, "A", "C", "G", "T"]
    assert dna.unknown in dna.encode("N")


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece", "word"])
def test_the_error_for_a_vocabulary_that_is_too_large_includes_the_largest_possible_size(kind: str) -> None:
    def section(size: int, allow_smaller: bool) -> Any:
        settings = [f"tokenizer.kind={kind}", f"tokenizer.vocab_size={size}", f"tokenizer.allow_smaller={allow_smaller}"]
        return loads("data: {train: a}\ntraining: {steps: 1}\n", settings, check_files=False).tokenizer

    text = "low lower lowest new newer newest wide wider widest " * 3
    with pytest.raises(InputError, match="the largest vocabulary that fits has") as caught:
        train_on(text, section(30_000, False))
    largest = int(str(caught.value).split("fits has ")[1].split()[0].replace(",", ""))
    assert train_on(text, section(largest, False)).vocab_size == largest
    assert train_on(text, section(30_000, True)).vocab_size == largest


def test_an_alphabet_larger_than_the_vocabulary_is_an_error(english: str) -> None:
    with pytest.raises(
        InputError, match=r"the alphabet has \d+ characters, which need \d+ tokens, but the vocabulary has only \d+ left for them"
    ):
        train_on(english[:50_000], BpeTokenizer(kind="bpe", vocab_size=300, alphabet="text"))


TRAIN_SCRIPT = """
import sys, hashlib, pydoc_data.topics
from tinylm.recipe import loads
from tinylm.text.sources import Piece
from tinylm.tokenizer import training
text = "".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))[:40_000]
for kind in sys.argv[1].split(","):
    section = loads("data: {train: a}\\ntraining: {steps: 1}\\ntokenizer: {kind: %s}" % kind, check_files=False).tokenizer
    section = section.model_copy(update={"vocab_size": 600}) if hasattr(section, "vocab_size") else section
    print(kind, hashlib.sha256(training.train(section, [Piece(text, True)], print).backend.to_str().encode()).hexdigest())
"""


def test_the_number_of_threads_and_hash_seed_do_not_change_the_file() -> None:
    kinds = "bpe,unigram,wordpiece,word,char,byte"
    outputs = set()
    for threads in ("1", "2", "4"):
        settings = {
            "RAYON_NUM_THREADS": threads,
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "PYTHONHASHSEED": threads,
        }
        done = subprocess.run(
            [sys.executable, "-c", TRAIN_SCRIPT, kinds], env={**os.environ, **settings}, capture_output=True, text=True, check=True
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert next(iter(outputs)).count("\n") == 6


def test_the_order_of_documents_does_not_change_the_file(english: str) -> None:
    documents = [Piece(english[start : start + 2000], True) for start in range(0, 40_000, 2000)]
    for section in (SECTIONS["bpe"], SECTIONS["unigram"], SECTIONS["wordpiece"]):
        forward = training.train(section, documents, lambda warning: None)
        backward = training.train(section, documents[::-1], lambda warning: None)
        assert forward.backend.to_str() == backward.backend.to_str()


def test_a_metaspace_tokenizer_from_another_library_is_loaded_and_decoded(english: str, tmp_path: Path) -> None:
    theirs = tokenizers.SentencePieceUnigramTokenizer()
    theirs.train_from_iterator([english[:30_000]], vocab_size=500, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
    theirs.save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    assert tokenizer.split_points is None
    text = "the for statement is used to iterate"
    assert tokenizer.encode(text) == theirs.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == theirs.decode(theirs.encode(text).ids) == text


def test_dropout_in_a_tokenizer_json_does_not_make_ids_random(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer_json = json.loads(trained["bpe"].backend.to_str())
    tokenizer_json["model"]["dropout"] = 0.9
    (tmp_path / "t.json").write_text(json.dumps(tokenizer_json), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    assert len({tuple(tokenizer.encode("tokenizers statement")) for _ in range(20)}) == 1


def test_text_decoded_from_random_bytes_round_trips(trained: dict[str, Tokenizer]) -> None:
    rng = np.random.default_rng(5)
    text = rng.integers(0, 256, 200_000, dtype=np.uint8).tobytes().decode("utf-8", "replace")
    for name in ("bpe", "unigram", "bpe 40 characters"):
        ids = [id for part, _ in trained[name].encode_pieces([Piece(text, True)]) for id in part.tolist()]
        assert trained[name].decode(ids) == text
