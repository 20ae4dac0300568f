"""Test every `tinylm tokenize` subcommand with text and JSON output, and its error messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import RunCli, error_of

from tinylm.run import Run


@pytest.fixture(scope="module")
def tokenizer(tiny_run: Run) -> Path:
    return tiny_run.path / "tokenizer.json"


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "word"])
def test_train_prints_the_fingerprint_and_is_reproducible(run_cli: RunCli, kind: str, text_file: Path, tmp_path: Path) -> None:
    options = ("--kind", kind, "--vocab-size", 700, "--normalize", "nfc", "--normalize", "lowercase", "--added", "for the")
    first = run_cli("tokenize", "train", text_file, "--out", tmp_path / "a.json", *options, "--json")
    second = run_cli("tokenize", "train", text_file, "--out", tmp_path / "b.json", *options)
    assert first.json["kind"] == kind
    assert first.json["fingerprint"][:12] in second.err
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_error_for_a_vocabulary_that_is_too_large_shows_the_largest_possible_size(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("low lower lowest " * 20)
    train = ("tokenize", "train", tmp_path / "a.txt", "--out", tmp_path / "t.json")
    message = error_of(run_cli(*train))
    assert "the text is too small for 8,192 tokens: the largest vocabulary that fits has" in message
    assert not (tmp_path / "t.json").exists()
    assert run_cli(*train, "--allow-smaller", "--json").json["vocab_size"] < 300


def test_the_run_in_the_environment_variable_is_used(run_cli: RunCli, tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLM_RUN", str(tiny_run.path))
    ids = run_cli("tokenize", "encode", stdin=b"The for statement")
    assert ids.out.split() == [str(id) for id in tiny_run.tokenizer.encode("The for statement")]
    assert run_cli("tokenize", "decode", stdin=ids.out.encode()).out == "The for statement"


def test_special_tokens_are_encoded_as_text_without_allow_special(run_cli: RunCli, tokenizer: Path) -> None:
    encode = ("tokenize", "encode", "-t", tokenizer)
    text = b"a<|endoftext|>b"
    end = str(399)
    assert end not in run_cli(*encode, stdin=text).out.split()
    assert run_cli(*encode, "--allow-special", stdin=text).out.split()[1] == end
    seeded = [run_cli(*encode, "--dropout", 0.5, "--seed", seed, stdin=b"the statement is nested").out for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]


def test_a_report_lists_round_trip_failures_and_files(run_cli: RunCli, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("some words here\n" * 30)
    (folder / "b.txt").write_text("some wörds here\n")
    path = tmp_path / "char.json"
    assert run_cli("tokenize", "train", folder / "a.txt", "--kind", "char", "--out", path).code == 0
    report = ("tokenize", "report", folder, "-t", path, "--no-baselines")
    document = run_cli(*report, "--json").json
    assert document["round_trip_failures"] == 1
    assert document["failures"][0]["text"] == "some wörds here\n"
    assert [Path(file["name"]).name for file in document["files"]] == ["a.txt", "b.txt"]
    assert document["baselines"] == {"bytes": 1.0, "gpt2_style": None}
    output = run_cli(*report).out
    assert "is decoded as" in output
    assert "b.txt" in output


def test_a_report_compares_with_a_gpt2_style_vocabulary_of_the_same_size(
    run_cli: RunCli, tokenizer: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinylm.tokenizer.report.BASELINE_TEXT", str(text_file))
    document = run_cli("tokenize", "report", text_file, "-t", tokenizer, "--json").json
    assert document["baselines"]["gpt2_style"] == pytest.approx(document["bytes_per_token"], rel=0.1)
    assert "GPT-2-style" in run_cli("tokenize", "report", text_file, "-t", tokenizer).out


def test_compare_explain_and_sweep_print_text_and_json(run_cli: RunCli, tokenizer: Path, text_file: Path, tmp_path: Path) -> None:
    both = run_cli("tokenize", "compare", tokenizer, tokenizer.parent, "--on", text_file, "--json").json
    assert both[0]["tokens"] == both[1]["tokens"]
    assert "bytes per token" in run_cli("tokenize", "compare", tokenizer, "--on", text_file).out
    page = tmp_path / "page.html"
    explanation = run_cli("tokenize", "explain", "The statement", "-t", tokenizer, "--html", page, "--json").json
    assert "".join(token["text"] for word in explanation["words"] for token in word["tokens"]) == "The statement"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "merge 1" in run_cli("tokenize", "explain", "The statement", "-t", tokenizer).out
    swept = ("tokenize", "sweep", text_file, "--sizes", "300,600")
    assert [size["vocab_size"] for size in run_cli(*swept, "--json").json["sizes"]] == [300, 600]
    assert "MFLOP" in run_cli(*swept, "--plot", tmp_path / "sweep.png").out
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_added_and_removed_tokens_do_not_change_the_encoding_of_other_text(
    run_cli: RunCli, tokenizer: Path, tiny_run: Run, text_file: Path, tmp_path: Path
) -> None:
    check = ("--check-on", text_file)
    added = run_cli("tokenize", "add", "zebra", "-t", tokenizer, "--out", tmp_path / "a.json", *check, "--json").json
    assert (added["vocab_size"], added["lines_unchanged"]) == (401, added["lines_checked"])
    removed = run_cli("tokenize", "remove", "zebra", "-t", tmp_path / "a.json", "--out", tmp_path / "b.json", *check)
    assert removed.code == 0
    assert "encoded as before" in removed.err
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads(tokenizer.read_text())
    assert run_cli("tokenize", "add", "zebra", "-r", tiny_run.path, "--out", tmp_path / "run", *check).code == 0
    assert run_cli("eval", "-r", tmp_path / "run", "--json").json["tokens"] > 0
    assert "already exists" in error_of(run_cli("tokenize", "add", "b", "-t", tokenizer, "--out", tmp_path / "a.json", *check))
    assert "is not in the vocabulary" in error_of(
        run_cli("tokenize", "remove", "zzzz", "-t", tokenizer, "--out", tmp_path / "c.json", *check)
    )


def test_export_writes_other_formats_and_prints_what_a_rank_file_lacks(
    run_cli: RunCli, tiny_run: Run, text_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.tiktoken"
    arguments = ("--to", "tiktoken", "--run", tiny_run.path, "--check-on", text_file)
    exported = run_cli("tokenize", "export", file, *arguments, "--json").json
    assert exported["special_tokens"] == {"<|endoftext|>": 399}
    assert (exported["to"], exported["vocab_size"], exported["verified_with"][0]) == ("tiktoken", 400, "tinylm")
    assert "already exists" in error_of(run_cli("tokenize", "export", file, *arguments))
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n")
    ids = [
        run_cli("tokenize", "encode", tmp_path / "text.txt", *option).out
        for option in (("--run", tiny_run.path), ("-t", f"{file}:gpt4"))
    ]
    assert ids[0] == ids[1]
    run_cli("tokenize", "export", tmp_path / "copy.json", "--to", "json", "-t", f"{file}:gpt4")
    assert run_cli("tokenize", "encode", tmp_path / "text.txt", "-t", tmp_path / "copy.json").out == ids[0]
    assert "must be tiktoken or json" in error_of(run_cli("tokenize", "export", file, "--to", "tiktokn"))
