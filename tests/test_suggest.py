"""A proposed recipe is a valid one, fits its text, its machine and its budget, and says why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinylm.cost.cpu import Processor
from tinylm.cost.plan import BUSY
from tinylm.errors import InputError
from tinylm.recipe import loads
from tinylm.recipe.schema import BpeTokenizer, DataSection
from tinylm.reporting import CollectingReporter
from tinylm.suggest import (
    MOST_EPOCHS,
    MOST_LEARNED_BY_HEART,
    PASSES_OF_SHORT_TEXTS,
    SIZES,
    STEPS_ON_ACCELERATORS,
    Budget,
    Proposal,
    excess_loss,
    propose,
)
from tinylm.text import split
from tinylm.text.sources import Corpus

FAST = Processor(350e9, 27e9, 14e9, cores=2, has_amx=True)
SLOW = Processor(35e9, 5e9, 3e9, cores=2, has_amx=False)


def proposed(*sources: Path | str, minutes: float = 5, here: Processor = FAST, **data: Any) -> Proposal:
    section = DataSection(train=tuple(map(str, sources)), **data)
    return propose(section, Budget(minutes, here=here), name="a test")


def width(proposal: Proposal) -> int:
    return proposal.recipe.model.n_embd


def test_more_time_never_means_a_smaller_model() -> None:
    widths = [width(proposed("builtin:python-docs", minutes=minutes)) for minutes in (0.5, 5, 50)]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


@pytest.mark.parametrize(("undisturbed", "warnings"), [(0.97, []), (0.6, [BUSY])])
def test_a_machine_that_was_busy_while_it_was_measured_is_told(undisturbed: float, warnings: list[str]) -> None:
    reporter = CollectingReporter()
    here = replace(FAST, undisturbed=undisturbed)
    proposal = propose(DataSection(train=("builtin:python-docs",)), Budget(2, here=here), reporter=reporter)
    assert reporter.warnings == warnings
    assert ("# The machine was busy" in proposal.yaml) == bool(warnings)


def test_a_slower_machine_gets_a_smaller_model_or_fewer_steps() -> None:
    fast, slow = proposed("builtin:python-docs"), proposed("builtin:python-docs", here=SLOW)
    assert width(slow) <= width(fast)
    assert slow.plan.steps * width(slow) < fast.plan.steps * width(fast)
    assert (fast.plan.precision, slow.plan.precision) == ("bf16", "fp32")


def test_the_vocabulary_grows_with_the_text(tmp_path: Path, english: str) -> None:
    sizes = []
    for times in (1, 8):
        path = tmp_path / f"{times}.txt"
        path.write_text(times * english, encoding="utf-8")
        tokenizer = proposed(path, minutes=60).recipe.tokenizer
        assert isinstance(tokenizer, BpeTokenizer)
        sizes.append(tokenizer.vocab_size)
    assert sizes[0] < sizes[1]


def test_a_text_read_many_times_is_regularized_and_one_read_once_is_not(tmp_path: Path, english: str) -> None:
    path = tmp_path / "short.txt"
    path.write_text(english[:30_000], encoding="utf-8")
    often, once = proposed(path, minutes=10), proposed("builtin:python-docs", minutes=0.2)
    assert often.plan.epochs > 10
    assert once.plan.epochs < 1
    assert often.recipe.model.dropout > once.recipe.model.dropout == 0
    assert often.recipe.model.ngram_embeddings == ()
    assert "tables of n-grams" in often.yaml
    assert once.recipe.model.ngram_embeddings == (2, 3)
    assert once.recipe.model.ngram_dropout == 0


def test_one_document_gives_its_end_and_many_give_whole_ones(text_file: Path) -> None:
    assert proposed(text_file).recipe.data.heldout.by == "tail"  # type: ignore[union-attr]
    assert proposed("builtin:python-docs").recipe.data.heldout.by == "document"  # type: ignore[union-attr]


def test_the_held_out_text_is_no_larger_than_the_budget_lets_it_be_measured() -> None:
    short, long = (proposed("builtin:python-docs", minutes=minutes) for minutes in (0.2, 10))
    assert short.recipe.data.heldout.share < long.recipe.data.heldout.share  # type: ignore[union-attr]
    assert short.plan.evaluation_seconds <= 0.06 * 12


def test_an_accelerator_gets_a_larger_model_and_for_many_steps_larger_batches(tmp_path: Path, english: str) -> None:
    here = proposed("builtin:python-docs")
    there = propose(DataSection(train=("builtin:python-docs",)), Budget(5, "h100-sxm", devices=2))
    assert width(there) > width(here)
    assert there.plan.hardware == "h100-sxm"
    assert there.plan.devices == 2
    path = tmp_path / "long.txt"
    path.write_text(12 * english, encoding="utf-8")
    longer = propose(DataSection(train=(str(path),)), Budget(60, "h100-sxm", devices=2))
    assert longer.plan.tokens_per_step > here.plan.tokens_per_step
    assert longer.plan.steps < 2 * STEPS_ON_ACCELERATORS


def test_a_size_may_be_fixed_and_the_rest_is_chosen_for_it() -> None:
    data = DataSection(train=("builtin:python-docs",))
    small, large = (propose(data, Budget(5, here=FAST), sizes=[size]) for size in ((2, 128), (7, 320)))
    models = [(proposal.recipe.model.n_layer, proposal.recipe.model.n_embd) for proposal in (small, large)]
    assert models == [(2, 128), (7, 320)]
    assert small.plan.epochs > large.plan.epochs
    assert small.recipe.model.dropout >= large.recipe.model.dropout


def test_every_size_of_the_ladder_has_heads_of_64() -> None:
    assert all(layers >= 2 and width % 64 == 0 for layers, width in SIZES)
    assert list(SIZES) == sorted(SIZES)


def test_the_rule_prefers_more_tokens_and_larger_models_where_the_text_lasts() -> None:
    data = DataSection(train=("builtin:python-docs",))
    lacks = [excess_loss(proposed("builtin:python-docs", minutes=minutes).plan) for minutes in (1, 2, 4)]
    assert lacks == sorted(lacks, reverse=True)
    small, large = (propose(data, Budget(60, here=FAST), sizes=[size]).plan for size in ((2, 128), (4, 256)))
    assert excess_loss(large) < excess_loss(small)


def test_the_more_parameters_the_fewer_passes_before_a_text_is_learned_by_heart(text_file: Path) -> None:
    data = DataSection(train=(str(text_file),))
    smallest, larger = (propose(data, Budget(60, here=FAST), sizes=[size]) for size in ((2, 128), (3, 128)))
    assert smallest.plan.epochs == pytest.approx(PASSES_OF_SHORT_TEXTS, rel=0.1)
    parameters = larger.plan.flops / larger.plan.tokens / 6
    assert larger.plan.epochs * parameters / larger.plan.compute_optimal.unique_tokens == pytest.approx(
        MOST_LEARNED_BY_HEART, rel=0.1
    )
    assert "more passes do harm" in smallest.yaml


def test_what_is_written_says_why_and_is_read_back_as_the_same_recipe(text_file: Path) -> None:
    proposal = proposed(text_file)
    assert loads(proposal.yaml) == proposal.recipe
    for key in ("heldout", "vocab_size", "n_layer", "context_length", "global_batch_size", "optimizer", "schedule", "minutes"):
        line = next(line for line in proposal.yaml.splitlines() if f"{key}:" in line)
        assert "# " in line, line
    assert max(map(len, proposal.yaml.splitlines())) < 160


@pytest.mark.parametrize("name", ["with space.txt", "colon: hash #.txt", "yes", '"quoted".txt', "1e6", "été.txt"])
def test_names_that_yaml_would_read_otherwise_survive(
    name: str, english: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(english[:20_000], encoding="utf-8")
    assert proposed(name).recipe.data.train == (name,)


def test_several_sources_a_field_and_odd_bytes_are_kept(tmp_path: Path, english: str) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"body": english[:20_000]}) + "\n", encoding="utf-8")
    recipe = proposed(tmp_path / "a.jsonl", tmp_path / "b.jsonl", field="body", errors="replace").recipe
    assert recipe.data.train == (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert (recipe.data.field, recipe.data.errors) == ("body", "replace")


def test_standard_input_is_refused_because_training_reads_again() -> None:
    with pytest.raises(InputError, match="cannot be read again"):
        proposed("-")


def test_a_text_too_short_and_a_budget_too_small_are_told(tmp_path: Path, text_file: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short", encoding="utf-8")
    with pytest.raises(InputError, match="too few to learn from"):
        proposed(path)
    with pytest.raises(InputError, match=r"0\.01 minutes and .* tokens are not enough for 50 steps"):
        proposed(text_file, minutes=0.01)


def test_a_short_text_is_read_in_small_batches_so_that_there_are_steps_enough(tmp_path: Path, english: str) -> None:
    path = tmp_path / "short.txt"
    path.write_text(english[:12_000], encoding="utf-8")
    proposal = proposed(path, minutes=10)
    assert proposal.plan.epochs <= MOST_EPOCHS + 1
    assert proposal.plan.steps >= 150
    assert proposal.plan.tokens_per_step < 1000


@pytest.mark.parametrize("devices", [3, 8, 16])
def test_every_device_gets_as_many_sequences(devices: int, text_file: Path) -> None:
    proposal = propose(DataSection(train=(str(text_file),)), Budget(5, "h100-sxm", devices))
    assert proposal.recipe.training.global_batch_size % devices == 0


def test_a_text_without_words_has_no_prompt_and_is_looked_through_at_once(tmp_path: Path) -> None:
    path = tmp_path / "dna.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list("ACGT"), 200_000)), encoding="utf-8")
    assert proposed(path).recipe.sampling.prompts == ("",)


def test_documents_whose_hashes_hold_out_too_much_or_nothing_are_cut_at_the_end_instead(tmp_path: Path, english: str) -> None:
    size, found = len(english) // 20, {}
    for round_ in range(8):
        folder = tmp_path / str(round_)
        folder.mkdir()
        for number in range(20):
            (folder / f"{number}.txt").write_text(f"{round_} {english[number * size : (number + 1) * size]}", encoding="utf-8")
        recipe = proposed(folder).recipe
        found[round_] = recipe.data.heldout.by  # type: ignore[union-attr]
        with Corpus(recipe.data.train) as corpus:
            hashes = split.scan(corpus.pieces()).hashes
        held = int((hashes < np.uint64(0.1 * 2**64)).sum())
        assert found[round_] == ("document" if 1 <= held <= 3 else "tail"), held
    assert set(found.values()) == {"document", "tail"}


def test_a_text_is_never_read_more_often_than_is_worth_it(text_file: Path) -> None:
    for budget in (Budget(60, here=FAST), Budget(5, "h100-sxm", 1), Budget(60, "h100-sxm", 8)):
        assert propose(DataSection(train=(str(text_file),)), budget).plan.epochs <= MOST_EPOCHS + 0.5
