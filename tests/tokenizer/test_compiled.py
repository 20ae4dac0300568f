"""The compiled loops give what the array operations give, number for number."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tinylm.recipe.schema import BpeTokenizer, WordPieceTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, chunks, compiled, encoding, merges, splits, training
from tinylm.tokenizer.chunks import ChunkIndex

kernels = pytest.importorskip("tinylm.tokenizer.kernels", reason="needs tinylm[fast]")
ROOMS = (chunks, encoding, merges, splits)
Choose = Callable[[Any], None]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Take the compiled loops, or None: the operations on arrays."""

    def chosen(loops: Any) -> None:
        for room in ROOMS:
            monkeypatch.setattr(room, "kernels", lambda size: loops)

    return chosen


def texts(english: str) -> Iterator[str]:
    """Prose, and characters of every class in short runs: spaces and lines, digits, letters beyond ASCII, wide spaces."""
    drawn = random.Random(3)
    yield english[:200_000]
    alphabet = "ab 0.\n\r\t é世🙂\u2003\u00a0\u180e'"
    for length in (1, 2, 3, 50, 3000):
        for _ in range(30):
            yield "".join(drawn.choices(alphabet, k=length))
    yield "\n" * 50 + " " * 50 + "x" + "\n   \n" * 20 + "a" * 100 + " \n"


@pytest.mark.parametrize("pattern", list(splits.KNOWN))
def test_borders_and_chunks_are_the_same(pattern: str, choose: Choose, english: str) -> None:
    borders = splits.KNOWN[pattern]
    indices = {loops: ChunkIndex(borders) for loops in (None, kernels)}
    for text in texts(english):
        encoded = text.encode()
        found, read = [], []
        for loops, index in indices.items():
            choose(loops)
            found.append(borders.find(encoded).tolist())
            numbers = index.find(encoded)
            read.append([index.chunks[number] for number in numbers.tolist()])
        assert found[0] == found[1]
        assert read[0] == read[1]
        assert b"".join(read[1]) == encoded
    kept = indices[kernels].chunks
    assert len(set(kept)) == len(kept), "none twice"
    assert sorted(kept) == sorted(indices[None].chunks)
    assert indices[kernels].bytes == indices[None].bytes


def test_an_index_goes_on_with_machine_code(choose: Choose, english: str) -> None:
    index = ChunkIndex(splits.KNOWN["gpt4"])
    choose(None)
    first = index.find(english[:50_000].encode())
    known = list(index.chunks)
    choose(kernels)
    assert index.find(english[:50_000].encode()).tolist() == first.tolist()
    assert index.chunks == known
    numbers = index.find(english[:150_000].encode())
    assert b"".join(index.chunks[number] for number in numbers.tolist()) == english[:150_000].encode()
    assert len(set(index.chunks)) == len(index.chunks)


@pytest.mark.parametrize(
    "section",
    [
        BpeTokenizer(kind="bpe", vocab_size=1500),
        BpeTokenizer(kind="bpe", vocab_size=1500, max_token_length=4),
        BpeTokenizer(kind="bpe", vocab_size=4000, min_frequency=30, allow_smaller=True),
        BpeTokenizer(kind="bpe", vocab_size=900, split="none"),
        BpeTokenizer(kind="bpe", vocab_size=700, alphabet="text"),
        WordPieceTokenizer(kind="wordpiece", vocab_size=1500),
    ],
    ids=["bpe", "short tokens", "frequent", "across words", "characters", "wordpiece"],
)
def test_what_is_learned_and_encoded_is_the_same(section: Any, choose: Choose, english: str) -> None:
    repeated = "aaaaa aaaa aaa abababab bababa " * 50 + "🙂🙂🙂🙂🙂 " * 20
    pieces = [Piece(english[:300_000], True), Piece(repeated, True)]
    made: list[Tokenizer] = []
    for loops in (None, kernels):
        choose(loops)
        made.append(training.train(section, pieces, lambda note: None))
    assert made[0].backend.to_str() == made[1].backend.to_str()
    choose(None)
    plain = np.concatenate([ids for ids, _ in made[0].encode_pieces([*pieces, *pieces])])
    choose(kernels)
    fast = np.concatenate([ids for ids, _ in made[1].encode_pieces([*pieces, *pieces])])
    assert np.array_equal(plain, fast)


def test_little_text_does_not_load_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(compiled.sys.modules, "tinylm.tokenizer.kernels")
    monkeypatch.setattr(compiled, "_read", 0)
    assert compiled.kernels(compiled.ENOUGH - 1) is None
    assert compiled.kernels(1) is not None
