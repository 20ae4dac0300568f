"""A suggested recipe is valid, suits the text, the machine and the budget, and states a reason for each choice."""

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
from tinylm.interchange import gguf
from tinylm.interchange.hf_architectures import find_family
from tinylm.recipe import loads
from tinylm.recipe.schema import BpeTokenizer, DataSection
from tinylm.reporting import CollectingReporter
from tinylm.suggest import (
    ACCELERATOR_STEPS,
    LONG_CONTEXT,
    LONG_CONTEXT_STEPS,
    MAX_EPOCHS,
    MAX_MEMORIZATION,
    SHORT_CONTEXT,
    SHORT_TEXT_EPOCHS,
    SIZES,
    Budget,
    Suggestion,
    excess_loss,
    suggest_recipe,
)
from tinylm.text import split
from tinylm.text.sources import Corpus, Piece
from tinylm.tokenizer import training

FAST = Processor(350e9, 27e9, 14e9, cores=2, has_amx=True)
SLOW = Processor(35e9, 5e9, 3e9, cores=2, has_amx=False)


def suggested(*sources: Path | str, minutes: float = 5, processor: Processor = FAST, **data: Any) -> Suggestion:
    section = DataSection(train=tuple(map(str, sources)), **data)
    return suggest_recipe(section, Budget(minutes, processor=processor), name="a test")


def width(suggestion: Suggestion) -> int:
    return suggestion.recipe.model.n_embd


def test_more_time_allows_a_larger_model() -> None:
    widths = [width(suggested("builtin:python-docs", minutes=minutes)) for minutes in (0.5, 5, 50)]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


@pytest.mark.parametrize(("share", "warnings"), [(0.97, []), (0.6, [BUSY])])
def test_a_busy_machine_produces_a_warning(share: float, warnings: list[str]) -> None:
    reporter = CollectingReporter()
    processor = replace(FAST, cpu_share=share)
    suggestion = suggest_recipe(DataSection(train=("builtin:python-docs",)), Budget(2, processor=processor), reporter=reporter)
    assert [warning for warning in reporter.warnings if "also occurs" not in warning] == warnings
    assert ("# The machine was busy" in suggestion.yaml) == bool(warnings)


def test_a_slower_machine_leads_to_a_smaller_model_or_fewer_steps() -> None:
    fast, slow = suggested("builtin:python-docs"), suggested("builtin:python-docs", processor=SLOW)
    assert width(slow) <= width(fast)
    assert slow.plan.steps * width(slow) < fast.plan.steps * width(fast)
    assert (fast.plan.precision, slow.plan.precision) == ("bf16", "fp32")


def test_the_vocabulary_grows_with_the_text(tmp_path: Path, english: str) -> None:
    sizes = []
    for times in (1, 8):
        path = tmp_path / f"{times}.txt"
        path.write_text(times * english, encoding="utf-8")
        tokenizer = suggested(path, minutes=60).recipe.tokenizer
        assert isinstance(tokenizer, BpeTokenizer)
        sizes.append(tokenizer.vocab_size)
    assert sizes[0] < sizes[1]


def test_dropout_depends_on_the_number_of_epochs(tmp_path: Path, english: str) -> None:
    path = tmp_path / "short.txt"
    path.write_text(english[:30_000], encoding="utf-8")
    many, few = suggested(path, minutes=10), suggested("builtin:python-docs", minutes=0.15)
    assert many.plan.epochs > 10
    assert few.plan.epochs < 1
    assert many.recipe.model.dropout > few.recipe.model.dropout == 0
    assert many.recipe.model.ngram_embeddings == ()
    assert "n-gram tables" in many.yaml
    assert few.recipe.model.ngram_embeddings == (2, 3)
    assert few.recipe.model.ngram_dropout == 0


def test_a_recipe_for_gguf_uses_only_features_that_llama_cpp_supports() -> None:
    suggestion = suggest_recipe(DataSection(train=("builtin:python-docs",)), Budget(2, processor=FAST), for_gguf=True)
    assert find_family(suggestion.recipe.model, gguf.SUPPORTS) == ("qwen3", ())
    tokenizer = suggestion.recipe.tokenizer
    assert isinstance(tokenizer, BpeTokenizer)
    values = json.loads(training.train(tokenizer, [Piece("a text of 12345 words " * 50, True)], lambda text: None).backend.to_str())
    assert gguf.pretokenizer_name(values["pre_tokenizer"], False) == "qwen2"


def test_a_single_document_is_split_by_tail_and_many_documents_by_document(text_file: Path) -> None:
    assert suggested(text_file).recipe.data.heldout.by == "tail"  # type: ignore[union-attr]
    assert suggested("builtin:python-docs").recipe.data.heldout.by == "document"  # type: ignore[union-attr]


def test_the_held_out_text_is_small_enough_for_the_budget() -> None:
    short, long = (suggested("builtin:python-docs", minutes=minutes) for minutes in (0.2, 10))
    assert short.recipe.data.heldout.share < long.recipe.data.heldout.share  # type: ignore[union-attr]
    assert short.plan.evaluation_seconds <= 0.06 * 12


def test_an_accelerator_allows_a_larger_model_and_larger_batches(tmp_path: Path, english: str) -> None:
    on_cpu = suggested("builtin:python-docs")
    on_gpu = suggest_recipe(DataSection(train=("builtin:python-docs",)), Budget(5, "h100-sxm", devices=2))
    assert width(on_gpu) > width(on_cpu)
    assert on_gpu.plan.hardware == "h100-sxm"
    assert on_gpu.plan.devices == 2
    path = tmp_path / "long.txt"
    path.write_text(12 * english, encoding="utf-8")
    longer = suggest_recipe(DataSection(train=(str(path),)), Budget(60, "h100-sxm", devices=2))
    assert longer.plan.tokens_per_step > on_cpu.plan.tokens_per_step
    assert longer.plan.steps < 2 * ACCELERATOR_STEPS


def test_the_size_can_be_fixed() -> None:
    data = DataSection(train=("builtin:python-docs",))
    small, large = (suggest_recipe(data, Budget(5, processor=FAST), sizes=[size]) for size in ((2, 128), (7, 320)))
    models = [(suggestion.recipe.model.n_layer, suggestion.recipe.model.n_embd) for suggestion in (small, large)]
    assert models == [(2, 128), (7, 320)]
    assert small.plan.epochs > large.plan.epochs
    assert small.recipe.model.dropout >= large.recipe.model.dropout


def test_all_sizes_have_a_head_width_of_64() -> None:
    assert all(layers >= 2 and width % 64 == 0 for layers, width in SIZES)
    assert list(SIZES) == sorted(SIZES)


@pytest.mark.parametrize("accelerator", [None, "rtx-4090"])
def test_long_runs_get_a_longer_context_and_the_same_number_of_tokens_per_step(accelerator: str | None) -> None:
    def suggest(minutes: float, **options: bool) -> Suggestion:
        budget = Budget(minutes, accelerator, processor=None if accelerator else FAST)
        return suggest_recipe(DataSection(train=("builtin:python-docs",)), budget, sizes=[(4, 256)], **options)

    short, long = (1, 10) if accelerator is None else (0.03, 0.2)
    for minutes, options, context in (
        (short, {}, SHORT_CONTEXT),
        (long, {}, LONG_CONTEXT),
        (long, {"fixed_context": True}, SHORT_CONTEXT),
    ):
        plan, model = (suggestion := suggest(minutes, **options)).plan, suggestion.recipe.model
        assert model.context_length == context
        assert (plan.steps >= LONG_CONTEXT_STEPS) == (minutes == long)
        assert accelerator is not None or plan.tokens_per_step == 2048


def test_the_excess_loss_falls_with_tokens_and_parameters() -> None:
    data = DataSection(train=("builtin:python-docs",))
    losses = [excess_loss(suggested("builtin:python-docs", minutes=minutes).plan) for minutes in (1, 2, 4)]
    assert losses == sorted(losses, reverse=True)
    small, large = (suggest_recipe(data, Budget(60, processor=FAST), sizes=[size]).plan for size in ((2, 128), (4, 256)))
    assert excess_loss(large) < excess_loss(small)


def test_larger_models_train_for_fewer_epochs(text_file: Path) -> None:
    data = DataSection(train=(str(text_file),))
    smallest, larger = (suggest_recipe(data, Budget(60, processor=FAST), sizes=[size]) for size in ((2, 128), (3, 128)))
    assert smallest.plan.epochs == pytest.approx(SHORT_TEXT_EPOCHS, rel=0.1)
    parameters = larger.plan.flops / larger.plan.tokens / 6
    assert larger.plan.epochs * parameters / larger.plan.compute_optimal.unique_tokens == pytest.approx(MAX_MEMORIZATION, rel=0.1)
    assert "more passes would overfit" in smallest.yaml


def test_the_yaml_states_reasons_and_loads_as_the_same_recipe(text_file: Path) -> None:
    for suggestion, length in ((suggested(text_file), "epochs"), (suggested("builtin:python-docs", minutes=0.15), "minutes")):
        assert loads(suggestion.yaml) == suggestion.recipe
        for key in ("heldout", "vocab_size", "n_layer", "context_length", "global_batch_size", "optimizer", "schedule", length):
            line = next(line for line in suggestion.yaml.splitlines() if f"{key}:" in line)
            assert "# " in line, line
        assert max(map(len, suggestion.yaml.splitlines())) < 160


@pytest.mark.parametrize("name", ["with space.txt", "colon: hash #.txt", "yes", '"quoted".txt', "1e6", "été.txt"])
def test_file_names_that_yaml_would_read_differently_are_quoted(
    name: str, english: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(english[:20_000], encoding="utf-8")
    assert suggested(name).recipe.data.train == (name,)


def test_the_recipe_contains_the_requested_data_keys(tmp_path: Path, english: str) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"body": english[:20_000]}) + "\n", encoding="utf-8")
    recipe = suggested(tmp_path / "a.jsonl", tmp_path / "b.jsonl", field="body", errors="replace").recipe
    assert recipe.data.train == (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert (recipe.data.field, recipe.data.errors) == ("body", "replace")


def test_standard_input_is_rejected_because_training_reads_it_again() -> None:
    with pytest.raises(InputError, match="cannot be read again"):
        suggested("-")


def test_a_text_or_budget_that_is_too_small_is_rejected(tmp_path: Path, text_file: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short", encoding="utf-8")
    with pytest.raises(InputError, match="not enough to train on"):
        suggested(path)
    with pytest.raises(InputError, match=r"0\.01 minutes and .* tokens are not enough for 50 steps"):
        suggested(text_file, minutes=0.01)


def test_a_short_text_uses_small_batches_to_allow_enough_steps(tmp_path: Path, english: str) -> None:
    path = tmp_path / "short.txt"
    path.write_text(english[:12_000], encoding="utf-8")
    suggestion = suggested(path, minutes=10)
    assert suggestion.plan.epochs <= MAX_EPOCHS + 1
    assert suggestion.plan.steps >= 150
    assert suggestion.plan.tokens_per_step < 1000


@pytest.mark.parametrize("devices", [3, 8, 16])
def test_the_batch_is_a_multiple_of_the_number_of_devices(devices: int, text_file: Path) -> None:
    suggestion = suggest_recipe(DataSection(train=(str(text_file),)), Budget(5, "h100-sxm", devices))
    assert suggestion.recipe.training.global_batch_size % devices == 0


def test_a_text_without_words_has_an_empty_prompt(tmp_path: Path) -> None:
    path = tmp_path / "dna.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list("ACGT"), 200_000)), encoding="utf-8")
    assert suggested(path).recipe.sampling.prompts == ("",)


def test_documents_are_split_by_tail_if_their_hashes_would_hold_out_too_much_or_too_little(tmp_path: Path, english: str) -> None:
    size, methods = len(english) // 20, {}
    for round_ in range(8):
        folder = tmp_path / str(round_)
        folder.mkdir()
        for number in range(20):
            (folder / f"{number}.txt").write_text(f"{round_} {english[number * size : (number + 1) * size]}", encoding="utf-8")
        recipe = suggested(folder).recipe
        methods[round_] = recipe.data.heldout.by  # type: ignore[union-attr]
        with Corpus(recipe.data.train) as corpus:
            hashes = split.scan(corpus.pieces()).hashes
        n_held_out = int((hashes < np.uint64(0.1 * 2**64)).sum())
        assert methods[round_] == ("document" if 1 <= n_held_out <= 3 else "tail"), n_held_out
    assert set(methods.values()) == {"document", "tail"}


def test_the_number_of_epochs_is_limited(text_file: Path) -> None:
    for budget in (Budget(60, processor=FAST), Budget(5, "h100-sxm", 1), Budget(60, "h100-sxm", 8)):
        assert suggest_recipe(DataSection(train=(str(text_file),)), budget).plan.epochs <= MAX_EPOCHS + 0.5
