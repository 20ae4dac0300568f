"""Test that text is encoded once, stale tokens are never used, and the tokenizer is trained only on the training split."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from tinylm.data import estimate
from tinylm.data.estimate import estimate_text_size
from tinylm.data.prepare import PreparedText, prepare
from tinylm.data.shards import Shard
from tinylm.errors import InputError
from tinylm.recipe.schema import BpeTokenizer, ByteTokenizer, CharTokenizer, DataSection, FileTokenizer, TokenizerSection
from tinylm.reporting import CollectingReporter
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training

BPE = BpeTokenizer(kind="bpe", vocab_size=300)
CHAR = CharTokenizer(kind="char")
NGRAMS = ("train-ngrams.safetensors", "train-ngrams.safetensors.sha256")
BYTE = ByteTokenizer(kind="byte")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path, english: str) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(english[:20_000], encoding="utf-8", newline="")
    return path


def train_part(english: str) -> str:
    """Return the training split of `source`, which ends at the blank line nearest to 90% of the text."""
    return english[: min((match.end() for match in re.finditer("\n\n+", english[:20_000])), key=lambda end: abs(end - 18_000))]


def prepare_files(
    source: Path | list[Path], section: TokenizerSection = BPE, reporter: CollectingReporter | None = None, **settings: Any
) -> PreparedText:
    train = [str(path) for path in (source if isinstance(source, list) else [source])]
    return prepare(DataSection.model_validate({"train": train, **settings}), section, reporter or CollectingReporter())


def texts_of(shard: Shard, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(shard.tokens[start:end].tolist()) for start, end in shard.documents()]


def fail_if_called(*_: object, **__: object) -> Iterator[object]:
    raise AssertionError("the result should come from the cache")


@pytest.mark.parametrize("section", [BPE, CHAR, BYTE])
def test_the_tokens_of_both_splits_decode_to_the_text(source: Path, section: TokenizerSection, english: str) -> None:
    data = prepare_files(source, section)
    (train,), (heldout,) = (texts_of(shard, data.tokenizer) for shard in (data.train, data.heldout))
    assert train == train_part(english)
    assert section is CHAR or heldout == english[len(train) : 20_000]
    assert data.heldout.counts.characters == 20_000 - len(train)
    assert data.train.counts.bytes == len(train.encode())


def test_documents_stay_separate(tmp_path: Path, english: str) -> None:
    texts = [text for text in english[:30_000].split("\n\n") if text]
    paths = []
    for number, text in enumerate(texts):
        paths.append(tmp_path / f"{number:04}.txt")
        paths[-1].write_text(text, encoding="utf-8", newline="")
    data = prepare_files(paths, BYTE, heldout={"share": 0.2, "by": "document"})
    train, heldout = (texts_of(shard, data.tokenizer) for shard in (data.train, data.heldout))
    assert sorted(train + heldout) == sorted(texts)
    assert (data.train.counts.documents, data.heldout.counts.documents) == (len(train), len(heldout))


def test_preparing_a_text_again_uses_the_cached_tokenizer_and_tokens(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_files(source)
    monkeypatch.setattr(Tokenizer, "encode_pieces", fail_if_called)
    monkeypatch.setattr(training, "train", fail_if_called)
    second = prepare_files(source)
    assert second.fingerprint == first.fingerprint
    assert np.array_equal(second.train.tokens, first.train.tokens)
    assert np.array_equal(second.heldout.tokens, first.heldout.tokens)


def test_moving_a_file_does_not_invalidate_its_cached_tokens(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_files(source)
    moved = tmp_path / "moved.md"
    source.rename(moved)
    monkeypatch.setattr(Tokenizer, "encode_pieces", fail_if_called)
    assert prepare_files(moved).fingerprint == first.fingerprint


@pytest.mark.parametrize("position", [0, 100, 17_999, 18_000, 19_999])
def test_changing_any_byte_invalidates_the_cached_tokens(source: Path, position: int) -> None:
    before = prepare_files(source, BYTE)
    stat = source.stat()
    content = bytearray(source.read_bytes())
    content[position] = ord("~") if content[position] != ord("~") else ord("|")
    source.write_bytes(bytes(content))
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # keep the size and the modification time
    after = prepare_files(source, BYTE)
    assert after.fingerprint != before.fingerprint
    decoded = "".join(texts_of(after.train, after.tokenizer) + texts_of(after.heldout, after.tokenizer))
    assert decoded.encode() == bytes(content)


def test_changing_the_split_or_the_tokenizer_invalidates_the_cached_tokens(source: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("a different text, held out completely")
    variants = [
        prepare_files(source),
        prepare_files(source, heldout={"share": 0.2, "by": "tail"}),
        prepare_files(source, heldout=str(tmp_path / "other.txt")),
        prepare_files(source, BPE.model_copy(update={"vocab_size": 301})),
        prepare_files(source, BPE.model_copy(update={"split": "gpt2"})),
        prepare_files(source, CHAR),
        prepare_files(source, BYTE),
        prepare_files([source, tmp_path / "other.txt"]),
    ]
    assert len({data.fingerprint for data in variants}) == len(variants)
    for data in variants:
        assert data.train.tokens.max() < data.tokenizer.vocab_size


def test_moving_a_document_boundary_invalidates_the_cached_tokens(tmp_path: Path) -> None:
    def fingerprint(*texts: str) -> str:
        paths = [tmp_path / f"{number}.txt" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)
        return prepare_files(paths, BYTE, heldout=0.5).fingerprint

    assert (
        len({fingerprint("one two ", "three four"), fingerprint("one two", " three four"), fingerprint("one two three four")}) == 3
    )


def test_changing_a_tokenizer_file_invalidates_the_cached_tokens(source: Path, tmp_path: Path, english: str) -> None:
    path = tmp_path / "tokenizer.json"
    section = FileTokenizer(kind="file", path=str(path))
    fingerprints = []
    for size in (300, 310):
        training.train(BpeTokenizer(kind="bpe", vocab_size=size), [Piece(english[:9000], True)], print).save(path)
        data = prepare_files(source, section)
        fingerprints.append(data.fingerprint)
        assert data.tokenizer.vocab_size == size
        assert texts_of(data.heldout, data.tokenizer) == [english[len(train_part(english)) : 20_000]]
    assert len(set(fingerprints)) == 2


def test_the_tokenizer_is_not_trained_on_held_out_text(source: Path) -> None:
    text = source.read_text(encoding="utf-8")
    source.write_text(text[:18_500] + "語" * 10 + text[18_510:], encoding="utf-8", newline="")
    reporter = CollectingReporter()
    data = prepare_files(source, CHAR, reporter)
    assert "語" not in {data.tokenizer.decode([id]) for id in range(data.tokenizer.vocab_size)}
    assert data.heldout.counts.unknown_tokens >= 10
    assert any(f"{data.heldout.counts.unknown_tokens} held-out tokens are unknown" in warning for warning in reporter.warnings)


def test_bpe_learns_no_merges_from_held_out_text(source: Path) -> None:
    text = source.read_text(encoding="utf-8")[:18_000]
    source.write_text(text + "qzqz" * 500, encoding="utf-8", newline="")
    assert not any(b"qz" in token for token in prepare_files(source).tokenizer.token_bytes)
    source.write_text("qzqz" * 500 + text, encoding="utf-8", newline="")
    assert any(b"qz" in token for token in prepare_files(source).tokenizer.token_bytes)


def test_held_out_documents_that_also_occur_in_the_training_text_cause_a_warning(tmp_path: Path, english: str) -> None:
    lines = [text for text in english[:20_000].split("\n\n") if text]
    for name, content in {"train": lines, "heldout": [lines[3], lines[3], "new", lines[7]]}.items():
        folder = tmp_path / name
        folder.mkdir()
        for number, line in enumerate(content):
            (folder / f"{number:04}.txt").write_text(line, encoding="utf-8")
    reporter = CollectingReporter()
    prepare_files(tmp_path / "train", BYTE, reporter, heldout=str(tmp_path / "heldout"))
    repeated, overlap = reporter.warnings
    assert repeated == "3 of 4 held-out documents also occur in the training text, so the held-out scores will be too optimistic"
    assert overlap.endswith("in the training text (sequences of 40 tokens), so the scores are better than on new text")
    reporter = CollectingReporter()
    (tmp_path / "heldout/0000.txt").write_text("x")
    prepare_files(tmp_path / "heldout", BYTE, reporter, heldout={"share": 0.5, "by": "document"})
    assert not any("also occur" in warning for warning in reporter.warnings)


def test_split_sizes_and_a_document_cut_in_two_are_reported(source: Path) -> None:
    reporter = CollectingReporter()
    prepare_files(source, BYTE, reporter)
    size = len(train_part(source.read_text(encoding="utf-8")))
    assert (
        f"text: {size:,} characters in 1 document for training, {20_000 - size:,} in 1 document held out (10% by tail)"
        in reporter.notes
    )
    assert "the split cuts a document in two; the held-out text starts inside it" in reporter.notes


@pytest.mark.parametrize("interrupted", ["train", "heldout"])
def test_an_interrupted_encoding_leaves_no_partial_tokens(
    source: Path, cache: Path, interrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_pieces = Tokenizer.encode_pieces
    calls = 0

    def interrupted_encode(self: Tokenizer, pieces: Iterable[Piece]) -> Iterator[tuple[np.ndarray, bool]]:
        nonlocal calls
        calls += 1
        for ids, starts in encode_pieces(self, pieces):
            if calls == (1 if interrupted == "train" else 2):
                yield ids[:100], starts
                raise KeyboardInterrupt
            yield ids, starts

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_pieces", interrupted_encode)
        with pytest.raises(KeyboardInterrupt):
            prepare_files(source)
    remaining = {path.name for path in (cache / "tokens").rglob("*") if path.is_file()}
    assert remaining == (set() if interrupted == "train" else {"train.npy", "train.json", *NGRAMS})
    data = prepare_files(source)
    assert "".join(texts_of(data.train, data.tokenizer) + texts_of(data.heldout, data.tokenizer)) == source.read_text(
        encoding="utf-8"
    )


def test_tokens_without_their_counts_file_are_encoded_again(source: Path) -> None:
    first = prepare_files(source)
    expected = first.train.tokens.tolist()
    (first.folder / "train.json").unlink()
    (first.folder / "train.npy").write_bytes(b"incomplete")
    assert prepare_files(source).train.tokens.tolist() == expected


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("", {}, "the text is empty"),
        ("x", {}, "the split leaves no training text"),
        ("x" * 100, {"heldout": {"share": 0.1, "by": "document"}}, "documents would be"),
    ],
)
def test_a_text_that_cannot_be_split_is_rejected(source: Path, content: str, settings: dict[str, Any], message: str) -> None:
    source.write_text(content)
    with pytest.raises(InputError, match=message):
        prepare_files(source, BYTE, **settings)


def test_a_tokenizer_without_an_end_of_text_token_is_rejected(source: Path, tmp_path: Path) -> None:
    tokenizers.ByteLevelBPETokenizer().save(str(tmp_path / "t.json"))
    with pytest.raises(InputError, match=r"tokenizer\.path: the tokenizer has no end-of-text token"):
        prepare_files(source, FileTokenizer(kind="file", path=str(tmp_path / "t.json")))


def test_a_tokenizer_that_encodes_text_to_the_end_of_text_token_is_rejected(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    training.train(BYTE, [], print).save(path)
    content = json.loads(path.read_text())
    content["added_tokens"][0]["special"] = False
    path.write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=r'tokenizer\.path: the text <\|endoftext\|> is encoded to the end-of-text token.*"special": true'
    ):
        prepare_files(source, FileTokenizer(kind="file", path=str(path)))


@pytest.mark.parametrize("change", ["more", "less", "another document"])
def test_a_text_that_changes_while_it_is_read_is_rejected_and_leaves_no_tokens(
    change: str, tmp_path: Path, english: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": english[start : start + 500]}) for start in range(0, 20_000, 500)]
    source = tmp_path / "text.jsonl"
    source.write_text("\n".join(lines))
    changed = {"more": [*lines, lines[0]], "less": lines[:-1], "another document": [json.dumps({"text": "x"}), *lines]}[change]
    train = training.train

    def train_and_change_text(*arguments: Any) -> Tokenizer:
        tokenizer = train(*arguments)
        source.write_text("\n".join(changed))
        return tokenizer

    monkeypatch.setattr(training, "train", train_and_change_text)
    with pytest.raises(InputError, match=r"text\.jsonl: the text changed while it was read"):
        prepare_files(source)
    assert not list(cache.rglob("*.npy"))


def test_the_size_of_a_text_from_stdin_is_estimated(english: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(english[:20_000].encode())))
    size = estimate_text_size(DataSection.model_validate({"train": "-"}), BYTE, CollectingReporter())
    assert size.train_tokens == len(train_part(english).encode()) + 2


def test_estimating_the_size_of_a_small_text_fills_the_cache(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = estimate_text_size(DataSection.model_validate({"train": str(source)}), BPE, CollectingReporter())
    monkeypatch.setattr(Tokenizer, "encode_pieces", fail_if_called)
    data = prepare_files(source)
    assert (size.vocab_size, size.train_tokens, size.exact) == (300, len(data.train), True)


def test_the_size_of_a_large_text_is_estimated_from_a_sample(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = len(prepare_files(source).train)
    monkeypatch.setattr(estimate, "EXACT_LIMIT_BYTES", 1000)
    monkeypatch.setattr(estimate, "SAMPLE_CHARACTERS", 9000)
    size = estimate_text_size(DataSection.model_validate({"train": str(source)}), BPE, CollectingReporter())
    assert not size.exact
    assert size.train_tokens == pytest.approx(exact, rel=0.1)


def overlap_warnings(reporter: CollectingReporter) -> list[str]:
    return [warning for warning in reporter.warnings if "also occurs in the training text" in warning]


def unique_text(lines: int, seed: int) -> str:
    """Return lines of random words in which no sequence of words is repeated."""
    words = np.random.default_rng(seed).integers(0, 10_000, (lines, 8)).tolist()
    return "".join(" ".join(f"w{word}" for word in line) + "\n" for line in words)


@pytest.mark.parametrize("section", [BPE, CHAR, BYTE, BPE.model_copy(update={"dropout": 0.3})])
def test_held_out_text_that_occurs_in_the_training_text_causes_a_warning(tmp_path: Path, section: TokenizerSection) -> None:
    text = unique_text(200, 1)
    lines = text.splitlines(keepends=True)
    train, minus_a_line = tmp_path / "train.txt", tmp_path / "minus.txt"
    train.write_text(text)
    minus_a_line.write_text("".join(lines[:90] + lines[91:]))
    cases: list[tuple[list[Path], dict[str, Any]]] = [
        ([train], {"heldout": str(minus_a_line)}),
        ([train, train], {"heldout": {"share": 0.3, "by": "tail"}}),
        ([train], {"heldout": 0.1, "test": str(minus_a_line)}),
    ]
    for sources, settings in cases:
        reporter = CollectingReporter()
        prepare_files(sources, section, reporter, **settings)
        (warning,) = overlap_warnings(reporter)
        percent = re.match(r"(?:more than )?(\d+)% of the (held-out|test) text", warning)
        assert percent is not None
        assert int(percent[1]) >= 88
        assert percent[2] == ("test" if "test" in settings else "held-out")


@pytest.mark.parametrize("section", [BPE, CHAR, BYTE])
def test_new_held_out_text_causes_no_warning(source: Path, section: TokenizerSection) -> None:
    source.write_text(unique_text(300, 1))
    reporter = CollectingReporter()
    prepare_files(source, section, reporter)
    assert reporter.warnings == []


def test_a_test_split_is_held_out_and_encoded(source: Path, tmp_path: Path) -> None:
    text = unique_text(400, 1)
    source.write_text(text)
    data = prepare_files(source, BYTE, heldout=0.2, test=0.1)
    assert data.test is not None
    parts = [texts_of(shard, data.tokenizer) for shard in (data.train, data.heldout, data.test)]
    assert "".join(part for (part,) in parts) == text
    assert [len(part) / len(text) for (part,) in parts] == pytest.approx([0.7, 0.2, 0.1], abs=0.01)
    other = tmp_path / "other.txt"
    other.write_text("a text of its own")
    separate = prepare_files(source, BYTE, heldout=0.2, test=str(other))
    assert separate.test is not None
    assert texts_of(separate.test, separate.tokenizer) == ["a text of its own"]
    assert len({data.fingerprint, separate.fingerprint, prepare_files(source, BYTE, heldout=0.2).fingerprint}) == 3
    heldout_elsewhere = prepare_files(source, BYTE, heldout=str(other), test=0.1)
    assert heldout_elsewhere.test is not None
    assert texts_of(heldout_elsewhere.test, data.tokenizer) == parts[2]


def test_a_split_by_document_that_holds_out_much_less_than_requested_causes_a_warning(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:02}.txt").write_text(unique_text(4 if number else 400, number))
    reporter = CollectingReporter()
    prepare_files(sorted(tmp_path.glob("*.txt")), BYTE, reporter, heldout={"share": 0.3, "by": "document"})
    (warning,) = (warning for warning in reporter.warnings if warning.startswith("data.heldout: `by: document` holds out"))
    assert "instead of 30.0%" in warning
