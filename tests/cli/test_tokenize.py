"""`tinylm tokenize` as one uses it: every verb in both forms, and the mistakes that one makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Here, complaint

from tinylm.run import Run


@pytest.fixture(scope="module")
def tokenizer(tiny_run: Run) -> Path:
    return tiny_run.path / "tokenizer.json"


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "word"])
def test_every_kind_is_trained_with_its_fingerprint_shown(here: Here, kind: str, text_file: Path, tmp_path: Path) -> None:
    options = ("--kind", kind, "--vocab-size", 700, "--normalize", "nfc", "--normalize", "lowercase", "--added", "for the")
    first = here("tokenize", "train", text_file, "--out", tmp_path / "a.json", *options, "--json")
    second = here("tokenize", "train", text_file, "--out", tmp_path / "b.json", *options)
    assert first.json["kind"] == kind
    assert first.json["fingerprint"][:12] in second.err
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_vocabulary_too_large_names_the_largest_and_allow_smaller_takes_it(here: Here, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("low lower lowest " * 20)
    train = ("tokenize", "train", tmp_path / "a.txt", "--out", tmp_path / "t.json")
    told = complaint(here(*train))
    assert "the text does not support 8,192 tokens: the largest vocabulary that fits has" in told
    assert not (tmp_path / "t.json").exists()
    assert here(*train, "--allow-smaller", "--json").json["vocab_size"] < 300


def test_the_run_in_the_environment_is_used(here: Here, tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLM_RUN", str(tiny_run.path))
    ids = here("tokenize", "encode", stdin=b"The for statement")
    assert ids.out.split() == [str(id) for id in tiny_run.tokenizer.encode("The for statement")]
    assert here("tokenize", "decode", stdin=ids.out.encode()).out == "The for statement"


def test_special_tokens_are_text_unless_allowed(here: Here, tokenizer: Path) -> None:
    encode = ("tokenize", "encode", "-t", tokenizer)
    text = b"a<|endoftext|>b"
    end = str(399)
    assert end not in here(*encode, stdin=text).out.split()
    assert here(*encode, "--allow-special", stdin=text).out.split()[1] == end
    seeded = [here(*encode, "--dropout", 0.5, "--seed", seed, stdin=b"the statement is nested").out for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]


def test_a_report_tells_lines_that_do_not_come_back_and_every_file(here: Here, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("some words here\n" * 30)
    (folder / "b.txt").write_text("some wörds here\n")
    path = tmp_path / "char.json"
    assert here("tokenize", "train", folder / "a.txt", "--kind", "char", "--out", path).code == 0
    report = ("tokenize", "report", folder, "-t", path, "--no-baselines")
    found = here(*report, "--json").json
    assert found["round_trip_failures"] == 1
    assert found["failures"][0]["text"] == "some wörds here\n"
    assert [Path(file["name"]).name for file in found["files"]] == ["a.txt", "b.txt"]
    assert found["baselines"] == {"bytes": 1.0, "gpt2_style": None}
    shown = here(*report).out
    assert "came back as" in shown
    assert "b.txt" in shown


def test_a_report_compares_with_a_stock_vocabulary_of_the_same_size(
    here: Here, tokenizer: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinylm.tokenizer.report.BASELINE_TEXT", str(text_file))
    found = here("tokenize", "report", text_file, "-t", tokenizer, "--json").json
    assert found["baselines"]["gpt2_style"] == pytest.approx(found["bytes_per_token"], rel=0.1)
    assert "GPT-2-style" in here("tokenize", "report", text_file, "-t", tokenizer).out


def test_compare_explain_and_sweep_answer_in_both_forms(here: Here, tokenizer: Path, text_file: Path, tmp_path: Path) -> None:
    both = here("tokenize", "compare", tokenizer, tokenizer.parent, "--on", text_file, "--json").json
    assert both[0]["tokens"] == both[1]["tokens"]
    assert "bytes per token" in here("tokenize", "compare", tokenizer, "--on", text_file).out
    page = tmp_path / "page.html"
    story = here("tokenize", "explain", "The statement", "-t", tokenizer, "--html", page, "--json").json
    assert "".join(token["text"] for word in story["words"] for token in word["tokens"]) == "The statement"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "merge 1" in here("tokenize", "explain", "The statement", "-t", tokenizer).out
    swept = ("tokenize", "sweep", text_file, "--sizes", "300,600")
    assert [size["vocab_size"] for size in here(*swept, "--json").json["sizes"]] == [300, 600]
    assert "MFLOP" in here(*swept, "--plot", tmp_path / "sweep.png").out
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_tokens_are_added_and_removed_with_proof(
    here: Here, tokenizer: Path, tiny_run: Run, text_file: Path, tmp_path: Path
) -> None:
    proof = ("--prove-on", text_file)
    added = here("tokenize", "add", "zebra", "-t", tokenizer, "--out", tmp_path / "a.json", *proof, "--json").json
    assert (added["vocab_size"], added["lines_same"]) == (401, added["lines_checked"])
    removed = here("tokenize", "remove", "zebra", "-t", tmp_path / "a.json", "--out", tmp_path / "b.json", *proof)
    assert removed.code == 0
    assert "encode as before" in removed.err
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads(tokenizer.read_text())
    assert here("tokenize", "add", "zebra", "-r", tiny_run.path, "--out", tmp_path / "run", *proof).code == 0
    assert here("eval", "-r", tmp_path / "run", "--json").json["tokens"] > 0
    assert "exists already" in complaint(here("tokenize", "add", "b", "-t", tokenizer, "--out", tmp_path / "a.json", *proof))
    assert "is no token" in complaint(here("tokenize", "remove", "zzzz", "-t", tokenizer, "--out", tmp_path / "c.json", *proof))
