"""Test that masked examples depend only on the seed and the position, and that control tokens are never masked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from encoders import masked_recipe

from tinylm.data import formats
from tinylm.data.masking import MaskedWindows
from tinylm.data.order import uniform
from tinylm.errors import InputError
from tinylm.recipe import RecipeError, loads
from tinylm.reporting import SILENT
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.control_tokens import ControlTokens, encode_with_masks


def dataset(tmp_path: Path, **options: str) -> tuple[MaskedWindows, Tokenizer]:
    recipe = masked_recipe(tmp_path, **options)
    data_format = formats.find(recipe.data)
    prepared = data_format.prepare(recipe, SILENT, 1)
    built = data_format.dataset(recipe, prepared)
    assert isinstance(built, MaskedWindows)
    return built, prepared.tokenizer


def test_examples_are_a_pure_function_of_their_position(tmp_path: Path) -> None:
    windows, _ = dataset(tmp_path)
    together = windows.examples(0, 12)
    for start, count in ((0, 5), (5, 7), (11, 1)):
        part = windows.examples(start, count)
        for name, array in part.items():
            assert np.array_equal(array, together[name][start : start + count])


def test_targets_restore_the_text_and_control_tokens_are_not_masked(tmp_path: Path) -> None:
    windows, tokenizer = dataset(tmp_path, extra="objective: {name: masked_lm, rate: 0.4}\n")
    control = ControlTokens.of(tokenizer)
    examples = windows.examples(0, 200)
    tokens, targets = examples["tokens"], examples["targets"]
    original = np.where(targets >= 0, targets, tokens)
    assert (original[:, 0] == control.cls).all()
    assert (original[:, -1] == control.sep).all()
    assert not np.isin(targets, [control.cls, control.sep, control.pad, control.mask, tokenizer.end_of_text]).any()
    assert not (original == control.mask).any()
    assert not (original == tokenizer.end_of_text).any()
    text = [id for row in original[: windows.examples_per_epoch] for id in row if id not in (control.cls, control.sep)]
    assert set(text) <= set(tokenizer.encode("".join(map(chr, range(32, 127))) + "\n"))


def test_80_percent_of_the_targets_are_masked_and_10_percent_are_unchanged(tmp_path: Path) -> None:
    windows, tokenizer = dataset(tmp_path, extra="objective: {name: masked_lm, rate: 0.3}\n")
    mask = ControlTokens.of(tokenizer).mask
    examples = windows.examples(0, 2000)
    chosen = examples["targets"] >= 0
    ordinary = windows._masking.ordinary[np.where(chosen, examples["targets"], examples["tokens"])]
    assert chosen.sum() / ordinary.sum() == pytest.approx(0.3, abs=0.01)
    inputs, targets = examples["tokens"][chosen], examples["targets"][chosen]
    assert np.mean(inputs == mask) == pytest.approx(0.8, abs=0.02)
    assert np.mean(inputs == targets) == pytest.approx(0.1, abs=0.02)


def test_the_masking_rate_changes_linearly_during_training(tmp_path: Path) -> None:
    windows, _ = dataset(tmp_path, extra="objective: {name: masked_lm, rate: [0.3, 0.15]}\n")
    assert windows.total == 48
    assert windows.rates(np.array([0, 24, 48, 96])) == pytest.approx([0.3, 0.225, 0.15, 0.15])


def test_uniform_numbers_are_uniform_and_streams_are_uncorrelated() -> None:
    first, second = (uniform(7, np.arange(500), 40, stream) for stream in (0, 1))
    assert first.mean() == pytest.approx(0.5, abs=0.01)
    assert first.var() == pytest.approx(1 / 12, abs=0.003)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02
    assert len(np.unique(first)) == first.size
    assert np.array_equal(uniform(7, np.arange(100, 110), 40, 0), first[100:110])


@pytest.mark.parametrize(
    ("tokenizer", "space"),
    [("{kind: byte}", " "), ("{kind: bpe, vocab_size: 300}", ""), ("{kind: wordpiece, vocab_size: 120}", "")],
)
def test_text_never_encodes_to_control_tokens(tmp_path: Path, tokenizer: str, space: str) -> None:
    _, trained = dataset(tmp_path, tokenizer=tokenizer)
    control = ControlTokens.of(trained)
    encoded = trained.encode("[CLS] the [MASK] [SEP][PAD] apple")
    assert not {*encoded} & {control.cls, control.sep, control.mask, control.pad}
    masked = encode_with_masks(trained, "[CLS] the [MASK] is")
    assert masked.count(control.mask) == 1
    assert control.cls not in masked
    before = trained.encode(f"[CLS] the{space}")  # a space belongs to the masked token if the tokenizer joins spaces to words
    assert masked[: len(before) + 1] == [*before, control.mask]
    assert encode_with_masks(trained, "the\n  [MASK]") == [*trained.encode(f"the\n {space}"), control.mask]


def test_a_changing_masking_rate_requires_a_fixed_number_of_steps() -> None:
    with pytest.raises(RecipeError, match="masks must not depend on the clock"):
        loads(
            "data: {train: 'builtin:python-docs'}\nmodel: {architecture: encoder}\n"
            "objective: {name: masked_lm, rate: [0.3, 0.1]}\ntraining: {minutes: 1}"
        )


def test_a_tokenizer_without_control_tokens_is_rejected(tmp_path: Path) -> None:
    plain = masked_recipe(tmp_path, model="preset: bert")
    decoder = plain.model_copy(update={"model": loads("data: {train: x}\ntraining: {steps: 1}", check_files=False).model})
    tokenizer = formats.find(plain.data).prepare(decoder, SILENT, 1).tokenizer
    tokenizer.save(tmp_path / "plain.json")
    with pytest.raises(InputError, match=r"no \[CLS\] token"):
        dataset(tmp_path, tokenizer=f"{{path: {tmp_path / 'plain.json'}}}")
