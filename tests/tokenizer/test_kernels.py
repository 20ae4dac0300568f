"""The numba kernels return exactly the same results as the NumPy code."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tinylm.recipe.schema import BpeTokenizer, WordPieceTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, kernel_loading, kernels, training
from tinylm.tokenizer.chunks import ChunkIndex
from tinylm.tokenizer.split_points import SPLIT_POINTS

UseKernels = Callable[[Any], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> UseKernels:
    """`use(kernels)` makes all modules call the kernels, and `use(None)` makes them run the NumPy code."""

    def choose(module: Any) -> None:
        monkeypatch.setattr(kernel_loading, "kernels_if_worthwhile", lambda n_bytes: module)

    return choose


def sample_texts(english: str) -> Iterator[str]:
    """Yield English text and random strings of letters, digits, ASCII and non-ASCII white space, and non-ASCII characters."""
    rng = random.Random(3)
    yield english[:200_000]
    alphabet = "ab 0.\n\r\t é世🙂\u2003\u00a0\u180e'"
    for length in (1, 2, 3, 50, 3000):
        for _ in range(30):
            yield "".join(rng.choices(alphabet, k=length))
    yield "\n" * 50 + " " * 50 + "x" + "\n   \n" * 20 + "a" * 100 + " \n"


@pytest.mark.parametrize("split", list(SPLIT_POINTS))
def test_kernels_find_the_same_split_points_and_chunks(split: str, use: UseKernels, english: str) -> None:
    split_points = SPLIT_POINTS[split]
    indices = {module: ChunkIndex(split_points) for module in (None, kernels)}
    for text in sample_texts(english):
        encoded = text.encode()
        positions, chunks = [], []
        for module, index in indices.items():
            use(module)
            positions.append(split_points.find(encoded).tolist())
            numbers = index.find(encoded)
            chunks.append([index.chunks[number] for number in numbers.tolist()])
        assert positions[0] == positions[1]
        assert chunks[0] == chunks[1]
        assert b"".join(chunks[1]) == encoded
    distinct = indices[kernels].chunks
    assert len(set(distinct)) == len(distinct), "each distinct chunk must be numbered once"
    assert sorted(distinct) == sorted(indices[None].chunks)
    assert indices[kernels].n_bytes == indices[None].n_bytes


def test_kernels_can_extend_an_index_that_the_numpy_code_started(use: UseKernels, english: str) -> None:
    index = ChunkIndex(SPLIT_POINTS["gpt4"])
    use(None)
    first = index.find(english[:50_000].encode())
    known = list(index.chunks)
    use(kernels)
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
    ids=["bpe", "short tokens", "frequent pairs", "across words", "characters", "wordpiece"],
)
def test_kernels_learn_the_same_vocabulary_and_encode_to_the_same_ids(section: Any, use: UseKernels, english: str) -> None:
    repetitive = "aaaaa aaaa aaa abababab bababa " * 50 + "🙂🙂🙂🙂🙂 " * 20
    pieces = [Piece(english[:300_000], True), Piece(repetitive, True)]
    trained: list[Tokenizer] = []
    for module in (None, kernels):
        use(module)
        trained.append(training.train(section, pieces, lambda warning: None))
    assert trained[0].backend.to_str() == trained[1].backend.to_str()
    use(None)
    by_numpy = np.concatenate([ids for ids, _ in trained[0].encode_pieces([*pieces, *pieces])])
    use(kernels)
    by_kernels = np.concatenate([ids for ids, _ in trained[1].encode_pieces([*pieces, *pieces])])
    assert np.array_equal(by_numpy, by_kernels)
