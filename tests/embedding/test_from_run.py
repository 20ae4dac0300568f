"""Test that static vectors match a run's tables, and contextual vectors match means over a plain forward pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tinylm.embedding.encoded_text import token_names
from tinylm.embedding.from_run import contextual_vectors, static_vectors
from tinylm.errors import InputError
from tinylm.run import Run

CPU = torch.device("cpu")


def test_static_vectors_are_the_tables_of_the_checkpoint(tiny_run: Run) -> None:
    network = tiny_run.network(tiny_run.checkpoint(), CPU)
    for which, table in (("input", network.embedding.weight), ("output", network.head.weight)):
        vectors = static_vectors(tiny_run, tiny_run.checkpoint(), which)
        assert vectors.matrix.tobytes() == table.detach().numpy().tobytes()
        assert list(vectors.names) == token_names(tiny_run.tokenizer)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_contextual_vectors_are_means_over_occurrences(tiny_run: Run, tmp_path: Path, layer: int) -> None:
    """The text fits into one window, so hooks in a single forward pass provide the reference."""
    text = "The object is the object."
    (tmp_path / "text.txt").write_text(text)
    ids = tiny_run.tokenizer.encode(text)
    network = tiny_run.network(tiny_run.checkpoint(), CPU)
    states = []
    hooks = [block.register_forward_hook(lambda _, __, result: states.append(result[0])) for block in network.blocks]
    hooks.append(network.blocks[0].register_forward_pre_hook(lambda _, arguments: states.append(arguments[0])))
    with torch.no_grad():
        network.hidden(torch.tensor([[tiny_run.tokenizer.end_of_text, *ids]]))
    for hook in hooks:
        hook.remove()
    vectors = contextual_vectors(tiny_run, tiny_run.checkpoint(), [str(tmp_path / "text.txt")], layer=layer)
    names = token_names(tiny_run.tokenizer)
    state = states[layer][0, 1:].numpy()
    for id in set(ids):
        row = vectors.index[names[id]]
        positions = [position for position, other in enumerate(ids) if other == id]
        np.testing.assert_allclose(vectors.matrix[row], state[positions].mean(axis=0), atol=1e-5)
        assert vectors.counts is not None
        assert vectors.counts[row] == len(positions)
    assert len(vectors) == len(set(ids))


def test_every_token_of_a_long_text_is_counted_once(tiny_run: Run, text_file: Path, tmp_path: Path) -> None:
    text = text_file.read_text()[:3000]
    (tmp_path / "text.txt").write_text(text)
    vectors = contextual_vectors(tiny_run, tiny_run.checkpoint(), [str(tmp_path / "text.txt")])
    counts = np.bincount(tiny_run.tokenizer.encode(text))
    assert vectors.counts is not None
    assert sorted(vectors.counts) == sorted(counts[counts > 0])
    frequent = contextual_vectors(tiny_run, tiny_run.checkpoint(), [str(tmp_path / "text.txt")], min_count=20)
    assert sorted(frequent.names) == sorted(name for name, count in zip(vectors.names, vectors.counts, strict=True) if count >= 20)


def test_contextual_word_vectors_count_all_tokens_except_punctuation(tiny_run: Run, tmp_path: Path) -> None:
    text = "The documentation, the Documentation; documentation's"
    (tmp_path / "text.txt").write_text(text)
    vectors = contextual_vectors(tiny_run, tiny_run.checkpoint(), [str(tmp_path / "text.txt")], words=True)
    assert set(vectors.names) == {"the", "documentation", "documentation's"}
    assert not vectors.byte_mapped
    tokens = contextual_vectors(tiny_run, tiny_run.checkpoint(), [str(tmp_path / "text.txt")])
    assert tokens.counts is not None
    assert vectors.counts is not None
    punctuation = sum(count for name, count in zip(tokens.names, tokens.counts, strict=True) if name in (",", ";", "Ġ"))
    assert vectors.counts.sum() == tokens.counts.sum() - punctuation


def test_a_missing_layer_and_a_text_without_frequent_tokens_are_errors(tiny_run: Run, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be from 0 to 2, the number of blocks"):
        contextual_vectors(tiny_run, tiny_run.checkpoint(), [str(text_file)], layer=3)
    (tmp_path / "text.txt").write_text("one two three")
    with pytest.raises(InputError, match="no tokens in this text occur 1000 times or more"):
        contextual_vectors(tiny_run, tiny_run.checkpoint(), [str(tmp_path / "text.txt")], min_count=1000)
