"""Numbers in a recipe have upper limits, a name must be a single folder name, and invalid YAML values are rejected."""

from __future__ import annotations

import pytest

from tinylm.errors import InputError
from tinylm.recipe import RecipeError, loads

BASE = "data: {train: my.txt}\ntraining: {steps: 1}\n"


def _problem(text: str) -> str:
    with pytest.raises(InputError) as error:
        loads(BASE + text, name="my.yaml", check_files=False)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model: {n_embd: 1e11, n_head: 3}", "model.n_embd: must be at most 1,048,576, not 100000000000.0"),
        (f"model: {{n_layer: 1{'0' * 400}}}", "model.n_layer: must be at most 10,000, not a huge number"),
        ("model: {head_dim: 1e12}", "model.head_dim: must be at most 1,048,576"),
        ("model: {ngram_rows: 1e18}", "model.ngram_rows: must be at most 1,000,000,000"),
        ("model: {context_length: 1e9}", "model.context_length: must be at most 16,777,216"),
        ("tokenizer: {vocab_size: 1e9}", "tokenizer.vocab_size: must be at most 16,777,216"),
        ("evaluation: {max_tokens: 1e16}", "evaluation.max_tokens: must be at most 1e+15"),
        ("sampling: {temperature: 1e9}", "sampling.temperature: must be at most 1,000.0"),
        ("model: {bias: !!bool maybe}", "'maybe' is not valid for bool (remove tags such as !!int)"),
        ("model: {n_layer: !!int ''}", "'' is not valid for int (remove tags such as !!int)"),
        ("model: {n_layer: !!timestamp x}", "'x' is not valid for timestamp (remove tags such as !!int)"),
        ('model: {init_from: "\\0"}', "contains a NUL character"),
        ('model: {init_from: "\\uD800"}', "contains an unpaired surrogate"),
        ("sampling: {prompts: a\x85b}", "contains the line separator U+0085 (write \\N in double quotes)"),
    ],
)
def test_a_value_that_is_too_large_or_invalid_is_reported_with_its_line(text: str, problem: str) -> None:
    assert f"my.yaml:3: {problem}" in _problem(text) or ("my.yaml:3: '" in _problem(text) and problem in _problem(text))


@pytest.mark.parametrize("name", ["''", ".", "..", "../x", "a/b", "/x", ".hidden", "' a'", '"a\\nb"', "x" * 201, r"a\b"])
def test_a_name_that_is_not_a_single_folder_name_is_rejected(name: str) -> None:
    assert "my.yaml:3: name: must be the name of a folder" in _problem(f"name: {name}")


@pytest.mark.parametrize("key", ["lr: 1e308", "lr: 1e39"])
def test_a_learning_rate_has_a_limit(key: str) -> None:
    with pytest.raises(RecipeError, match=r"my\.yaml:2: training\.optimizer\.lr: must be at most 1e\+38"):
        loads(
            f"data: {{train: my.txt}}\ntraining: {{steps: 1, optimizer: {{name: adamw, {key}}}}}", name="my.yaml", check_files=False
        )


def test_the_divisors_of_a_huge_batch_are_found_quickly() -> None:
    with pytest.raises(RecipeError, match=r"7 does not divide global_batch_size 16777216 \(4 or 8 would"):
        loads("data: {train: my.txt}\ntraining: {steps: 1, global_batch_size: 16777216, micro_batch_size: 7}", check_files=False)


@pytest.mark.parametrize("override", ["a:²", "a:²=1", "seed=!!bool maybe", "model.init_from=~nosuchuser/x", "data=&a {x: *a}"])
def test_an_invalid_override_is_rejected(override: str) -> None:
    with pytest.raises(InputError):
        loads(BASE, [override], check_files=True)
