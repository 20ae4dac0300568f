"""Test `tinylm translate`, and `tinylm eval` and `tinylm compare` with translation models."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

import pytest
from command import COMMAND, RunCli
from pairs import REVERSE, reversed_pairs, write_jsonl

from tinylm.pipeline import train
from tinylm.recipe import loads
from tinylm.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("translate")
    pairs = write_jsonl(folder / "pairs.jsonl", reversed_pairs(200))
    train(loads(REVERSE.format(pairs=pairs, preset="modern", steps=2)), folder / "run", device="cpu")
    return Run.open(folder / "run")


def test_translate_prints_one_line_for_every_input_line(run: Run, run_cli: RunCli) -> None:
    result = run_cli("translate", "--run", run.path, stdin=b"a b c\n\nd e f\r\n" + b"a " * 40 + b"\n")
    assert result.code == 0, result.err
    lines = result.out.split("\n")
    assert len(lines) == 5
    assert lines[1] == ""
    assert "line 2 is empty" in result.err
    assert "line 4 is longer than the model's context: truncated from 40 to 11 tokens" in result.err


def test_translate_prints_the_same_number_of_lines_for_every_input_line(run: Run, run_cli: RunCli) -> None:
    result = run_cli("translate", "--run", run.path, "-n", "3", stdin=b"a b\n\nc\n")
    lines = result.out.split("\n")
    assert len(lines) == 10
    assert lines[3:6] == ["0.0000\t", "\t", "\t"]


def test_translate_answers_each_line_of_a_pipe(run: Run) -> None:
    command = [*COMMAND, "translate", "--run", str(run.path), "--quiet"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in (b"a b\n", b"c d\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline().endswith(b"\n")
        process.stdin.close()


def test_translate_reads_compressed_files_and_skips_a_byte_order_mark(run: Run, run_cli: RunCli, tmp_path: Path) -> None:
    file = tmp_path / "lines.txt.gz"
    file.write_bytes(gzip.compress(b"\xef\xbb\xbfa b\n"))
    result = run_cli("translate", "-i", file, "--run", run.path, "--json")
    assert [document["source"] for document in result.json] == ["a b"]


def test_eval_reads_aligned_files(run: Run, run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "a.de").write_text("a b\nc d\n", encoding="utf-8")
    (tmp_path / "a.en").write_text("b a\nd c\n", encoding="utf-8")
    files = f"{{source: {tmp_path / 'a.de'}, target: {tmp_path / 'a.en'}}}"
    result = run_cli("eval", files, "--run", run.path, "--json")
    assert result.code == 0, result.err
    assert result.json["pairs"] == 2
    invalid = run_cli("eval", "{source: a}", "--run", run.path)
    assert "must have the form {source: FILE, target: FILE}" in invalid.err


def test_translate_prints_several_translations_with_scores_and_an_alignment(run: Run, run_cli: RunCli) -> None:
    result = run_cli("translate", "a b c", "--run", run.path, "-n", "2", "--beams", "3", "--attention", "--json")
    assert result.code == 0, result.err
    [document] = result.json
    assert document["source"] == "a b c"
    first, second = document["translations"]
    assert first["score"] >= second["score"]
    assert len(document["alignment"]) == first["tokens"] - (first["finish_reason"] == "end")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "--top-k", "3"), "--top-k: requires --temperature"),
        (("a", "--beams", "2", "-n", "3"), "--beams: must be at least -n (3)"),
        (("a", "--to", "de"), "the model has no target language 'de'"),
        (("a", "--average", "9"), "--average: cannot average 9 checkpoints"),
        (("a", "--input", "b.txt"), "--input: cannot be combined with a text"),
    ],
)
def test_translate_rejects_options_without_effect(run: Run, run_cli: RunCli, arguments: tuple[str, ...], message: str) -> None:
    result = run_cli("translate", *arguments, "--run", run.path)
    assert result.code == 2
    assert message in result.err


def test_compare_prints_the_difference_in_bleu(run: Run, run_cli: RunCli) -> None:
    result = run_cli("compare", run.path, run.path, "--json")
    assert result.code == 0, result.err
    [test] = result.json["tests"]
    assert (test["a"], test["b"]) == (str(run.path), str(run.path))
    assert test["a_bleu"] == test["b_bleu"]
    assert test["difference"] == 0
    assert test["ci95"] == [0, 0]


def test_eval_prints_the_metrics_of_a_translation_model(run: Run, run_cli: RunCli) -> None:
    result = run_cli("eval", "--run", run.path, "--max-pairs", "8", "--json")
    assert result.code == 0, result.err
    assert {"pairs", "bleu", "bleu_ci95", "bleu_signature", "chrf", "loss", "baselines"} <= result.json.keys()
    assert set(result.json["baselines"]) == {"copy", "memory", "word_by_word"}
    shown = run_cli("eval", "--run", run.path, "--max-pairs", "8", "--no-baselines")
    assert "signature" in shown.out
    invalid = run_cli("eval", "--run", run.path, "--stride", "4")
    assert invalid.code == 2
    assert "has no effect" in invalid.err
