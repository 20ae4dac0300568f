"""The held-out half never meets the training half, and both together are the text."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from tinylm.errors import InputError
from tinylm.text.sources import Piece
from tinylm.text.split import Scan, Split, by_document, by_tail, repeated_documents, scan

Rule = Callable[[Scan, float], Split]


def in_pieces(documents: list[str], size: int) -> list[Piece]:
    return [Piece(text[at : at + size], at == 0) for text in documents for at in range(0, len(text), size)]


def halves(rule: Rule, documents: list[str], share: float, size: int = 7) -> tuple[list[str], list[str]]:
    pieces = in_pieces(documents, size)
    division = rule(scan(pieces), share)
    return joined(division, pieces, "train"), joined(division, pieces, "heldout")


def joined(division: Split, pieces: list[Piece], half: str) -> list[str]:
    found: list[str] = []
    for piece in division.select(pieces, half):
        if piece.starts_document:
            found.append("")
        found[-1] += piece.text
    return found


def paragraphs(english: str) -> list[str]:
    return [text for text in english[:120_000].split("\n\n") if text]


def test_a_scan_counts_what_is_there() -> None:
    documents = ["é🙂", "plain", "plain"]
    found = scan(in_pieces(documents, 3))
    assert (found.documents, found.characters, found.bytes) == (3, 12, len("".join(documents).encode()))
    assert found.lengths.tolist() == [2, 5, 5]
    assert found.hashes[1] == found.hashes[2] != found.hashes[0]


def test_progress_is_told_in_bytes() -> None:
    told: list[int] = []
    scan(in_pieces(["éé", "a"], 1), told.append)
    assert told == [2, 4, 5]


def test_the_fingerprint_depends_on_text_and_document_borders_and_on_nothing_else() -> None:
    prints = {
        scan(in_pieces(documents, 100)).fingerprint
        for documents in (["one two"], ["one", " two"], ["one ", "two"], ["one two", "x"], ["two", "one"], ["one twO"], ["x"])
    }
    assert len(prints) == 7
    assert len({scan(in_pieces(["one two three", "four"], size)).fingerprint for size in (1, 2, 5, 100)}) == 1


@pytest.mark.parametrize("rule", [by_tail, by_document])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_halves_are_disjoint_and_join_to_the_text(english: str, rule: Rule, share: float) -> None:
    documents = paragraphs(english)
    train, heldout = halves(rule, documents, share, size=50)
    assert len(documents) > 300
    if rule is by_tail:
        assert train + heldout == documents
    else:
        assert not set(train) & set(heldout)
        assert [text for text in documents if text in set(train)] == train
        assert [text for text in documents if text in set(heldout)] == heldout
        assert sorted(train + heldout) == sorted(documents)
    measured = sum(map(len, heldout)) if rule is by_tail else len(heldout)
    whole = sum(map(len, documents)) if rule is by_tail else len(documents)
    assert abs(measured / whole - share) < (0.01 if rule is by_tail else 0.06)


def test_the_tail_begins_at_the_border_of_documents_nearest_to_what_was_asked() -> None:
    documents = ["a" * 50, "b" * 38, "c" * 5, "d" * 7]
    assert halves(by_tail, documents, 0.1)[1] == ["c" * 5, "d" * 7], "12 characters are nearer to 10 than 7"
    assert halves(by_tail, documents, 0.08)[1] == ["d" * 7]


def test_one_single_document_is_cut_at_a_character() -> None:
    text = "".join(map(chr, range(200, 1200)))
    for size in (1, 7, 1000):
        assert halves(by_tail, [text], 0.1, size) == ([text[:900]], [text[900:]])
    assert by_tail(scan([Piece(text, True)]), 0.1).cuts_a_document


def test_a_document_is_cut_when_no_border_is_near() -> None:
    documents = ["a" * 10, "b" * 990]
    assert halves(by_tail, documents, 0.1) == (["a" * 10, "b" * 890], ["b" * 100])
    assert not by_tail(scan(in_pieces(["a" * 90, "b" * 10], 9)), 0.1).cuts_a_document


def test_the_tail_of_any_documents_is_a_suffix_near_the_share() -> None:
    drawn = random.Random(1)
    for _ in range(300):
        documents = ["x" * drawn.randint(1, 60) for _ in range(drawn.randint(1, 12))]
        share = drawn.uniform(0.05, 0.95)
        train, heldout = halves(by_tail, documents, share, size=drawn.randint(1, 80))
        whole = "".join(documents)
        assert "".join(train + heldout) == whole
        asked = share * len(whole)
        assert abs(sum(map(len, heldout)) - asked) <= max(0.5 * asked, 1)


def test_equal_documents_go_the_same_way_and_the_text_around_them_changes_nothing(english: str) -> None:
    documents = paragraphs(english)
    unique = list(dict.fromkeys(documents))
    train, heldout = halves(by_document, documents + documents, 0.2)
    assert len(train) + len(heldout) == 2 * len(documents)
    assert not set(train) & set(heldout)
    assert set(halves(by_document, unique[::-1][: len(unique) // 2], 0.2)[1]) == set(heldout) & set(
        unique[::-1][: len(unique) // 2]
    )
    assert set(heldout) <= set(halves(by_document, documents, 0.3)[1]), "a larger share holds out the same documents and more"


@pytest.mark.parametrize(("documents", "share", "told"), [(["a"], 1e-9, "held out"), (["a", "b"], 1 - 1e-9, "left to train on")])
def test_a_split_by_document_that_leaves_a_half_empty_is_refused(documents: list[str], share: float, told: str) -> None:
    with pytest.raises(InputError, match=f"none of the {len(documents)} documents would be {told}") as caught:
        by_document(scan(in_pieces(documents, 5)), share)
    assert "use `by: tail`" in str(caught.value)


def test_repeated_documents_are_counted_on_the_held_out_side() -> None:
    train, heldout = (scan(in_pieces(texts, 3)).hashes for texts in (["a", "b", "b", "c"], ["b", "x", "c", "c"]))
    assert repeated_documents(train, heldout) == 3
    assert repeated_documents(train, np.array([], dtype=np.uint64)) == 0
