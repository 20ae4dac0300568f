"""Test that the sampled overlap of two texts agrees with an exact computation, and that the sample stays small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tinylm.data.ngrams import MIN_LENGTH, open_ngrams, sample_ngrams, save_ngrams
from tinylm.data.shards import Counts, Shard
from tinylm.errors import InputError

END = 0


def shard(*documents: np.ndarray, bytes_per_token: float = 4.0) -> Shard:
    tokens = np.concatenate([[END], *(part for document in documents for part in (document, [END]))]).astype(np.uint16)
    count = sum(map(len, documents))
    return Shard(tokens, Counts(len(documents), int(count * bytes_per_token), count, count, 0), END)


def random_tokens(size: int, seed: int, vocab_size: int = 5000) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, vocab_size, size)


def reference_share(train: Shard, heldout: Shard, length: int) -> float:
    """Return the fraction of held-out n-grams that also occur in the training text, computed with sets.

    A document shorter than `length` is a single n-gram, weighted by its number of tokens.
    """

    def grams(text: Shard) -> list[tuple[int, ...]]:
        found = []
        for start, end in text.documents():
            document = text.tokens[start:end].tolist()
            found += [tuple(document)] * len(document) if len(document) < length else []
            found += [tuple(document[i : i + length]) for i in range(len(document) - length + 1)]
        return found

    known = set(grams(train))
    return float(np.mean([gram in known for gram in grams(heldout)]))


def test_the_overlap_of_a_small_text_is_exact() -> None:
    generator = np.random.default_rng(4)
    documents = [random_tokens(int(size), seed, vocab_size=4) for seed, size in enumerate(generator.integers(1, 60, 80))]
    train = shard(*documents)
    heldout = shard(documents[3], documents[5][:14], *(random_tokens(30, 100 + seed, vocab_size=4) for seed in range(20)))
    overlap = sample_ngrams(train).overlap(heldout)
    assert overlap is not None
    assert overlap.share == pytest.approx(reference_share(train, heldout, MIN_LENGTH))
    assert 0 < overlap.share < 1


def test_a_text_overlaps_completely_with_itself_and_not_at_all_with_another_text() -> None:
    train = shard(random_tokens(3000, 1), random_tokens(5, 2))
    sample = sample_ngrams(train)
    overlap, none = sample.overlap(train), sample.overlap(shard(random_tokens(3000, 3), random_tokens(5, 4)))
    assert overlap is not None
    assert none is not None
    assert (overlap.share, none.share) == (1, 0)


def test_ngrams_do_not_cross_documents() -> None:
    text = random_tokens(40, 1)
    overlap = sample_ngrams(shard(text)).overlap(shard(text[:20], text[20:]))
    assert overlap is not None
    assert overlap.share == 1
    crossing = sample_ngrams(shard(text[:20], text[20:])).overlap(shard(text[14:26]))
    assert crossing is not None
    assert crossing.share == 0


def test_the_sample_needs_at_most_a_byte_per_token_and_its_estimate_is_accurate() -> None:
    text = random_tokens(400_000, 1)
    sample = sample_ngrams(shard(text))
    assert sample.hashes.nbytes <= 1.02 * len(text)
    mixed = np.concatenate([text[5000:35_000], random_tokens(70_000, 2)])
    overlap = sample.overlap(shard(mixed))
    assert overlap is not None
    assert overlap.share == pytest.approx(0.3, abs=0.015)
    assert overlap.sampled == pytest.approx(len(mixed) / 4, rel=0.05)


def test_the_sample_of_a_huge_text_stays_below_17_megabytes() -> None:
    part = shard(random_tokens(200_000, 1))
    for tokens in (20_000_000, 3_000_000_000):
        huge = Shard(part.tokens, Counts(1, 4 * tokens, tokens, tokens, 0), END)  # contains only 200,000 of the tokens
        sample = sample_ngrams(huge)
        assert len(sample.hashes) == pytest.approx(200_000 / sample.rate, rel=0.2)
        assert 15e6 < 4 * tokens / sample.rate < 17e6


def test_unrelated_texts_have_almost_no_overlap() -> None:
    overlap = sample_ngrams(shard(random_tokens(400_000, 1))).overlap(shard(random_tokens(400_000, 2)))
    assert overlap is not None
    assert overlap.share < 0.0005


def test_ngrams_are_longer_if_tokens_are_shorter() -> None:
    text = random_tokens(500, 1, vocab_size=90)
    assert sample_ngrams(shard(text, bytes_per_token=1)).length == 40
    assert sample_ngrams(shard(text, bytes_per_token=2)).length == 20
    assert sample_ngrams(shard(text, bytes_per_token=5)).length == MIN_LENGTH


def test_a_sample_can_be_saved_and_opened_and_damage_is_reported(tmp_path: Path) -> None:
    train, file = shard(random_tokens(2000, 1)), tmp_path / "ngrams.safetensors"
    sample = sample_ngrams(train)
    save_ngrams(sample, file)
    opened = open_ngrams(file)
    assert opened.overlap(train) == sample.overlap(train)
    for content in (file.read_bytes()[:50], b"", b"\xff" * 200):
        file.write_bytes(content)
        with pytest.raises(InputError, match="the n-grams are missing or damaged"):
            open_ngrams(file)
