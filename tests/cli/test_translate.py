"""Test `tinylm translate`, and `tinylm eval` and `tinylm compare` with translation models."""

from __future__ import annotations

import pytest
from command import RunCli
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
