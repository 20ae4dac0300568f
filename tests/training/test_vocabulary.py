"""A run with tokens added or removed gives the numbers it gave, for text that does not hold them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from tinylm.errors import InputError
from tinylm.evaluation.measure import measure
from tinylm.reporting import CollectingReporter
from tinylm.run import Run
from tinylm.tokenizer import editing
from tinylm.training import vocabulary


def logits(run: Run, text: str) -> torch.Tensor:
    network = run.network(run.checkpoint(), torch.device("cpu"))
    with torch.inference_mode():
        return network(torch.tensor([run.tokenizer.encode(text)]))[0]


def test_added_rows_are_the_mean_of_the_pieces_and_the_others_stay(tiny_run: Run, tmp_path: Path) -> None:
    edited = editing.add(tiny_run.tokenizer, ["the for statement"])
    run = vocabulary.apply(tiny_run, edited, tmp_path / "added")
    old, new = (r.network(r.checkpoint(), torch.device("cpu")) for r in (tiny_run, run))
    pieces = tiny_run.tokenizer.encode("the for statement")
    size = tiny_run.tokenizer.vocab_size
    for before, after in ((old.embedding, new.embedding), (old.head, new.head)):
        assert torch.equal(after.weight[:size], before.weight)
        assert torch.allclose(after.weight[size], before.weight[pieces].mean(0))
    text = "Nothing of it here, surely."
    assert torch.equal(logits(run, text)[:, :size], logits(tiny_run, text))
    measured = measure(run).perplexity
    assert measured.bytes == measure(tiny_run).perplexity.bytes
    assert 0 < measured.bits_per_byte < 20


def test_removed_rows_are_gone_and_the_others_stay(tiny_run: Run, tmp_path: Path) -> None:
    edited = editing.remove(tiny_run.tokenizer, [" the"])
    run = vocabulary.apply(tiny_run, edited, tmp_path / "removed")
    kept = [old for (old,) in edited.sources]
    text = "A word, or two."
    assert torch.equal(logits(run, text), logits(tiny_run, text)[:, kept])
    assert measure(run).perplexity.bytes == measure(tiny_run).perplexity.bytes
    assert run.recipe.tokenizer.path == str(tmp_path / "removed" / "tokenizer.json")


def test_a_run_without_a_held_out_text_gets_tokens_too(tiny_run: Run, tmp_path: Path) -> None:
    shutil.copytree(tiny_run.path, tmp_path / "imported", ignore=shutil.ignore_patterns("heldout"))
    run = vocabulary.apply(Run.open(tmp_path / "imported"), editing.add(tiny_run.tokenizer, ["zzz"]), tmp_path / "added")
    assert run.network(run.checkpoint(), torch.device("cpu")).vocab_size == tiny_run.tokenizer.vocab_size + 1
    assert not (run.path / "heldout").exists()


def test_a_run_is_never_written_over(tiny_run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        vocabulary.apply(tiny_run, editing.add(tiny_run.tokenizer, ["zzz"]), tmp_path)


def test_tables_that_know_tokens_by_their_ids_allow_adding_with_a_warning_and_no_removing(tiny_run: Run, tmp_path: Path) -> None:
    model = tiny_run.recipe.model.model_copy(update={"ngram_embeddings": (2,)})
    run = dataclasses.replace(tiny_run)
    run.__dict__["recipe"] = tiny_run.recipe.model_copy(update={"model": model})
    with pytest.raises(InputError, match="n-gram tables know tokens by their ids"):
        vocabulary.apply(run, editing.remove(tiny_run.tokenizer, [" the"]), tmp_path / "a")
    reporter = CollectingReporter()
    vocabulary.apply(run, editing.add(tiny_run.tokenizer, ["zzz"]), tmp_path / "b", reporter=reporter)
    assert "n-gram tables" in reporter.warnings[0]
