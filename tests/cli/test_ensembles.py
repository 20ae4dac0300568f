"""Test `eval`, `sample` and `compare` with several runs or checkpoints, which form an ensemble."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import RunCli, error_of
from safetensors.torch import load_file, save_file

from tinylm.run import Run, write_manifest


@pytest.fixture
def other_run(tiny_run: Run, tmp_path: Path) -> Run:
    """A copy of the tiny run with slightly different weights in its best checkpoint."""
    shutil.copytree(tiny_run.path, tmp_path / "other")
    run = Run.open(tmp_path / "other")
    folder = run.checkpoint().path
    weights = {name: tensor * 1.05 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    return run


def test_eval_shows_the_members_beside_the_ensemble(run_cli: RunCli, tiny_run: Run, other_run: Run) -> None:
    options = ("-r", tiny_run.path, "-r", other_run.path)
    document = run_cli("eval", *options, "--json").json
    assert document["run"] == f"{tiny_run.path}+{other_run.path}"
    assert [member["run"] for member in document["members"]] == [str(tiny_run.path), str(other_run.path)]
    for member in document["members"]:
        alone = run_cli("eval", "-r", member["run"], "--json").json
        assert "members" not in alone
        assert {key: alone[key] for key in member} == member
    assert document["best_member"]["difference"] == pytest.approx(
        document["bits_per_byte"] - min(member["bits_per_byte"] for member in document["members"])
    )
    shown = run_cli("eval", *options).out
    assert "the mean probabilities of 2 models, context 32" in shown
    assert f"{other_run.path} {other_run.checkpoint().name}" in shown


def test_sample_draws_from_the_ensemble(run_cli: RunCli, tiny_run: Run, other_run: Run) -> None:
    options = ("-r", tiny_run.path, "-r", other_run.path, "--prompt", "The", "--max-new-tokens", 5, "--seed", 1)
    document = run_cli("sample", *options, "-n", 2, "--json").json
    assert [member["run"] for member in document["members"]] == [str(tiny_run.path), str(other_run.path)]
    streamed = run_cli("sample", *options)
    assert streamed.out.rstrip("\n") == "The" + document["samples"][0]["text"]
    assert "ensemble of 2" in streamed.err


def test_compare_accepts_an_ensemble(run_cli: RunCli, tiny_run: Run, other_run: Run) -> None:
    ensemble = f"{tiny_run.path}+{other_run.path}"
    document = run_cli("compare", tiny_run.path, ensemble, "--json").json
    assert document["runs"] == [str(tiny_run.path), ensemble]
    [test] = document["tests"]
    assert test["b_bits_per_byte"] == pytest.approx(
        run_cli("eval", "-r", tiny_run.path, "-r", other_run.path, "--json").json["bits_per_byte"]
    )
    assert f"{ensemble} " in run_cli("compare", tiny_run.path, ensemble).out


def test_several_checkpoints_of_a_run_form_an_ensemble(run_cli: RunCli, tiny_run: Run, other_run: Run) -> None:
    shutil.copytree(tiny_run.checkpoint().path, other_run.path / "checkpoints" / "step-000005")
    document = run_cli("eval", "-r", other_run.path, "--checkpoint", "best", "--checkpoint", "5", "--json").json
    assert [member["step"] for member in document["members"]] == [other_run.checkpoint().step, 5]
    assert document["step"] is None
    both = run_cli("eval", "-r", other_run.path, "-r", tiny_run.path, "--json").json
    assert document["bits_per_byte"] == both["bits_per_byte"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--harness", "task.yaml"), "--harness: evaluates a single model (pass one --run)"),
        (("--html", "report.html"), "--html: shows the predictions of a single model (evaluate one run)"),
        (("--checkpoint", "best", "--checkpoint", "last"), "--checkpoint: several checkpoints require a single run"),
    ],
)
def test_eval_refuses_what_an_ensemble_cannot_do(
    options: tuple[str, ...],
    expected: str,
    run_cli: RunCli,
    tiny_run: Run,
    other_run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.yaml").touch()
    assert expected in error_of(run_cli("eval", "-r", tiny_run.path, "-r", other_run.path, *options))
