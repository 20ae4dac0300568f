"""`ChunkIndex` assigns a unique number to each distinct chunk."""

from __future__ import annotations

from tinylm.tokenizer.chunks import ChunkIndex
from tinylm.tokenizer.split_points import SPLIT_POINTS


def test_each_distinct_chunk_has_one_number(english: str) -> None:
    index = ChunkIndex(SPLIT_POINTS["gpt4"])
    text = english[:50_000].encode() + b" " + b"x" * 100 + b" " + b"y" * 24 + b" " + b"y" * 25
    for _ in range(2):
        numbers = index.find(text).tolist()
        assert b"".join(index.chunks[number] for number in numbers) == text
        assert len({*index.chunks}) == len(index.chunks)
    assert {*numbers} == {*range(len(index.chunks))}
    assert index.find(b"").tolist() == []


def test_chunks_with_a_common_prefix_or_trailing_zeros_are_distinguished() -> None:
    index = ChunkIndex(SPLIT_POINTS["whitespace"])
    chunks = [b"a", b"a\0", b"a\0\0", b"x" * 24, b"x" * 25, b"x" * 26, b"x" * 23 + b"y"]
    numbers = [index.find(chunk).tolist() for chunk in (*chunks, *chunks)]
    assert numbers == [[number] for number in (*range(7), *range(7))]
