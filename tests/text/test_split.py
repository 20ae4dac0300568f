"""The training, held-out and test splits are disjoint, and together they form the whole text."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from tinylm.errors import InputError
from tinylm.text.sources import Piece
from tinylm.text.split import Scan, Split, by_document, by_tail, move_cuts_to_lines, repeated_documents, scan

SplitFunction = Callable[[Scan, float], Split]


def in_pieces(documents: list[str], size: int) -> list[Piece]:
    return [Piece(text[start : start + size], start == 0) for text in documents for start in range(0, len(text), size)]


def parts(split_by: SplitFunction, documents: list[str], share: float, size: int = 7) -> tuple[list[str], list[str]]:
    pieces = in_pieces(documents, size)
    split = split_by(scan(pieces), share)
    return joined(split, pieces, "train"), joined(split, pieces, "heldout")


def joined(split: Split, pieces: list[Piece], part: str) -> list[str]:
    texts: list[str] = []
    for piece in split.select(pieces, part):
        if piece.starts_document:
            texts.append("")
        texts[-1] += piece.text
    return texts


def paragraphs(english: str) -> list[str]:
    return [text for text in english[:120_000].split("\n\n") if text]


def test_a_scan_counts_documents_characters_and_bytes() -> None:
    documents = ["é🙂", "plain", "plain"]
    scanned = scan(in_pieces(documents, 3))
    assert (scanned.documents, scanned.characters, scanned.bytes) == (3, 12, len("".join(documents).encode()))
    assert scanned.lengths.tolist() == [2, 5, 5]
    assert scanned.hashes[1] == scanned.hashes[2] != scanned.hashes[0]


def test_progress_is_reported_in_bytes() -> None:
    reported: list[int] = []
    scan(in_pieces(["éé", "a"], 1), reported.append)
    assert reported == [2, 4, 5]


def test_the_fingerprint_depends_only_on_the_text_and_its_division_into_documents() -> None:
    fingerprints = {
        scan(in_pieces(documents, 100)).fingerprint
        for documents in (["one two"], ["one", " two"], ["one ", "two"], ["one two", "x"], ["two", "one"], ["one twO"], ["x"])
    }
    assert len(fingerprints) == 7
    assert len({scan(in_pieces(["one two three", "four"], size)).fingerprint for size in (1, 2, 5, 100)}) == 1


@pytest.mark.parametrize("split_by", [by_tail, by_document])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_the_splits_are_disjoint_and_together_form_the_text(english: str, split_by: SplitFunction, share: float) -> None:
    documents = paragraphs(english)
    train, heldout = parts(split_by, documents, share, size=50)
    assert len(documents) > 300
    if split_by is by_tail:
        assert train + heldout == documents
    else:
        assert not set(train) & set(heldout)
        assert [text for text in documents if text in set(train)] == train
        assert [text for text in documents if text in set(heldout)] == heldout
        assert sorted(train + heldout) == sorted(documents)
    held_out = sum(map(len, heldout)) if split_by is by_tail else len(heldout)
    total = sum(map(len, documents)) if split_by is by_tail else len(documents)
    assert abs(held_out / total - share) < (0.01 if split_by is by_tail else 0.06)


def test_the_tail_starts_with_the_document_nearest_to_the_requested_share() -> None:
    documents = ["a" * 50, "b" * 38, "c" * 5, "d" * 7]
    assert parts(by_tail, documents, 0.1)[1] == ["c" * 5, "d" * 7], "12 held-out characters are nearer to 10 than 7"
    assert parts(by_tail, documents, 0.08)[1] == ["d" * 7]


def test_a_single_document_is_cut_between_characters() -> None:
    text = "".join(map(chr, range(200, 1200)))
    for size in (1, 7, 1000):
        assert parts(by_tail, [text], 0.1, size) == ([text[:900]], [text[900:]])
    assert by_tail(scan([Piece(text, True)]), 0.1).cuts_a_document


def test_a_document_is_cut_if_no_document_starts_near_the_requested_share() -> None:
    documents = ["a" * 10, "b" * 990]
    assert parts(by_tail, documents, 0.1) == (["a" * 10, "b" * 890], ["b" * 100])
    assert not by_tail(scan(in_pieces(["a" * 90, "b" * 10], 9)), 0.1).cuts_a_document


def test_the_tail_of_random_documents_is_a_suffix_near_the_requested_share() -> None:
    generator = random.Random(1)
    for _ in range(300):
        documents = ["x" * generator.randint(1, 60) for _ in range(generator.randint(1, 12))]
        share = generator.uniform(0.05, 0.95)
        train, heldout = parts(by_tail, documents, share, size=generator.randint(1, 80))
        whole = "".join(documents)
        assert "".join(train + heldout) == whole
        requested = share * len(whole)
        assert abs(sum(map(len, heldout)) - requested) <= max(0.5 * requested, 1)


def test_the_split_that_contains_a_document_depends_only_on_its_text(english: str) -> None:
    documents = paragraphs(english)
    unique = list(dict.fromkeys(documents))
    train, heldout = parts(by_document, documents + documents, 0.2)
    assert len(train) + len(heldout) == 2 * len(documents)
    assert not set(train) & set(heldout)
    assert set(parts(by_document, unique[::-1][: len(unique) // 2], 0.2)[1]) == set(heldout) & set(unique[::-1][: len(unique) // 2])
    assert set(heldout) <= set(parts(by_document, documents, 0.3)[1]), "a larger share must hold out a superset"


@pytest.mark.parametrize(("documents", "share", "part"), [(["a"], 1e-9, "held-out"), (["a", "b"], 1 - 1e-9, "training")])
def test_an_empty_split_is_an_error(documents: list[str], share: float, part: str) -> None:
    with pytest.raises(InputError, match=f"the {part} part of the {len(documents)} documents would be empty") as caught:
        by_document(scan(in_pieces(documents, 5)), share)
    assert "use `by: tail`" in str(caught.value)


def test_held_out_documents_that_also_occur_in_the_training_split_are_counted() -> None:
    train, heldout = (scan(in_pieces(texts, 3)).hashes for texts in (["a", "b", "b", "c"], ["b", "x", "c", "c"]))
    assert repeated_documents(train, heldout) == 3
    assert repeated_documents(train, np.array([], dtype=np.uint64)) == 0


def cut_texts(text: str, share: float = 0.1, size: int = 7, test_share: float = 0.0) -> list[str]:
    """Split a single document, move its cuts to line boundaries, and return the training, held-out and test text."""
    pieces = in_pieces([text], size)
    split = move_cuts_to_lines(by_tail(scan(pieces), share, test_share), pieces)
    return ["".join(joined(split, pieces, part)) for part in ("train", "heldout", "test")]


@pytest.mark.parametrize("size", [1, 7, 40, 10_000])
@pytest.mark.parametrize(
    ("unit", "ending"),
    [
        ("one line of text\nand one more\n\n", "\n\n"),
        ("one line of text\r\nand one more\r\n\r\n", "\r\n\r\n"),
        ("a line of a log without blank lines\n", "\n"),
        ("old line ends\r", "\r"),
        ("words without any line ends ", " "),
    ],
)
def test_a_document_is_cut_at_the_best_boundary_near_the_requested_share(unit: str, ending: str, size: int) -> None:
    text = unit * 150
    train, heldout, _ = cut_texts(text, size=size)
    assert train + heldout == text
    assert train.endswith(ending)
    assert not heldout[0].isspace()
    assert abs(len(heldout) - 0.1 * len(text)) <= len(unit)


def test_the_test_split_follows_the_held_out_split_and_starts_at_a_line() -> None:
    text = "".join(f"line {number} of the text\n" for number in range(500))
    train, heldout, test = cut_texts(text, 0.2, 50, test_share=0.1)
    assert train + heldout + test == text
    for part, share in ((train, 0.7), (heldout, 0.2), (test, 0.1)):
        assert part.endswith("\n")
        assert part.startswith("line")
        assert len(part) / len(text) == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("split_by", [by_tail, by_document])
def test_three_splits_are_disjoint_and_together_form_the_text(
    english: str, split_by: Callable[[Scan, float, float], Split]
) -> None:
    documents = list(dict.fromkeys(paragraphs(english)))
    pieces = in_pieces(documents, 50)
    split = split_by(scan(pieces), 0.2, 0.1)
    train, heldout, test = (joined(split, pieces, part) for part in ("train", "heldout", "test"))
    assert sorted([*train, *heldout, *test]) == sorted(documents)
    assert len(heldout) == pytest.approx(0.2 * len(documents), rel=0.5)
    assert len(test) == pytest.approx(0.1 * len(documents), rel=0.5)
    if split_by is by_document:
        assert set(heldout) == set(joined(by_document(scan(pieces), 0.2), pieces, "heldout")), "a test split must not change it"
