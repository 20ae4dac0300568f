"""Adding or removing tokens does not change the logits for other tokens."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from tinylm.errors import InputError
from tinylm.evaluation.evaluate_run import evaluate_run
from tinylm.reporting import CollectingReporter
from tinylm.run import Run
from tinylm.tokenizer import vocab_editing
from tinylm.training import vocabulary


def logits(run: Run, text: str) -> torch.Tensor:
    network = run.network(run.checkpoint(), torch.device("cpu"))
    with torch.inference_mode():
        return network(torch.tensor([run.tokenizer.encode(text)]))[0]


def test_an_added_embedding_is_the_mean_of_its_piece_embeddings(tiny_run: Run, tmp_path: Path) -> None:
    edited = vocab_editing.add(tiny_run.tokenizer, ["the for statement"])
    run = vocabulary.write_edited_run(tiny_run, edited, tmp_path / "added")
    old, new = (each_run.network(each_run.checkpoint(), torch.device("cpu")) for each_run in (tiny_run, run))
    pieces = tiny_run.tokenizer.encode("the for statement")
    size = tiny_run.tokenizer.vocab_size
    for before, after in ((old.embedding, new.embedding), (old.head, new.head)):
        assert torch.equal(after.weight[:size], before.weight)
        assert torch.allclose(after.weight[size], before.weight[pieces].mean(0))
    text = "A text without the new token."
    assert torch.equal(logits(run, text)[:, :size], logits(tiny_run, text))
    perplexity = evaluate_run(run).perplexity
    assert perplexity.bytes == evaluate_run(tiny_run).perplexity.bytes
    assert 0 < perplexity.bits_per_byte < 20


def test_removing_a_token_drops_only_its_embedding(tiny_run: Run, tmp_path: Path) -> None:
    edited = vocab_editing.remove(tiny_run.tokenizer, [" the"])
    run = vocabulary.write_edited_run(tiny_run, edited, tmp_path / "removed")
    kept = [old for (old,) in edited.sources]
    text = "A word, or two."
    assert torch.equal(logits(run, text), logits(tiny_run, text)[:, kept])
    assert evaluate_run(run).perplexity.bytes == evaluate_run(tiny_run).perplexity.bytes
    assert run.recipe.tokenizer.path == str(tmp_path / "removed" / "tokenizer.json")


def test_tokens_can_be_added_to_a_run_without_held_out_text(tiny_run: Run, tmp_path: Path) -> None:
    shutil.copytree(tiny_run.path, tmp_path / "imported", ignore=shutil.ignore_patterns("heldout"))
    run = vocabulary.write_edited_run(
        Run.open(tmp_path / "imported"), vocab_editing.add(tiny_run.tokenizer, ["zzz"]), tmp_path / "added"
    )
    assert run.network(run.checkpoint(), torch.device("cpu")).vocab_size == tiny_run.tokenizer.vocab_size + 1
    assert not (run.path / "heldout").exists()


def test_an_existing_folder_is_not_overwritten(tiny_run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        vocabulary.write_edited_run(tiny_run, vocab_editing.add(tiny_run.tokenizer, ["zzz"]), tmp_path)


def test_with_ngram_tables_adding_tokens_warns_and_removing_tokens_is_an_error(tiny_run: Run, tmp_path: Path) -> None:
    model = tiny_run.recipe.model.model_copy(update={"ngram_embeddings": (2,)})
    run = dataclasses.replace(tiny_run)
    run.__dict__["recipe"] = tiny_run.recipe.model_copy(update={"model": model})
    with pytest.raises(InputError, match="n-gram tables of this model are indexed by token ids"):
        vocabulary.write_edited_run(run, vocab_editing.remove(tiny_run.tokenizer, [" the"]), tmp_path / "a")
    reporter = CollectingReporter()
    vocabulary.write_edited_run(run, vocab_editing.add(tiny_run.tokenizer, ["zzz"]), tmp_path / "b", reporter=reporter)
    assert "n-gram tables" in reporter.warnings[0]
