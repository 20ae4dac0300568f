"""`tinylm ladder` trains each rung only once and can choose widths so that all networks have about the same size."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import RunCli

from tinylm.errors import InputError
from tinylm.ladder import DEFAULT_RUNGS, RUNGS, LadderPlan, find_rungs, parameter_count, run_ladder, width_for
from tinylm.model import registry
from tinylm.recipe import load
from tinylm.recipe.shipped import shipped_recipes
from tinylm.run import Run


def plan(folder: Path, *names: str, overrides: tuple[str, ...] = ()) -> LadderPlan:
    return LadderPlan(folder, ("builtin:python-docs",), shipped_recipes(), find_rungs(names), 1.0, overrides=overrides)


def test_a_ladder_is_not_trained_twice_and_its_rungs_are_ordinary_runs(short_file: Path, tmp_path: Path, run_cli: RunCli) -> None:
    folder, text = tmp_path / "ladder", tmp_path / "text.txt"
    text.write_bytes(short_file.read_bytes())
    settings = ("--set", "tokenizer=char", "--set", "training.epochs=1")
    command = ("ladder", text, *settings, "--out", folder, "--json", "--models")
    first = run_cli(*command, "ngram", "--plot", tmp_path / "plot.svg")
    assert first.code == 0, first.err
    [row] = first.json["rows"]
    assert row["model"] == "ngram"
    assert row["bits_per_byte"] > 0
    assert row["bits_per_byte_ci95"] == [None, None], "the held-out text is too short for an interval"
    assert row["sample"]
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
    changed = (folder / "ngram" / "metrics.jsonl").stat().st_mtime_ns
    again = run_cli(*command, "ngram")
    assert again.json == first.json
    assert (folder / "ngram" / "metrics.jsonl").stat().st_mtime_ns == changed
    assert Run.open(folder / "ngram").recipe.model.architecture == "ngram"
    other = run_cli(*command, "ngram", "--set", "model.order=3")
    assert other.code == 2
    assert "ngram was trained with other settings: --minutes, --models" in other.err
    (folder / "rows" / "ngram.json").write_text('{"model"', encoding="utf-8")
    assert run_cli(*command, "ngram").json == first.json, "a damaged row is computed again"
    text.write_text("another text\n" * 500, encoding="utf-8")
    assert "the text is not the same as when ngram was trained" in run_cli(*command, "ngram,window").err
    shutil.rmtree(folder / "ngram")
    assert run_cli(*command, "ngram").json["rows"] != first.json["rows"], "a removed run is trained again"


def test_the_text_of_a_ladder_cannot_be_standard_input(tmp_path: Path, run_cli: RunCli) -> None:
    result = run_cli("ladder", "-", "--out", tmp_path / "ladder", stdin=b"text")
    assert result.code == 2
    assert "standard input can be read only once (save the text in a file)" in result.err


@pytest.mark.parametrize("rung", RUNGS.values(), ids=str)
def test_every_rung_has_an_included_recipe(rung: object) -> None:
    recipe = load(shipped_recipes()[f"ladder-{rung.name}"], check_files=False)  # type: ignore[attr-defined]
    assert registry.network_class(recipe.model)


def test_all_default_rungs_exist_and_are_sorted_by_year() -> None:
    rungs = find_rungs(DEFAULT_RUNGS)
    assert [rung.name for rung in rungs] == list(DEFAULT_RUNGS)
    assert [rung.year for rung in rungs] == sorted(rung.year for rung in rungs)


@pytest.mark.parametrize("name", ["window", "rnn", "lstm", "gru"])
def test_the_chosen_width_comes_closest_to_the_requested_parameter_count(name: str) -> None:
    rung, recipe = RUNGS[name], load(shipped_recipes()[f"ladder-{name}"], check_files=False)
    assert rung.width is not None
    width = width_for(recipe.model, rung.width, 500, 1_000_000)
    counts = [
        abs(parameter_count(recipe.model.model_copy(update={rung.width: width + change}), 500) - 1_000_000) for change in (-8, 0, 8)
    ]
    assert counts[1] == min(counts)
    assert width % 8 == 0


def test_invalid_models_and_settings_are_rejected_before_training(
    tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such model 'ngrams'"):
        find_rungs(["ngrams"])
    with pytest.raises(InputError, match="did you mean n_layer"):
        list(run_ladder(plan(tmp_path, "lstm", overrides=("model.n_layers=3",))))
    for arguments in (["--minutes", "0"], ["--equal", "size"], ["--plot", "plot.txt"]):
        rejected = run_cli("ladder", "builtin:python-docs", *arguments)
        assert rejected.code == 2, rejected.err
    assert not list(tmp_path.iterdir())
