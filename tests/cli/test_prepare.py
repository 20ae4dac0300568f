"""Test `tinylm prepare`: its report, its JSON output, and invalid options."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from command import RunCli, error_of

from tinylm.curation.rules import RULES


@pytest.fixture
def corpus(english: str, tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    texts = [english[start * 2000 : start * 2000 + 1500] for start in range(20)] + [english[:1500], "Too short."]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


OPTIONS = ("--without", "c4", "--without", "fineweb", "--heldout-share", "0.3", "--vocab-size", "400")


def test_a_prepared_text_can_be_trained_on(run_cli: RunCli, corpus: Path, recipe_file: Path, tmp_path: Path) -> None:
    result = run_cli("prepare", corpus, "--out", tmp_path / "out", *OPTIONS)
    assert result.code == 0, result.err
    rows = {line.split()[0]: line.split()[1:] for line in result.out.partition("\n\n")[0].splitlines()}
    assert (rows["gopher_words"][1], rows["exact_duplicates"][1]) == ("1", "1")
    assert rows["all"][1] == "22"
    assert "'Too short.'" in result.out
    assert "switched off: c4, fineweb" in result.out
    assert "next:" in result.err
    trained = run_cli("train", recipe_file, "--set", f"data.train={tmp_path / 'out'}", "--out", tmp_path / "run", "--json")
    assert trained.code == 0, trained.err
    assert trained.json["step"] == 2


def test_json_lists_every_rule_and_equals_the_manifest(run_cli: RunCli, corpus: Path, tmp_path: Path) -> None:
    answer = run_cli("prepare", corpus, "--out", tmp_path / "out", *OPTIONS[2:], "--without", "c4", "--json", "--quiet").json
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert {key: value for key, value in answer.items() if key not in ("folder", "dry_run", "seconds")} == manifest
    listed = [step["step"] for step in answer["steps"]]
    assert [name for name in listed if name.startswith("gopher_")] == [rule.name for rule in RULES if rule.group == "gopher"]
    assert not [name for name in listed if name.startswith("c4_")]
    left = answer["input"]["documents"] - sum(step["removed"] for step in answer["steps"])
    assert left == answer["parts"]["train"]["documents"] + answer["parts"]["heldout"]["documents"]
    left = answer["input"]["bytes"] - sum(step["bytes"] for step in answer["steps"])
    assert left == answer["parts"]["train"]["bytes"] + answer["parts"]["heldout"]["bytes"]


def test_a_dry_run_writes_nothing_without_out_and_is_continued_with_out(run_cli: RunCli, corpus: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    dry = run_cli("prepare", corpus, "--dry-run", *OPTIONS, "--json")
    assert sorted(tmp_path.rglob("*")) == before
    out = tmp_path / "out"
    assert run_cli("prepare", corpus, "--dry-run", "--out", out, *OPTIONS).code == 0
    assert not (out / "train.npy").exists()
    answer = run_cli("prepare", corpus, "--out", out, *OPTIONS, "--json").json
    assert answer["steps"] == dry.json["steps"]
    assert not (out / "work").exists()


def test_a_prepared_text_is_only_replaced_with_overwrite(run_cli: RunCli, corpus: Path, tmp_path: Path) -> None:
    command = ("prepare", corpus, "--out", tmp_path / "out", *OPTIONS)
    assert run_cli(*command).code == 0
    before = (tmp_path / "out" / "train.npy").read_bytes()
    assert "--overwrite replaces it" in error_of(run_cli(*command))
    assert run_cli(*command, "--without", "exact_duplicates", "--without", "near_duplicates", "--overwrite").code == 0
    assert len((tmp_path / "out" / "train.npy").read_bytes()) > len(before)


@pytest.mark.parametrize("arguments", [("typo.jsonl",), ("{corpus}", "--engine", "spark"), ("{corpus}", "--field", "body")])
def test_a_failed_overwrite_keeps_the_prepared_text(
    arguments: tuple[str, ...], run_cli: RunCli, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run_cli("prepare", corpus, "--out", out, *OPTIONS).code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    changed = [argument.format(corpus=corpus) for argument in arguments]
    error_of(run_cli("prepare", *changed, "--out", out, *OPTIONS, "--overwrite"))
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_a_prepared_text_without_a_manifest_can_be_overwritten(run_cli: RunCli, corpus: Path, tmp_path: Path) -> None:
    command = ("prepare", corpus, "--out", tmp_path / "out", *OPTIONS)
    assert run_cli(*command).code == 0
    manifest = tmp_path / "out" / "manifest.json"
    manifest.unlink()
    assert "--overwrite replaces its files" in error_of(run_cli(*command))
    (tmp_path / "out" / "notes.txt").touch()
    assert "use a new folder" in error_of(run_cli(*command, "--overwrite"))
    (tmp_path / "out" / "notes.txt").unlink()
    assert run_cli(*command, "--overwrite").code == 0
    assert manifest.exists()


def test_a_preparation_that_failed_early_can_be_run_again(run_cli: RunCli, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    error_of(run_cli("prepare", "typo.jsonl", "--out", out, *OPTIONS))
    assert not out.exists()
    (out / "logs").mkdir(parents=True)
    (out / ".lock").touch()
    assert run_cli("prepare", corpus, "--out", out, *OPTIONS).code == 0


def test_a_failed_first_attempt_leaves_nothing(run_cli: RunCli, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert "the text is empty" in error_of(run_cli("prepare", tmp_path / "empty.txt", "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_warns_about_the_rules_and_the_error_of_the_real_run(run_cli: RunCli, tmp_path: Path) -> None:
    file = tmp_path / "code.jsonl"
    sentences = (f"The model reads word {number} of the text. " for number in range(10))
    texts = [f"{sentence * 8}{brace}" for sentence, brace in zip(sentences, ("", "{", "{", "{"), strict=False)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    command = (
        "prepare",
        file,
        "--without",
        "gopher",
        "--without",
        "fineweb",
        "--without",
        "near_duplicates",
        "--heldout-share",
        "0.000001",
    )
    dry = run_cli(*command, "--dry-run")
    assert dry.code == 0
    assert "removed 3 of 4 documents, 3 of them by c4_curly_brackets (--without c4_curly_brackets switches it off)" in dry.err
    expected = f"{file}: no held-out documents are left: 3 of 4 documents were removed, and none of the remaining 1 is held out"
    assert f"warning: without --dry-run, this command fails: {expected}" in dry.err
    real = run_cli(*command, "--out", tmp_path / "out")
    assert real.code == 2
    assert f"error: {expected}" in real.err


def test_the_rules_are_listed(run_cli: RunCli) -> None:
    result = run_cli("prepare", "--list-rules")
    assert "gopher_words" in result.out
    assert "less than 50 or more than 100,000" in result.out
    assert {entry["rule"] for entry in run_cli("prepare", "--list-rules", "--json").json} >= {rule.name for rule in RULES}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SOURCE: there is no text to prepare"),
        (["{corpus}"], "--out: is required"),
        (["nowhere.txt", "--out", "{out}"], "nowhere.txt: no such file"),
        (["{corpus}", "--out", "{out}", "--without", "gopher_word"], "did you mean gopher_words?"),
        (["{corpus}", "--out", "{out}", "--minhash", "8"], "--minhash: '8' is not BANDSxROWS"),
        (["{corpus}", "--out", "{out}", "--heldout-share", "1"], "--heldout-share: must be between 0 and 1"),
        (["{corpus}", "--out", "{out}", "--heldout", "a", "--heldout-share", "0.1"], "mutually exclusive"),
        (["{corpus}", "--out", "{out}", "--contaminated", "both"], "--contaminated: must be heldout or train"),
        (["{corpus}", "--out", "{out}", "--tokenizer", "a.json"], "a.json: no such tokenizer file"),
        (["{corpus}", "--out", "{out}", "--tokenizer", "{corpus}", "--kind", "bpe"], "mutually exclusive"),
        (["{corpus}", "--out", "{out}", "--kind", "bpee"], "--kind: must be one of"),
        (["{corpus}", "--out", "{out}", "--engine", "spark"], "--engine: must be builtin or datatrove"),
        (["{corpus}", "--out", "{out}", "--tasks", "4", "--executor", "slurm"], "--executor, --tasks: requires --engine datatrove"),
        (["{corpus}", "--out", "{corpus}"], "is not a folder"),
        (["{corpus}", "--out", "{folder}"], "the folder is not empty"),
        (["{corpus}", "--out", "{out}", "--field", "body"], "no field 'body'"),
    ],
)
def test_an_invalid_command_is_rejected(arguments: list[str], message: str, run_cli: RunCli, corpus: Path, tmp_path: Path) -> None:
    places = {"corpus": corpus, "out": tmp_path / "out", "folder": corpus.parent}
    assert message in error_of(run_cli("prepare", *(argument.format(**places) for argument in arguments)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--executor", "spark"], "--executor: must be local, slurm or ray"),
        (["--executor", "slurm"], "--partition: is required"),
        (["--partition", "cpu"], "--partition: requires --executor slurm"),
        (["--executor", "ray"], "--executor ray: needs an extra package: pip install ray"),
        (["--executor", "slurm", "--partition", "cpu"], "--executor slurm: needs Slurm's command sbatch"),
        (["--dry-run"], "--dry-run: not supported with --engine datatrove"),
        (["nowhere.txt", "--tasks", "2", "--jobs", "2"], "nowhere.txt: no such file"),
    ],
)
def test_an_invalid_executor_is_rejected(
    arguments: list[str], message: str, run_cli: RunCli, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datatrove")
    monkeypatch.setenv("PATH", str(tmp_path))  # without sbatch
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run_cli("prepare", corpus, "--out", tmp_path / "out", "--engine", "datatrove", *arguments)
    assert message in error_of(result)
    assert len(result.err.splitlines()) == 1


def test_datatrove_prints_the_same_report_and_no_log_with_quiet(run_cli: RunCli, corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    expected = run_cli("prepare", corpus, "--out", tmp_path / "builtin", *OPTIONS, "--quiet")
    result = run_cli("prepare", corpus, "--out", tmp_path / "out", *OPTIONS, "--engine", "datatrove", "--quiet")
    assert (result.code, result.out, result.err) == (0, expected.out, "")
    (tmp_path / "bad.txt").write_text("Too short.", encoding="utf-8")
    failed = run_cli("prepare", tmp_path / "bad.txt", "--out", tmp_path / "failed", "--engine", "datatrove", "--quiet")
    assert failed.code == 2
    assert "Too short." in failed.out
    assert len(failed.err.splitlines()) == 1
    assert "all training documents were removed" in failed.err


def test_slurm_jobs_are_submitted(run_cli: RunCli, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replacement for sbatch records the scripts."""
    pytest.importorskip("datatrove")
    folder = tmp_path / "a folder"
    folder.mkdir()
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\nfor script; do :; done\ncat "$script" >> "{tmp_path}/scripts"\necho Submitted batch job 7\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(folder)
    slurm = ("--engine", "datatrove", "--executor", "slurm", "--partition", "cpu", "--tasks", "2")
    result = run_cli("prepare", corpus, "--out", tmp_path / "out", *slurm, "--json", "--quiet")
    assert result.code == 0, result.err
    assert result.json == {"folder": str(tmp_path / "out"), "submitted": True}
    assert result.err == ""
    scripts = (tmp_path / "scripts").read_text(encoding="utf-8")
    assert "--array=0-1%2" in scripts
    assert f"cd '{folder}'" in scripts
