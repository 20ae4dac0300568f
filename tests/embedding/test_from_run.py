"""Vectors out of a run are its tables, and in context the mean over what a plain forward pass gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tinylm.embedding.from_run import contextual, static
from tinylm.embedding.text import token_names
from tinylm.errors import InputError
from tinylm.run import Run

CPU = torch.device("cpu")


def test_input_and_output_are_the_tables_of_the_checkpoint(tiny_run: Run) -> None:
    network = tiny_run.network(tiny_run.checkpoint(), CPU)
    for which, table in (("input", network.embedding.weight), ("output", network.head.weight)):
        vectors = static(tiny_run, tiny_run.checkpoint(), which)
        assert vectors.matrix.tobytes() == table.detach().numpy().tobytes()
        assert list(vectors.names) == token_names(tiny_run.tokenizer)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_contextual_is_the_mean_over_occurrences(tiny_run: Run, tmp_path: Path, layer: int) -> None:
    """A text of one window: one forward pass, whose blocks are followed by hand."""
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
    found = contextual(tiny_run, tiny_run.checkpoint(), [str(tmp_path / "text.txt")], layer=layer)
    names = token_names(tiny_run.tokenizer)
    state = states[layer][0, 1:].numpy()
    for id in set(ids):
        row = found.index[names[id]]
        places = [place for place, one in enumerate(ids) if one == id]
        np.testing.assert_allclose(found.matrix[row], state[places].mean(axis=0), atol=1e-5)
        assert found.counts is not None
        assert found.counts[row] == len(places)
    assert len(found) == len(set(ids))


def test_every_token_of_a_long_text_is_met_once(tiny_run: Run, text_file: Path, tmp_path: Path) -> None:
    text = text_file.read_text()[:3000]
    (tmp_path / "text.txt").write_text(text)
    found = contextual(tiny_run, tiny_run.checkpoint(), [str(tmp_path / "text.txt")])
    counts = np.bincount(tiny_run.tokenizer.encode(text))
    assert found.counts is not None
    assert sorted(found.counts) == sorted(counts[counts > 0])
    few = contextual(tiny_run, tiny_run.checkpoint(), [str(tmp_path / "text.txt")], min_count=20)
    assert sorted(few.names) == sorted(name for name, count in zip(found.names, found.counts, strict=True) if count >= 20)


def test_words_are_means_over_their_tokens(tiny_run: Run, tmp_path: Path) -> None:
    text = "The documentation, the Documentation; documentation's"
    (tmp_path / "text.txt").write_text(text)
    found = contextual(tiny_run, tiny_run.checkpoint(), [str(tmp_path / "text.txt")], words=True)
    assert set(found.names) == {"the", "documentation", "documentation's"}
    assert not found.byte_mapped
    pieces = contextual(tiny_run, tiny_run.checkpoint(), [str(tmp_path / "text.txt")])
    assert pieces.counts is not None
    assert found.counts is not None
    signs = sum(count for name, count in zip(pieces.names, pieces.counts, strict=True) if name in (",", ";", "Ġ"))
    assert found.counts.sum() == pieces.counts.sum() - signs


def test_what_is_not_there(tiny_run: Run, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the model has 2 blocks, so 0 to 2"):
        contextual(tiny_run, tiny_run.checkpoint(), [str(text_file)], layer=3)
    (tmp_path / "text.txt").write_text("one two three")
    with pytest.raises(InputError, match="nothing in this text occurs 1000 times"):
        contextual(tiny_run, tiny_run.checkpoint(), [str(tmp_path / "text.txt")], min_count=1000)
