"""Embeddings of n-grams: what a row depends on, and how evenly the rows are used."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import ids, roughened, section
from torch import Tensor

from tinylm.model.cache import KeyValueCache
from tinylm.model.ngrams import NgramEmbedding

ROOMY = 1 << 20
"""Rows enough that a few hundred n-grams hardly ever share one."""


def _embedding(*orders: int, vocabulary: int, rows: int = ROOMY) -> NgramEmbedding:
    return NgramEmbedding(section(ngram_embeddings=list(orders), ngram_rows=rows, ngram_width=2), vocabulary)


def _every_sequence(length: int, vocabulary: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))


@pytest.mark.parametrize("order", [2, 3, 5])
def test_a_key_depends_on_the_last_tokens_and_on_nothing_else(order: int) -> None:
    tokens = ids(60, 16, vocabulary=3)
    keys = _embedding(order, vocabulary=3).keys(tokens, order)
    found: dict[tuple[int, ...], set[int]] = {}
    for row, at in itertools.product(range(60), range(order - 1, 16)):
        found.setdefault(tuple(tokens[row, at - order + 1 : at + 1].tolist()), set()).add(int(keys[row, at]))
    assert len(found) > 5
    assert all(len(rows) == 1 for rows in found.values())
    assert len({rows.pop() for rows in found.values()}) == len(found), "different n-grams, different rows"


def test_tokens_missing_before_the_start_are_a_symbol_of_their_own() -> None:
    keys = _embedding(3, vocabulary=4).keys(_every_sequence(3, 4), 3)
    windows = [{int(row) for row in keys[:, at]} for at in range(3)]
    assert [len(rows) for rows in windows] == [4, 4**2, 4**3]
    assert len(set.union(*windows)) == 4 + 4**2 + 4**3


def test_the_same_tokens_have_another_row_in_each_order() -> None:
    tokens = torch.tensor([[1, 1, 1, 1]])
    embedding = _embedding(2, 3, vocabulary=4)
    assert not (embedding.keys(tokens, 2) == embedding.keys(tokens, 3)).any()


@pytest.mark.parametrize("rows", [1024, 1000, 97])
def test_neighbouring_tokens_are_spread_evenly_over_the_rows(rows: int) -> None:
    """All pairs of 300 tokens: Pearson's chi-square stays within 6 standard deviations of an even spread's."""
    keys = _embedding(2, vocabulary=300, rows=rows).keys(_every_sequence(2, 300), 2)[:, 1]
    assert 0 <= int(keys.min()) <= int(keys.max()) < rows
    counts = torch.bincount(keys, minlength=rows).double()
    expected = 300 * 300 / rows
    chi_square = float((counts - expected).square().sum() / expected)
    assert abs(chi_square - (rows - 1)) < 6 * (2 * (rows - 1)) ** 0.5


def test_a_position_gets_one_vector_per_n_gram_and_never_sees_what_follows() -> None:
    embedding = roughened(_embedding(2, 4, vocabulary=5, rows=64))
    tokens = torch.tensor([[1, 2, 3, 4, 0, 1, 2, 3, 4, 3]])
    with torch.no_grad():
        said = embedding(tokens)
        assert said.shape == (1, 10, 32)
        assert torch.equal(said[0, 3], said[0, 8]), "1 2 3 4 twice"
        assert not torch.allclose(said[0, 1], said[0, 6]), "1 2 at the start and after 4 0"
        changed = tokens.clone()
        changed[0, 6:] = 0
        torch.testing.assert_close(embedding(changed)[:, :6], said[:, :6], rtol=0, atol=0)


def test_the_cache_gives_back_all_ids_in_pieces_as_at_once() -> None:
    cache = KeyValueCache(section(), 1, 16, device=torch.device("cpu"), dtype=torch.float32).rows()
    tokens = ids(1, 7)
    for start, end in ((0, 3), (3, 4), (4, 7)):
        assert torch.equal(cache.remember(tokens[:, start:end]), tokens[:, :end])
        cache.advance(end - start)


def test_dropout_leaves_whole_vectors_out_and_keeps_the_mean_while_training() -> None:
    embedding = NgramEmbedding(
        section(ngram_embeddings=[2], ngram_rows=64, ngram_width=4, ngram_dropout=0.75, n_embd=4, n_head=1), vocabulary_size := 5
    )
    with torch.no_grad():
        embedding.table.weight.fill_(1.0)
        embedding.projection.weight.copy_(torch.eye(4))
    tokens = ids(200, 50, vocabulary=vocabulary_size)
    torch.manual_seed(0)
    vectors = embedding.train()(tokens)
    assert set(vectors.unique().tolist()) == {0.0, 4.0}
    assert bool((vectors == vectors[..., :1]).all()), "a vector is there or not, as a whole"
    assert abs(float(vectors.mean()) - 1) < 0.05
    assert torch.equal(embedding.eval()(tokens), torch.ones(200, 50, 4))
