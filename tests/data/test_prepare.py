"""Text becomes tokens once, never from a stale cache, and the tokenizer learns from the training half alone."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from tinylm.data import estimate
from tinylm.data.estimate import measure_text
from tinylm.data.prepare import Prepared, prepare
from tinylm.data.shards import Shard
from tinylm.errors import InputError
from tinylm.recipe.schema import BpeTokenizer, ByteTokenizer, CharTokenizer, DataSection, FileTokenizer, TokenizerSection
from tinylm.reporting import CollectingReporter
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training

BPE = BpeTokenizer(kind="bpe", vocab_size=300)
CHAR = CharTokenizer(kind="char")
BYTE = ByteTokenizer(kind="byte")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has a cache of its own."""
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path, english: str) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(english[:20_000], encoding="utf-8", newline="")
    return path


def prepared(
    source: Path | list[Path], section: TokenizerSection = BPE, reporter: CollectingReporter | None = None, **settings: Any
) -> Prepared:
    train = [str(path) for path in (source if isinstance(source, list) else [source])]
    return prepare(DataSection.model_validate({"train": train, **settings}), section, reporter or CollectingReporter())


def text_of(half: Shard, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(half.tokens[start:end].tolist()) for start, end in half.documents()]


def no_work(*_: object, **__: object) -> Iterator[object]:
    raise AssertionError("this was done before")


@pytest.mark.parametrize("section", [BPE, CHAR, BYTE])
def test_the_tokens_of_both_halves_decode_to_the_text(source: Path, section: TokenizerSection, english: str) -> None:
    found = prepared(source, section)
    (train,), (heldout,) = (text_of(half, found.tokenizer) for half in (found.train, found.heldout))
    assert train == english[:18_000]
    assert section is CHAR or heldout == english[18_000:20_000]
    assert found.heldout.counts.characters == 2000
    assert found.train.counts.bytes == len(english[:18_000].encode())


def test_documents_stay_apart(tmp_path: Path, english: str) -> None:
    texts = [text for text in english[:30_000].split("\n\n") if text]
    paths = []
    for number, text in enumerate(texts):
        paths.append(tmp_path / f"{number:04}.txt")
        paths[-1].write_text(text, encoding="utf-8", newline="")
    found = prepared(paths, BYTE, heldout={"share": 0.2, "by": "document"})
    train, heldout = (text_of(half, found.tokenizer) for half in (found.train, found.heldout))
    assert sorted(train + heldout) == sorted(texts)
    assert (found.train.counts.documents, found.heldout.counts.documents) == (len(train), len(heldout))


def test_the_second_time_nothing_is_trained_or_encoded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(source)
    monkeypatch.setattr(Tokenizer, "encode_pieces", no_work)
    monkeypatch.setattr(training, "_model", no_work)
    second = prepared(source)
    assert second.fingerprint == first.fingerprint
    assert np.array_equal(second.train.tokens, first.train.tokens)
    assert np.array_equal(second.heldout.tokens, first.heldout.tokens)


def test_the_same_text_elsewhere_is_the_same_text(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(source)
    moved = tmp_path / "moved.md"
    source.rename(moved)
    monkeypatch.setattr(Tokenizer, "encode_pieces", no_work)
    assert prepared(moved).fingerprint == first.fingerprint


@pytest.mark.parametrize("at", [0, 100, 17_999, 18_000, 19_999])
def test_one_changed_byte_anywhere_gives_new_tokens(source: Path, at: int) -> None:
    before = prepared(source, BYTE)
    stamp = source.stat()
    content = bytearray(source.read_bytes())
    content[at] = ord("~") if content[at] != ord("~") else ord("|")
    source.write_bytes(bytes(content))
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # neither the size nor the time tells
    after = prepared(source, BYTE)
    assert after.fingerprint != before.fingerprint
    told = "".join(text_of(after.train, after.tokenizer) + text_of(after.heldout, after.tokenizer))
    assert told.encode() == bytes(content)


def test_any_change_of_split_or_tokenizer_gives_new_tokens(source: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("another text altogether, held out as it is")
    found = [
        prepared(source),
        prepared(source, heldout={"share": 0.2, "by": "tail"}),
        prepared(source, heldout=str(tmp_path / "other.txt")),
        prepared(source, BPE.model_copy(update={"vocab_size": 301})),
        prepared(source, BPE.model_copy(update={"split": "gpt2"})),
        prepared(source, CHAR),
        prepared(source, BYTE),
        prepared([source, tmp_path / "other.txt"]),
    ]
    assert len({one.fingerprint for one in found}) == len(found)
    for one in found:
        assert one.train.tokens.max() < one.tokenizer.vocab_size


def test_moving_a_document_border_gives_new_tokens(tmp_path: Path) -> None:
    def fingerprint(*texts: str) -> str:
        paths = [tmp_path / f"{number}.txt" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)
        return prepared(paths, BYTE, heldout=0.5).fingerprint

    assert (
        len({fingerprint("one two ", "three four"), fingerprint("one two", " three four"), fingerprint("one two three four")}) == 3
    )


def test_a_tokenizer_file_that_changed_is_not_met_by_old_tokens(source: Path, tmp_path: Path, english: str) -> None:
    path = tmp_path / "tokenizer.json"
    section = FileTokenizer(kind="file", path=str(path))
    prints = []
    for size in (300, 310):
        training.train(BpeTokenizer(kind="bpe", vocab_size=size), [Piece(english[:9000], True)], print).save(path)
        found = prepared(source, section)
        prints.append(found.fingerprint)
        assert found.tokenizer.vocab_size == size
        assert text_of(found.heldout, found.tokenizer) == [english[18_000:20_000]]
    assert len(set(prints)) == 2


def test_the_tokenizer_never_sees_held_out_text(source: Path) -> None:
    text = source.read_text(encoding="utf-8")
    source.write_text(text[:18_000] + "語" * 10 + text[18_010:], encoding="utf-8", newline="")
    reporter = CollectingReporter()
    found = prepared(source, CHAR, reporter)
    assert "語" not in {found.tokenizer.decode([id]) for id in range(found.tokenizer.vocab_size)}
    assert found.heldout.counts.unknown_tokens >= 10
    assert any(f"{found.heldout.counts.unknown_tokens} held-out tokens are unknown" in warning for warning in reporter.warnings)


def test_what_only_the_held_out_half_holds_earns_no_merge(source: Path) -> None:
    text = source.read_text(encoding="utf-8")[:18_000]
    source.write_text(text + "qzqz" * 500, encoding="utf-8", newline="")
    assert not any(b"qz" in token for token in prepared(source).tokenizer.token_bytes)
    source.write_text("qzqz" * 500 + text, encoding="utf-8", newline="")
    assert any(b"qz" in token for token in prepared(source).tokenizer.token_bytes)


def test_held_out_documents_that_are_also_learned_are_warned_of(tmp_path: Path, english: str) -> None:
    lines = [text for text in english[:20_000].split("\n\n") if text]
    for name, content in {"train": lines, "heldout": [lines[3], lines[3], "new", lines[7]]}.items():
        folder = tmp_path / name
        folder.mkdir()
        for number, line in enumerate(content):
            (folder / f"{number:04}.txt").write_text(line, encoding="utf-8")
    reporter = CollectingReporter()
    prepared(tmp_path / "train", BYTE, reporter, heldout=str(tmp_path / "heldout"))
    assert reporter.warnings == ["3 of 4 held-out documents also occur in training; held-out numbers will flatter"]
    reporter = CollectingReporter()
    (tmp_path / "heldout/0000.txt").write_text("x")
    prepared(tmp_path / "heldout", BYTE, reporter, heldout={"share": 0.5, "by": "document"})
    assert reporter.warnings == []


def test_a_cut_document_and_the_sizes_are_noted(source: Path) -> None:
    reporter = CollectingReporter()
    prepared(source, BYTE, reporter)
    assert "text: 18,000 characters in 1 document to learn, 2,000 in 1 document held out (10% by tail)" in reporter.notes
    assert "the held-out half begins inside a document, which is cut in two" in reporter.notes


@pytest.mark.parametrize("interrupted", ["train", "heldout"])
def test_an_interrupted_encoding_leaves_nothing_that_counts_as_whole(
    source: Path, cache: Path, interrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_pieces = Tokenizer.encode_pieces
    calls = 0

    def stopped(self: Tokenizer, pieces: Iterable[Piece]) -> Iterator[tuple[np.ndarray, bool]]:
        nonlocal calls
        calls += 1
        for ids, starts in encode_pieces(self, pieces):
            if calls == (1 if interrupted == "train" else 2):
                yield ids[:100], starts
                raise KeyboardInterrupt
            yield ids, starts

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_pieces", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepared(source)
    left = {path.name for path in (cache / "tokens").rglob("*") if path.is_file()}
    assert left == (set() if interrupted == "train" else {"train.npy", "train.json"})
    found = prepared(source)
    assert "".join(text_of(found.train, found.tokenizer) + text_of(found.heldout, found.tokenizer)) == source.read_text(
        encoding="utf-8"
    )


def test_tokens_without_their_note_are_written_again(source: Path) -> None:
    first = prepared(source)
    expected = first.train.tokens.tolist()
    (first.folder / "train.json").unlink()
    (first.folder / "train.npy").write_bytes(b"half of it")
    assert prepared(source).train.tokens.tolist() == expected


@pytest.mark.parametrize(
    ("content", "settings", "told"),
    [
        ("", {}, "the text is empty"),
        ("x", {}, "one half of the split is empty"),
        ("x" * 100, {"heldout": {"share": 0.1, "by": "document"}}, "none of the 1 documents would be"),
    ],
)
def test_a_text_that_cannot_be_split_is_refused(source: Path, content: str, settings: dict[str, Any], told: str) -> None:
    source.write_text(content)
    with pytest.raises(InputError, match=told):
        prepared(source, BYTE, **settings)


def test_a_tokenizer_without_an_end_of_text_is_refused(source: Path, tmp_path: Path) -> None:
    tokenizers.ByteLevelBPETokenizer().save(str(tmp_path / "t.json"))
    with pytest.raises(InputError, match=r"tokenizer\.path: the tokenizer has no end-of-text token"):
        prepared(source, FileTokenizer(kind="file", path=str(tmp_path / "t.json")))


def test_a_tokenizer_that_would_read_text_as_the_end_of_text_is_refused(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    training.train(BYTE, [], print).save(path)
    described = json.loads(path.read_text())
    described["added_tokens"][0]["special"] = False
    path.write_text(json.dumps(described))
    with pytest.raises(InputError, match=r'tokenizer\.path: a text that holds <\|endoftext\|>.*"special": true'):
        prepared(source, FileTokenizer(kind="file", path=str(path)))


@pytest.mark.parametrize("change", ["more", "less", "another document"])
def test_a_text_that_changes_while_it_is_read_is_refused_and_leaves_no_tokens(
    change: str, tmp_path: Path, english: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": english[start : start + 500]}) for start in range(0, 20_000, 500)]
    source = tmp_path / "text.jsonl"
    source.write_text("\n".join(lines))
    changed = {"more": [*lines, lines[0]], "less": lines[:-1], "another document": [json.dumps({"text": "x"}), *lines]}[change]
    train = training.train

    def train_and_change(*arguments: Any) -> Tokenizer:
        trained = train(*arguments)
        source.write_text("\n".join(changed))
        return trained

    monkeypatch.setattr(training, "train", train_and_change)
    with pytest.raises(InputError, match=r"text\.jsonl: the text changed while it was read"):
        prepared(source)
    assert not list(cache.rglob("*.npy"))


def test_a_text_that_can_be_read_once_is_measured(english: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(english[:20_000].encode())))
    size = measure_text(DataSection.model_validate({"train": "-"}), BYTE, CollectingReporter())
    assert size.train_tokens == len(english[:18_000].encode()) + 2


def test_a_small_text_is_measured_by_preparing_it(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataSection.model_validate({"train": str(source)})
    size = measure_text(data, BPE, CollectingReporter())
    monkeypatch.setattr(Tokenizer, "encode_pieces", no_work)
    found = prepared(source)
    assert (size.vocab_size, size.train_tokens, size.exact) == (300, len(found.train), True)


def test_a_large_text_is_measured_by_a_sample(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = len(prepared(source).train)
    monkeypatch.setattr(estimate, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(estimate, "SAMPLE_CHARACTERS", 9000)
    size = measure_text(DataSection.model_validate({"train": str(source)}), BPE, CollectingReporter())
    assert not size.exact
    assert size.train_tokens == pytest.approx(exact, rel=0.1)
