"""N-gram embeddings: which tokens a row depends on, and how evenly the hash distributes n-grams over the rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import add_noise_, ids, section
from torch import Tensor

from tinylm.model.cache import KVCache
from tinylm.model.ngrams import NgramEmbedding

MANY_ROWS = 1 << 20
"""With this many rows, a few hundred n-grams almost never collide."""


def _embedding(*orders: int, vocab_size: int, rows: int = MANY_ROWS) -> NgramEmbedding:
    return NgramEmbedding(section(ngram_embeddings=list(orders), ngram_rows=rows, ngram_width=2), vocab_size)


def _every_sequence(length: int, vocab_size: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=length)))


@pytest.mark.parametrize("order", [2, 3, 5])
def test_a_row_depends_only_on_the_tokens_in_the_n_gram(order: int) -> None:
    tokens = ids(60, 16, vocab_size=3)
    indices = _embedding(order, vocab_size=3).row_indices(tokens, order)
    rows_of: dict[tuple[int, ...], set[int]] = {}
    for sequence, t in itertools.product(range(60), range(order - 1, 16)):
        rows_of.setdefault(tuple(tokens[sequence, t - order + 1 : t + 1].tolist()), set()).add(int(indices[sequence, t]))
    assert len(rows_of) > 5
    assert all(len(rows) == 1 for rows in rows_of.values())
    assert len({rows.pop() for rows in rows_of.values()}) == len(rows_of), "different n-grams must have different rows"


def test_positions_before_the_first_token_count_as_a_separate_token() -> None:
    indices = _embedding(3, vocab_size=4).row_indices(_every_sequence(3, 4), 3)
    rows_by_position = [{int(row) for row in indices[:, t]} for t in range(3)]
    assert [len(rows) for rows in rows_by_position] == [4, 4**2, 4**3]
    assert len(set.union(*rows_by_position)) == 4 + 4**2 + 4**3


def test_the_same_tokens_have_different_rows_for_different_orders() -> None:
    tokens = torch.tensor([[1, 1, 1, 1]])
    embedding = _embedding(2, 3, vocab_size=4)
    assert not (embedding.row_indices(tokens, 2) == embedding.row_indices(tokens, 3)).any()


@pytest.mark.parametrize("rows", [1024, 1000, 97])
def test_bigrams_are_spread_evenly_over_the_rows(rows: int) -> None:
    """For all pairs of 300 tokens, Pearson's chi-square is within 6 standard deviations of its mean under a uniform hash."""
    indices = _embedding(2, vocab_size=300, rows=rows).row_indices(_every_sequence(2, 300), 2)[:, 1]
    assert 0 <= int(indices.min()) <= int(indices.max()) < rows
    counts = torch.bincount(indices, minlength=rows).double()
    expected = 300 * 300 / rows
    chi_square = float((counts - expected).square().sum() / expected)
    assert abs(chi_square - (rows - 1)) < 6 * (2 * (rows - 1)) ** 0.5


def test_an_embedding_depends_on_its_n_grams_and_not_on_later_tokens() -> None:
    embedding = add_noise_(_embedding(2, 4, vocab_size=5, rows=64))
    tokens = torch.tensor([[1, 2, 3, 4, 0, 1, 2, 3, 4, 3]])
    with torch.no_grad():
        vectors = embedding(tokens)
        assert vectors.shape == (1, 10, 32)
        assert torch.equal(vectors[0, 3], vectors[0, 8]), "both end with 1 2 3 4"
        assert not torch.allclose(vectors[0, 1], vectors[0, 6]), "the first is at the start of the sequence"
        changed = tokens.clone()
        changed[0, 6:] = 0
        torch.testing.assert_close(embedding(changed)[:, :6], vectors[:, :6], rtol=0, atol=0)


def test_the_cache_returns_all_ids_appended_so_far() -> None:
    cache = KVCache(section(), 1, 16, device=torch.device("cpu"), dtype=torch.float32).row_slice()
    tokens = ids(1, 7)
    for start, end in ((0, 3), (3, 4), (4, 7)):
        assert torch.equal(cache.update_tokens(tokens[:, start:end]), tokens[:, :end])
        cache.advance(end - start)


def test_dropout_drops_whole_vectors_and_preserves_the_mean() -> None:
    settings = {"ngram_embeddings": [2], "ngram_rows": 64, "ngram_width": 4, "ngram_dropout": 0.75, "n_embd": 4, "n_head": 1}
    embedding = NgramEmbedding(section(**settings), 5)
    with torch.no_grad():
        embedding.table.weight.fill_(1.0)
        embedding.projection.weight.copy_(torch.eye(4))
    tokens = ids(200, 50, vocab_size=5)
    torch.manual_seed(0)
    vectors = embedding.train()(tokens)
    assert set(vectors.unique().tolist()) == {0.0, 4.0}
    assert bool((vectors == vectors[..., :1]).all()), "a vector must be dropped or kept as a whole"
    assert abs(float(vectors.detach().mean()) - 1) < 0.05
    assert torch.equal(embedding.eval()(tokens), torch.ones(200, 50, 4))
