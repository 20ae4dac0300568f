"""Names and notations from other programs produce a hint with the tinylm name or notation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tinylm_cli.app import COMMANDS

from tinylm import hints
from tinylm.recipe import RecipeError, loads_any
from tinylm.recipe.embeddings import EmbeddingRecipe
from tinylm.recipe.schema import Recipe
from tinylm.recipe.sections import all_keys

MINIMAL = "data: {train: a.txt}\ntraining: {steps: 1}\n"
MISTAKES = {
    "training.batch_size=4": "did you mean global_batch_size?",
    "training.lr=1e-3": "did you mean training.optimizer.lr?",
    "optimizer.learning_rate=1e-3": "did you mean training.optimizer.lr?",
    "lr=1e-3": "did you mean training.optimizer.lr?",
    "model.hidden_size=64": "did you mean n_embd?",
    "model.numLayers=2": "did you mean n_layer?",
    "model.block-size=2": "did you mean context_length?",
    "model.vocab_size=300": "did you mean tokenizer.vocab_size?",
    "training.context_length=8": "did you mean model.context_length?",
    "evaluation.steps=5": "did you mean every?",
    "max_iters=5": "did you mean training.steps?",
    "training.grad_clip=1": "did you mean clip_grad_norm?",
    "gradient_accumulation_steps=4": "a step has global_batch_size / micro_batch_size micro-batches",
    "training.device=cpu": "choose the device with --device",
    "model.n_lyer=2": "did you mean n_layer?",
    "modle={n_layer: 2}": "did you mean model?",
    "optimizer={learning_rate: 1e-3}": "did you mean training.optimizer.lr?",
    "training.minutes=5m": "write 5)",
    "training.minutes=2h": "write 120)",
    "training.minutes=90s": "write 1.5)",
    "training.steps=1k": "write 1000)",
    "training.steps=1,000": "write 1000)",
    "training.tokens=10M": "write 10000000)",
    "training.tokens=0.5 billion": "write 500000000)",
    "data.heldout.share=10%": "write 0.1)",
    "training.schedule.warmup=5%": "write 0.05)",
    "training.precision=float16": "did you mean fp16?",
    "training.precision=BF16": "did you mean bf16?",
    "training.optimizer=adam": "did you mean adamw?",
    "training.schedule=cosine_decay": "did you mean cosine?",
    "model.position=rotary": "did you mean rope?",
    "model.norm=rms": "did you mean rmsnorm?",
    "tokenizer=gpt2": "{kind: bpe, split: gpt2} trains one like GPT-2's",
    "tokenizer.kind=sentencepiece": "did you mean unigram?",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_recipe_key_or_value_from_another_program_produces_a_hint(override: str) -> None:
    with pytest.raises(RecipeError) as caught:
        loads_any(MINIMAL, [override], check_files=False)
    assert MISTAKES[override] in str(caught.value), str(caught.value)
    assert str(caught.value).startswith(f"--set {override}: ")


def test_the_error_for_several_sources_in_one_string_shows_how_to_write_a_list(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=re.escape("data.train: a.log,b.txt: no such file or folder (write several as a list: [a.log, b.txt])")
    ):
        loads_any(MINIMAL, ["data.train=a.log,b.txt"])


def test_hints_refer_to_keys_and_commands_that_exist() -> None:
    known = {*all_keys(Recipe), *all_keys(EmbeddingRecipe)}
    assert known >= {*hints.RECIPE_KEYS, *hints.RECIPE_KEYS_IN_SECTION.values()}
    assert {*COMMANDS} >= {*hints.COMMANDS, *hints.ARGUMENTS}
    for command, others in hints.COMMANDS.items():
        assert not {*COMMANDS} & {*others.split()}, command


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("generate", "sample"), ("list", "runs"), ("GENERATE", "sample"), ("ppl", "eval"), ("serv", "serve"), ("init", "new")],
)
def test_a_command_from_another_program_produces_a_hint(typed: str, expected: str) -> None:
    assert hints.command(typed, COMMANDS) == f"did you mean {expected}?"


def test_an_option_from_another_program_produces_a_hint_if_the_command_has_an_equivalent() -> None:
    options = ["--max-new-tokens", "--run", "--top-k"]
    assert hints.option("--max_tokens", options) == "did you mean --max-new-tokens?"
    assert hints.option("--TOP_K", options) == "did you mean --top-k?"
    assert hints.option("--model", options) == "did you mean --run?"
    assert hints.option("--model", ["--json"]) is None
    assert hints.option("--learning-rate", ["--set"]) == "set it with --set training.optimizer.lr=VALUE"


@pytest.mark.parametrize(
    ("text", "minutes"), [("10", 10), ("2m", 2), ("90s", 1.5), ("1.5 h", 90), ("2 weeks", None), ("-1", None), ("", None)]
)
def test_durations_are_minutes_unless_they_have_a_unit(text: str, minutes: float | None) -> None:
    assert hints.duration_minutes(text) == minutes
