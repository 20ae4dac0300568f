"""Test `tinylm fill`, `tinylm classify`, and `tinylm eval` with masked language models and classifiers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from command import RunCli
from encoders import classifier_recipe, masked_recipe

from tinylm.embedding.sentences import sentence_vectors
from tinylm.pipeline import train
from tinylm.run import Run

LINES = ["the apple is red", "a saw", "the apple is green", "no"]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fill")
    train(masked_recipe(folder), folder / "run", device="cpu")
    return folder / "run"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classify")
    train(classifier_recipe(folder), folder / "run", device="cpu")
    return folder / "run"


def test_fill_prints_candidates_and_fills_lines_from_a_pipe(run_cli: RunCli, masked: Path) -> None:
    one = run_cli("fill", "The [MASK]aw", "--run", masked, "--top", "3", "--json")
    assert one.code == 0, one.err
    document = json.loads(one.out)
    [mask] = document["masks"]
    assert document["text"] == "The [MASK]aw"
    assert len(mask["candidates"]) == 3
    assert mask["candidates"][0]["probability"] >= mask["candidates"][1]["probability"]
    piped = run_cli("fill", "-", "--run", masked, stdin=b"a [MASK]\n\nb [MASK]\n")
    assert len(piped.out.split("\n")) == 3
    unmasked = run_cli("fill", "-", "--run", masked, stdin=b"\na [MASK]\nb\n")
    assert "-:3: the text has no [MASK]" in unmasked.err
    assert "--top: requires --json" in run_cli("fill", "-", "--top", "2", "--run", masked, stdin=b"a [MASK]\n").err
    assert "invalid value for '--top' / '-k': must be at least 1 (" in run_cli("fill", "a [MASK]", "--top", "0").err
    wrong = run_cli("fill", "no mask", "--run", masked)
    assert wrong.code == 2
    assert "has no [MASK]" in wrong.err


def test_eval_prints_the_metrics_of_a_masked_language_model(run_cli: RunCli, masked: Path) -> None:
    result = run_cli("eval", "--run", masked, "--pseudo", "--max-tokens", "60", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert {"documents", "tokens", "bytes", "masked_accuracy", "masked_loss", "pseudo_perplexity"} <= document.keys()
    assert document["tokens"] == 60
    shown = run_cli("eval", "--run", masked)
    assert "masked accuracy" in shown.out
    unused = run_cli("eval", "--run", masked, "--stride", "4")
    assert unused.code == 2
    assert "--stride: has no effect on a model trained with the masked_lm objective" in unused.err


def test_classify_reads_an_argument_a_pipe_or_a_file(run_cli: RunCli, classifier: Path, tmp_path: Path) -> None:
    one = run_cli("classify", "the saw", "--run", classifier, "--json")
    assert one.code == 0, one.err
    [prediction] = json.loads(one.out)
    assert prediction["text"] == "the saw"
    assert set(prediction["probabilities"]) == {"color", "fruit", "tool"}
    assert sum(prediction["probabilities"].values()) == pytest.approx(1)
    piped = run_cli("classify", "-", "--run", classifier, "--calibrated", stdin=b"the saw\n\nred\n")
    assert [line.split("\t")[2] for line in piped.out.splitlines()] == ["the saw", "red"]
    assert "calibrated with temperature" in piped.err
    (tmp_path / "lines.txt").write_text("the saw\nred\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "the saw\\nred"}\n')
    lines, whole, rows = (
        run_cli("classify", "--run", classifier, "--input", tmp_path / file, "--json", *options)
        for file, options in (("lines.txt", ()), ("lines.txt", ("--documents",)), ("rows.jsonl", ()))
    )
    assert [item["text"] for item in json.loads(lines.out)] == ["the saw", "red"]
    assert [item["text"] for item in json.loads(whole.out)] == ["the saw\nred\n"]
    assert [item["text"] for item in json.loads(rows.out)] == ["the saw\nred"]
    wrong = run_cli("classify", "--run", classifier)
    assert wrong.code == 2
    assert "TEXT: requires a text" in wrong.err
    both = run_cli("classify", "a", "--input", tmp_path / "lines.txt", "--run", classifier)
    assert (both.code, both.out) == (2, "")
    assert "--input: cannot be combined with a text" in both.err


def test_commands_reject_the_wrong_kind_of_run(run_cli: RunCli, masked: Path, classifier: Path) -> None:
    assert "not classification" in run_cli("classify", "a", "--run", masked).err
    assert "does not predict masked tokens" in run_cli("fill", "[MASK]", "--run", classifier).err
    assert "use `tinylm classify`" in run_cli("sample", "--prompt", "a", "--run", classifier).err
    assert "use `tinylm fill`" in run_cli("sample", "--prompt", "a", "--run", masked).err


def test_eval_checks_the_file_of_the_plot_before_it_reads_texts(run_cli: RunCli, classifier: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "empty.csv").write_text("text,label\n")
    for plot, problem in ((tmp_path / "a.txt", "the file name must end in .png"), (tmp_path, "is a folder")):
        assert problem in run_cli("eval", tmp_path / "empty.csv", "--run", classifier, "--plot", plot).err


def test_eval_prints_the_metrics_of_a_classifier(run_cli: RunCli, classifier: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    result = run_cli("eval", "--run", classifier, "--json", "--plot", tmp_path / "confusion.png")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["examples"] == 12
    assert set(document["baselines"]) == {"majority", "tfidf_linear"}
    assert set(document["per_label"]["tool"]) == {"precision", "recall", "f1", "count"}
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "other.csv").write_text("text,label\nthe saw,tool\nthe cat,animal\n")
    shown = run_cli("eval", tmp_path / "other.csv", "--run", classifier, "--no-baselines")
    assert shown.code == 0, shown.err
    assert "1 text with a label that the model does not have" in shown.out
    assert re.search(r"\ncalibration +a temperature of [0-9.]+ fits these texts best", shown.out)
    (tmp_path / "unknown.csv").write_text(f"text,label\n{'cat ' * 40},animal\n")
    unknown = run_cli("eval", tmp_path / "unknown.csv", "--run", classifier, "--no-baselines").out
    assert "no text has a label that the model knows" in unknown
    assert "nan" not in unknown
    assert re.search(r"\n.* (cat ){19}cat… *\n", unknown)


@pytest.mark.parametrize("name", ["classifier", "masked"])
def test_compare_tests_the_difference_between_two_models_on_the_same_texts(
    run_cli: RunCli, request: pytest.FixtureRequest, name: str
) -> None:
    metric = {"classifier": "accuracy", "masked": "masked_loss"}[name]
    checkpoints = [request.getfixturevalue(name) / "checkpoints" / step for step in ("step-000003", "step-000006")]
    scores = [run_cli("eval", "--run", path, "--json", "-q").json[metric] for path in checkpoints]
    document = run_cli("compare", *checkpoints, "--json").json
    (test,) = document["tests"]
    assert document["curve_metric"] == metric
    assert [row["name"] for row in document["curves"]] == [3, 6]
    assert [test[f"a_{metric}"], test[f"b_{metric}"]] == pytest.approx(scores)
    assert test["difference"] == pytest.approx(scores[0] - scores[1])
    assert test["ci95"][0] <= test["difference"] <= test["ci95"][1]
    shown = run_cli("compare", *checkpoints).out
    assert "vs. first run" in shown


def test_compare_runs_no_tests_if_the_models_have_different_objectives(run_cli: RunCli, masked: Path, classifier: Path) -> None:
    compared = run_cli("compare", masked, classifier, "--json")
    assert (compared.json["tests"], compared.json["not_tested"]) == ([], "the runs have different objectives")
    assert "the runs have different objectives, so their results are not comparable" in compared.err
    assert "objective.name" in [row["name"] for row in compared.json["recipes"]]


def test_labels_with_line_breaks_and_the_title_of_a_narrow_confusion_matrix_are_printed_on_one_line(
    run_cli: RunCli, tmp_path: Path
) -> None:
    rows = [{"text": f"{word} {number}", "label": label} for number in range(20) for word, label in (("a", "x\ty"), ("b", "z\nz"))]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    recipe = classifier_recipe(tmp_path)
    data = recipe.data.model_copy(update={"train": (str(tmp_path / "rows.jsonl"),)})
    train(recipe.model_copy(update={"data": data}), tmp_path / "run", device="cpu")
    lines = run_cli("eval", "--run", tmp_path / "run", "--no-baselines").out.splitlines()
    assert "confusion matrix: rows are true labels, columns are predicted labels" in lines
    assert r"x\ty  z\nz" in map(str.strip, lines)
    label, _, text = run_cli("classify", "a", "--run", tmp_path / "run").out.rstrip("\n").split("\t")
    assert (label in (r"x\ty", r"z\nz"), text) == (True, "a")


def test_the_fields_of_a_file_are_those_of_the_training_texts_or_set_by_options(
    run_cli: RunCli, classifier: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(classifier, tmp_path / "run")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("  text: text\n", "  text: Text\n"))
    (tmp_path / "a.csv").write_text("Text,kind\nthe saw,tool\n")
    (tmp_path / "a.txt").write_text("the saw\n")
    for file in ("a.csv", "a.txt"):
        assert run_cli("classify", "--input", tmp_path / file, "--run", run, "--json").json[0]["text"] == "the saw"
    wrong = run_cli("eval", tmp_path / "a.csv", "--run", run)
    assert "no column 'label'" in wrong.err
    assert "(choose the fields with --field and --label; in a recipe, with data.text and data.label" in wrong.err
    for path, options in ((run, ()), (classifier, ("--field", "Text"))):
        result = run_cli("eval", tmp_path / "a.csv", "--run", path, "--label", "kind", *options, "--no-baselines", "--json")
        assert result.json["examples"] == 1, result.err


def test_empty_and_truncated_texts_are_reported(run_cli: RunCli, classifier: Path, masked: Path, tmp_path: Path) -> None:
    for text in ("", "  "):
        assert "TEXT: the text is empty" in run_cli("classify", text, "--run", classifier).err
    for stdin in (b"", b"\n \n"):
        empty = run_cli("classify", "-", "--run", classifier, stdin=stdin)
        assert (empty.code, empty.out) == (2, "")
        assert "standard input is empty" in empty.err
    (tmp_path / "empty.txt").write_text("\n \n")
    for option in ((), ("--json",), ("--documents",)):
        empty = run_cli("classify", "--input", tmp_path / "empty.txt", "--run", classifier, *option)
        assert (empty.code, empty.out) == (2, "")
        assert "empty.txt: contains no text to classify" in empty.err
    note = "1 empty text skipped, 1 text truncated to 14 tokens"
    texts = ["the\u2028saw\x0c", "", "the saw and the hammer"]
    piped = run_cli("classify", "-", "--run", classifier, "--json", stdin="\r\n".join([*texts, ""]).encode())
    assert [item["text"] for item in piped.json] == [texts[0], texts[2]]
    assert note in piped.err
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps({'text': text, 'label': 'tool'})}\n" for text in texts))
    assert note in run_cli("classify", "--input", tmp_path / "a.jsonl", "--run", classifier).err
    assert note in run_cli("eval", tmp_path / "a.jsonl", "--run", classifier, "--no-baselines").err
    vectors = ("--which", "sentence", "--out", tmp_path / "a.safetensors")
    assert note in run_cli("embed", "from-run", tmp_path / "a.jsonl", "--run", masked, *vectors).err


def test_nearest_finds_the_lines_most_similar_to_a_sentence(run_cli: RunCli, masked: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\n".join([*LINES, "", LINES[0]]) + "\n")
    options = ("--run", masked, "--which", "sentence", "--pool", "mean", "--out", tmp_path / "lines.safetensors", "--json")
    made = run_cli("embed", "from-run", tmp_path / "lines.txt", *options)
    assert made.code == 0, made.err
    assert json.loads(made.out)["names"] == 4
    assert "1 duplicate text skipped: there is one vector for each distinct text" in made.err
    vectors = tmp_path / "lines.safetensors"
    known = json.loads(run_cli("embed", "nearest", LINES[0], "--vectors", vectors, "--json").out)
    assert {neighbor["token"] for neighbor in known["neighbours"]} == {*LINES[1:]}
    new = run_cli("embed", "nearest", "-", "--vectors", vectors, "--json", "-n", "2", stdin=b"the apple is white\nsaw\n")
    assert new.code == 0, new.err
    answers = json.loads(new.out)
    assert [answer["query"] for answer in answers] == ["the apple is white", "saw"]
    matrix = sentence_vectors(Run.open(masked), [*LINES, "the apple is white"], "mean")
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    similarities = matrix[:4] @ matrix[4]
    assert answers[0]["neighbours"][0]["token"] == LINES[int(similarities.argmax())]
    assert answers[0]["neighbours"][0]["similarity"] == pytest.approx(float(similarities.max()), abs=1e-5)
