"""Sweep settings: the values of `--set`, the bounds of `--range`, the grid of combinations and the run names."""

from __future__ import annotations

import pytest

from tinylm.errors import InputError
from tinylm.sweep.settings import Axis, Range, check_keys, grid, overrides, parse_axis, parse_range, run_names, shortened


@pytest.mark.parametrize(
    ("setting", "axis"),
    [
        ("model.n_embd=128, 192", Axis("model.n_embd", ("128", "192"))),
        ("seed=1", Axis("seed", ("1",))),
        ("data.train=[a.txt, b.txt],c.txt", Axis("data.train", ("[a.txt, b.txt]", "c.txt"))),
        ("training.optimizer={name: adamw, lr: 1e-3},muon", Axis("training.optimizer", ("{name: adamw, lr: 1e-3}", "muon"))),
        ('sampling.prompts=["a, b"]', Axis("sampling.prompts", ('["a, b"]',))),
        ("data.train=a=b.txt", Axis("data.train", ("a=b.txt",))),
    ],
)
def test_values_are_separated_by_commas_outside_brackets_and_quotes(setting: str, axis: Axis) -> None:
    assert parse_axis(setting) == axis


@pytest.mark.parametrize("setting", ["", "seed", "seed=", "=1", "seed=1,,2", "seed=1,1"])
def test_an_invalid_setting_is_rejected(setting: str) -> None:
    with pytest.raises(InputError, match="--set"):
        parse_axis(setting)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("training.optimizer.lr=1e-3..1e-1:log", Range("training.optimizer.lr", 1e-3, 1e-1, log=True, whole=False)),
        ("model.n_layer=2..8", Range("model.n_layer", 2, 8, log=False, whole=True)),
        ("model.dropout=0.0..0.3", Range("model.dropout", 0.0, 0.3, log=False, whole=False)),
        ("model.n_embd=32..512:log", Range("model.n_embd", 32, 512, log=True, whole=True)),
    ],
)
def test_a_range_has_bounds_a_scale_and_a_type(setting: str, expected: Range) -> None:
    assert parse_range(setting) == expected
    assert parse_range(str(expected)) == expected


@pytest.mark.parametrize(
    "setting", ["lr", "lr=1", "lr=1..", "lr=2..1", "lr=1..1", "lr=0..1:log", "lr=a..b", "lr=1..inf", "=1..2", "lr=1..2:x"]
)
def test_an_invalid_range_is_rejected(setting: str) -> None:
    with pytest.raises(InputError, match="--range"):
        parse_range(setting)


def test_a_grid_contains_every_combination_in_order() -> None:
    combinations = grid([parse_axis("model.n_embd=8,16"), parse_axis("training.steps=5"), parse_axis("seed=1,2")])
    assert [tuple(values.values()) for values in combinations] == [
        ("8", "5", "1"),
        ("8", "5", "2"),
        ("16", "5", "1"),
        ("16", "5", "2"),
    ]
    assert overrides(combinations[0]) == ["model.n_embd=8", "training.steps=5", "seed=1"]
    assert run_names(combinations, ["model.n_embd", "seed"]) == [
        "n_embd=8,seed=1",
        "n_embd=8,seed=2",
        "n_embd=16,seed=1",
        "n_embd=16,seed=2",
    ]


def test_run_names_are_distinct_file_names() -> None:
    combinations = grid([parse_axis("data.train=a/x.txt,a x.txt,a:x.txt")])
    names = run_names(combinations, ["data.train"])
    assert len(set(names)) == 3
    assert all("/" not in name and ":" not in name for name in names)


def test_shortened_keys_stay_distinct() -> None:
    assert shortened(["training.optimizer.name", "training.schedule.name", "seed"]) == {
        "training.optimizer.name": "optimizer.name",
        "training.schedule.name": "schedule.name",
        "seed": "seed",
    }


def test_a_key_cannot_be_set_twice() -> None:
    with pytest.raises(InputError, match="seed is set twice"):
        check_keys(["seed", "model.n_embd", "seed"])
    with pytest.raises(InputError, match=r"training.optimizer.lr is part of training.optimizer, which is also set"):
        check_keys(["training.optimizer.lr", "training.optimizer"])
