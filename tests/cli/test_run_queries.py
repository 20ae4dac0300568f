"""Test the queries of `tinylm runs`: filters, sorting and columns."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from command import RunCli

from tinylm.run import Run


@pytest.fixture
def folder(tiny_run: Run, tmp_path: Path) -> Path:
    """A folder with two copies of a run. The second has another seed and a higher best loss."""
    for name in ("first", "second"):
        shutil.copytree(tiny_run.path, tmp_path / "runs" / name)
    recipe = tmp_path / "runs" / "second" / "recipe.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("seed: 1\n", "seed: 7\n"), encoding="utf-8")
    log = tmp_path / "runs" / "second" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line["kind"] == "eval":
            line["val_loss"] += 1
    log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return tmp_path / "runs"


def names(run_cli: RunCli, folder: Path, *options: str) -> list[str]:
    result = run_cli("runs", folder, *options, "--json")
    assert result.code == 0, result.err
    return [row["name"] for row in json.loads(result.out)]


def test_runs_are_filtered_by_recipe_keys_and_metrics(run_cli: RunCli, folder: Path) -> None:
    assert names(run_cli, folder) == ["first", "second"]
    assert names(run_cli, folder, "--filter", "seed=7") == ["second"]
    assert names(run_cli, folder, "--filter", "seed != 7") == ["first"]
    assert names(run_cli, folder, "--filter", "model.n_embd>=32", "--filter", "seed<7") == ["first"]
    assert names(run_cli, folder, "--filter", "model.n_embd>32") == []
    assert names(run_cli, folder, "--filter", "model.preset=modern") == ["first", "second"]
    first, second = (row["best_val_loss"] for row in json.loads(run_cli("runs", folder, "--json").out))
    assert names(run_cli, folder, "--filter", f"val_loss<{(first + second) / 2}") == ["first"]


def test_the_best_run_is_sorted_first(run_cli: RunCli, folder: Path) -> None:
    assert names(run_cli, folder, "--sort", "val_loss") == ["first", "second"]
    (folder / "first").rename(folder / "third")
    assert names(run_cli, folder, "--sort", "val_loss") == ["third", "second"]
    assert names(run_cli, folder, "--sort", "name") == ["second", "third"]


def test_the_selected_columns_are_shown_and_exported(run_cli: RunCli, folder: Path) -> None:
    shown = run_cli("runs", folder, "--columns", "seed,model.n_embd,val_loss").out.splitlines()
    assert shown[0].split() == ["name", "seed", "model.n_embd", "val_loss"]
    assert shown[2].split()[:3] == ["second", "7", "32"]
    rows = list(csv.DictReader(io.StringIO(run_cli("runs", folder, "--columns", "seed,val_loss", "--csv").out)))
    assert [row["seed"] for row in rows] == ["1", "7"]
    assert float(rows[1]["val_loss"]) == pytest.approx(float(rows[0]["val_loss"]) + 1)
    everything = list(csv.DictReader(io.StringIO(run_cli("runs", folder, "--csv").out)))
    assert everything[0]["step"] == "20"
    header = run_cli("runs", folder, "--csv", "--filter", "seed=99").out
    assert header == ",".join(everything[0]) + "\n"
    assert run_cli("runs", folder.parent, "--csv").out == header, "a folder without runs has the same columns"


def test_the_selected_columns_are_added_to_the_json_rows(run_cli: RunCli, folder: Path) -> None:
    plain = run_cli("runs", folder, "--json").json
    rows = run_cli("runs", folder, "--columns", "model.n_embd,val_loss", "--json").json
    assert [row["model.n_embd"] for row in rows] == [32, 32]
    assert [row["val_loss"] for row in rows] == [row["best_val_loss"] for row in plain]
    assert rows[0].keys() == plain[0].keys() | {"model.n_embd", "val_loss"}


def test_the_runs_of_a_sweep_are_listed_with_the_name_of_its_folder(
    run_cli: RunCli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tiny-sweep" / "results").mkdir(parents=True)
    (folder / "second").rename(folder / "tiny-sweep" / "seed=7")
    (folder / "unrelated" / "first").mkdir(parents=True)
    (folder / "unrelated" / "first" / "recipe.yaml").touch()
    assert names(run_cli, folder) == ["first", "tiny-sweep/seed=7"]
    assert names(run_cli, folder / "tiny-sweep") == ["seed=7"]
    (folder / "first").rename(folder / "tiny-sweep" / "seed=1")
    monkeypatch.chdir(folder.parent)
    listed = run_cli("runs", "--sort", "val_loss", "--filter", "model.n_embd>=32", "--json").json
    assert [(row["name"], row["run"]) for row in listed] == [
        (f"tiny-sweep/{name}", f"runs/tiny-sweep/{name}") for name in ("seed=1", "seed=7")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--filter", "model.n_embd"], "must have the form KEY>=VALUE"),
        (["--filter", "model.n_embd=>3"], "unknown operator => (use >=)"),
        (["--filter", "model.n_embd =< 3"], "unknown operator =< (use <=)"),
        (["--filter", "model.n_embd>>3"], "unknown operator >> (use one of >=, <=, =, !=, <, >)"),
        (["--csv", "--json"], "--csv, --json: these options are mutually exclusive"),
        (["--filter", "model.n_emb=3"], "did you mean model.n_embd?"),
        (["--filter", "model.preset>=3"], "'modern' and '3' cannot be ordered"),
        (["--sort", "val_lss"], "no run has the key val_lss (did you mean val_loss?)"),
        (["--columns", "xyz"], "no run has the key xyz (use name, run, step,"),
        (["--columns", "sed"], "did you mean seed?"),
    ],
)
def test_invalid_queries_are_rejected(options: list[str], message: str, run_cli: RunCli, folder: Path) -> None:
    result = run_cli("runs", folder, *options)
    assert result.code == 2
    assert message in result.err


def test_a_run_folder_is_not_a_folder_of_runs(run_cli: RunCli, folder: Path) -> None:
    result = run_cli("runs", folder / "first")
    assert result.code == 2
    assert f"is a run, not a folder of runs (`tinylm runs {folder}` lists the runs in its folder)" in result.err


def test_a_filter_that_matches_no_run_prints_a_note(run_cli: RunCli, folder: Path) -> None:
    assert "no run matches the filters" in run_cli("runs", folder, "--filter", "seed=99").err
