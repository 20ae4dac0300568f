"""Duplicates are found in blocks of any size, and the first document of each group is kept."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tinylm.curation import duplicates
from tinylm.curation.analysis import analyze
from tinylm.curation.blocks import Block
from tinylm.curation.duplicates import (
    EXACT_CONTAMINATION,
    EXACT_DUPLICATE,
    HELDOUT,
    NEAR_CONTAMINATION,
    NEAR_DUPLICATE,
    TRAIN,
    Decisions,
    decide,
)
from tinylm.curation.minhash import MinHash, shingles
from tinylm.curation.settings import Settings

FILTERS = ("gopher", "c4", "fineweb")


def text_of(seed: int, words: int = 60) -> str:
    """Return random words of letters."""
    generator = random.Random(seed)
    return " ".join("".join(generator.choices("abcdefghij", k=8)) for _ in range(words))


def decided(folder: Path, blocks: Sequence[tuple[str, Sequence[str]]], **options: object) -> Decisions:
    """Analyze blocks of (part, documents), without quality rules and with hardly any documents held out, and decide."""
    options = {"without": FILTERS, "heldout_share": 1e-9, **options}
    settings = Settings(("a",), **options)  # type: ignore[arg-type]
    for number, (part, texts) in enumerate(blocks):
        block = Block(number, part)
        for text in texts:
            block.add("a", text, False)
        analyze(block, settings, folder)
    return decide(folder, len(blocks), settings)


def test_later_copies_are_removed_and_point_to_the_first_document(tmp_path: Path) -> None:
    a, b = text_of(1), text_of(2)
    edited = f"{a} {text_of(3, 4)}"
    found = decided(tmp_path, [("train", [a, b, a]), ("train", [edited, b, text_of(4)])])
    assert found.codes.tolist() == [TRAIN, TRAIN, EXACT_DUPLICATE, NEAR_DUPLICATE, EXACT_DUPLICATE, TRAIN]
    assert found.originals.tolist() == [0, 0, 1, 1, 2, 0]


def test_the_same_words_with_other_punctuation_are_a_near_duplicate(tmp_path: Path) -> None:
    assert decided(tmp_path, [("train", ["One two.", "one, two"])]).codes.tolist() == [TRAIN, NEAR_DUPLICATE]


@pytest.mark.parametrize("contaminated", ["heldout", "train"])
def test_documents_in_both_parts_are_removed_from_one_of_them(contaminated: str, tmp_path: Path) -> None:
    shared, similar, only_train, only_heldout = (text_of(seed) for seed in range(4))
    train = [shared, similar, only_train, shared]
    heldout = [f"{similar} {text_of(9, 4)}", shared, only_heldout]
    found = decided(tmp_path, [("train", train), ("heldout", heldout)], heldout=("b",), contaminated=contaminated)
    if contaminated == "heldout":
        expected = [TRAIN, TRAIN, TRAIN, EXACT_DUPLICATE, NEAR_CONTAMINATION, EXACT_CONTAMINATION, HELDOUT]
        originals = [0, 0, 0, 1, 2, 1, 0]
    else:
        expected = [EXACT_CONTAMINATION, NEAR_CONTAMINATION, TRAIN, EXACT_CONTAMINATION, HELDOUT, HELDOUT, HELDOUT]
        originals = [6, 5, 0, 6, 0, 0, 0]
    assert found.codes.tolist() == expected
    assert found.originals.tolist() == originals


def test_steps_can_be_switched_off(tmp_path: Path) -> None:
    a = text_of(1)
    blocks = [("train", [a, a]), ("heldout", [a])]
    without = (*FILTERS, "contamination")
    found = decided(tmp_path / "1", blocks, heldout=("b",), without=without)
    assert found.codes.tolist() == [TRAIN, EXACT_DUPLICATE, HELDOUT]
    without = (*FILTERS, "exact_duplicates", "near_duplicates")
    assert decided(tmp_path / "2", blocks, heldout=("b",), without=without).codes.tolist() == [TRAIN, TRAIN, HELDOUT]


@pytest.mark.parametrize("keys_per_range", [1 << 22, 7])
def test_groups_equal_those_of_a_simple_search(keys_per_range: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of edited documents, in a random order. Each document is similar to its neighbors in the chain."""
    monkeypatch.setattr(duplicates, "RANGE_KEYS", keys_per_range)
    generator = random.Random(0)
    texts = []
    for chain in range(8):
        words = text_of(100 + chain).split()
        for _ in range(generator.randrange(1, 9)):
            texts.append(" ".join(words))
            words[generator.randrange(len(words))] = text_of(generator.randrange(1 << 30), 1)
    generator.shuffle(texts)
    found = decided(tmp_path, [("train", texts[:10]), ("train", texts[10:11]), ("train", texts[11:])])
    first = first_in_group(MinHash().band_keys([shingles(text) for text in texts]).T.tolist())
    assert len(set(first)) < len(texts) / 2
    assert found.codes.tolist() == [TRAIN if first[i] == i else NEAR_DUPLICATE for i in range(len(texts))]
    assert found.originals.tolist() == [0 if first[i] == i else 1 + first[i] for i in range(len(texts))]


def first_in_group(keys: list[list[int]]) -> list[int]:
    """Return the first document of each document's group, found by comparing all pairs until nothing changes."""
    first = list(range(len(keys)))
    changed = True
    while changed:
        changed = False
        for i, j in itertools.combinations(range(len(keys)), 2):
            if first[i] != first[j] and any(a == b for a, b in zip(keys[i], keys[j], strict=True)):
                first[i] = first[j] = min(first[i], first[j])
                changed = True
    return first


def test_large_groups_are_joined_in_few_steps() -> None:
    """A path of pairs in a random order, for which following the links one by one would take very long."""
    count = 50_000
    groups = duplicates.Groups(count)
    edges = np.random.default_rng(0).permutation(count - 1)
    groups.connect(edges, edges + 1)
    assert not groups.find(np.arange(count)).any()
