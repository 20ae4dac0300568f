"""Test `tinylm embed`: the text and JSON output of each subcommand, and training from options or a recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import RunCli, error_of

from tinylm.embedding.formats import read
from tinylm.run import Run

OPTIONS = ("--dimensions", "16", "--epochs", "2", "--min-count", "2", "--threads", "1", "--seed", "3")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(run_cli: RunCli, folder: Path, text_file: Path) -> Path:
    result = run_cli("embed", "train", text_file, *OPTIONS, "--name", "words", "-q")
    assert result.code == 0, result
    assert result.out == "embeddings/words/vectors.safetensors\n"
    return folder / "embeddings" / "words"


def test_queries_from_arguments_and_standard_input_print_text_or_json(run_cli: RunCli, trained: Path) -> None:
    nearest = run_cli("embed", "nearest", "object", "-n", "3", "--json").json
    assert nearest["query"] == "object"
    assert [set(neighbor) for neighbor in nearest["neighbours"]] == [{"token", "similarity"}] * 3
    table = run_cli("embed", "nearest", "object", "-n", "3")
    assert "using embeddings/words" in table.err
    assert all(neighbor["token"] in table.out for neighbor in nearest["neighbours"])
    results = run_cli("embed", "nearest", "--json", "-q", stdin=b"object\nclass\n").json
    assert [result["query"] for result in results] == ["object", "class"]
    assert len(results[0]["neighbours"]) == 10
    for method in ("3cosadd", "3cosmul"):
        analogy = run_cli("embed", "analogy", "object", "objects", "class", "--method", method, "--json").json
        assert not {neighbor["token"] for neighbor in analogy["neighbours"]} & {"object", "objects", "class"}
    lines = run_cli("embed", "analogy", "-", "--json", stdin=b"object\tobjects\tclass\nclass object objects\n").json
    assert [result["query"] for result in lines] == [["object", "objects", "class"], ["class", "object", "objects"]]
    similarity = run_cli("embed", "similarity", "object", "objects", "--json").json["similarity"]
    assert run_cli("embed", "similarity", "object", "objects").out == f"{similarity:.4f}\n"
    assert len(run_cli("embed", "similarity", stdin=b"object class\nobject object\n").out.splitlines()) == 2
    odd = run_cli("embed", "odd-one-out", "object", "class", "the", "--json").json
    assert odd["odd"] == odd["similarities"][0]["token"]
    assert "-:2: similarity requires two words, not 1" in run_cli("embed", "similarity", stdin=b"object class\nobject\n").err
    assert "standard input contains no queries" in error_of(run_cli("embed", "nearest", "-q", stdin=b""))


def test_training_from_a_recipe_equals_training_from_options(run_cli: RunCli, trained: Path, text_file: Path) -> None:
    recipe = trained.parent.parent / "vectors.yaml"
    shutil.copy(trained / "recipe.yaml", recipe)
    result = run_cli("train", recipe, "--out", "again", "--json", "-q", "--threads", "2").json
    assert result["stopped"] == "done"
    assert Path("again/vectors.safetensors").read_bytes() == (trained / "vectors.safetensors").read_bytes()
    assert "this folder already contains a run" in error_of(run_cli("train", recipe, "--out", "again"))
    stopped = run_cli("train", recipe, "--out", "parts", "--stop-after", "0", "--json", "-q").json
    assert (stopped["stopped"], stopped["vectors"]) == ("time", None)
    assert "no vectors.safetensors in this folder (it is written when training finishes)" in error_of(
        run_cli("embed", "nearest", "object", "-v", "parts")
    )
    assert run_cli("train", "parts", "--resume", "-q").out == "parts/vectors.safetensors\n"
    assert Path("parts/vectors.safetensors").read_bytes() == (trained / "vectors.safetensors").read_bytes()


def test_training_prints_loss_and_neighbors_without_a_terminal(run_cli: RunCli, folder: Path, text_file: Path) -> None:
    result = run_cli("embed", "train", text_file, *OPTIONS, "--method", "glove", "--probe", "object", "--out", "g")
    assert "  object: " in result.err
    assert "pairs/s" in result.err
    assert "loss" in result.err
    assert "'objct' is not among the" in error_of(
        run_cli("embed", "train", text_file, *OPTIONS, "--probe", "objct", "--out", "h", "-q")
    )


def test_import_reverses_export(run_cli: RunCli, trained: Path) -> None:
    original = read(trained)
    for file, options in (("v.vec", ()), ("v.bin", ()), ("v.txt", ("--to", "glove")), ("v.tsv", ()), ("w.safetensors", ())):
        assert run_cli("embed", "export", file, *options, "-q").out == f"{file}\n"
        imported = run_cli("embed", "import", file, "--out", "back.safetensors", "--overwrite", "--json").json
        assert (imported["names"], imported["dimensions"]) == (len(original), 16)
        assert read(Path("back.safetensors")).matrix.tobytes() == original.matrix.tobytes()
        assert (
            run_cli("embed", "nearest", "object", "-v", file, "--json").json == run_cli("embed", "nearest", "object", "--json").json
        )


def test_eval_reports_coverage(run_cli: RunCli, trained: Path) -> None:
    Path("a.txt").write_text(": s\nobject objects class classes\nking queen man woman\n")
    Path("s.csv").write_text("object,class,7\nclass,the,2\nobject,the,1.5\nking,queen,9\n")
    evaluations = run_cli("embed", "eval", "a.txt", "s.csv", "--json").json
    assert {"correct", "total", "accuracy", "coverage"} <= set(evaluations[0]["analogies"])
    assert (evaluations[0]["analogies"]["covered"], evaluations[0]["analogies"]["coverage"]) == (1, 0.5)
    assert {"pairs", "covered", "spearman", "pearson"} <= set(evaluations[1]["similarity"])
    assert (evaluations[1]["similarity"]["covered"], evaluations[1]["similarity"]["pairs"]) == (3, 4)
    assert "coverage  50.0%: 1 of 2 questions" in run_cli("embed", "eval", "a.txt").out


def test_vectors_from_a_run_can_be_plotted_exported_and_queried(
    run_cli: RunCli, folder: Path, tiny_run: Run, text_file: Path
) -> None:
    assert run_cli("embed", "from-run", "--run", tiny_run.path, "--out", "in.safetensors", "-q").out == "in.safetensors\n"
    nearest = run_cli("embed", "nearest", " the", "-v", "in.safetensors", "--json").json
    assert nearest["query"] == " the"
    assert run_cli("embed", "plot", "map.html", "-v", "in.safetensors", "--json").json["names"] == tiny_run.tokenizer.vocab_size
    assert "atob(" in Path("map.html").read_text()
    Path("short.txt").write_text(text_file.read_text()[:2000])
    contextual = ("embed", "from-run", "short.txt", "--run", tiny_run.path, "--which", "contextual", "--layer", "1")
    document = run_cli(*contextual, "--words", "--min-count", "2", "--out", "c.safetensors", "--json", "-q").json
    assert document["dimensions"] == 32
    assert run_cli("embed", "export", "t.vec", "-v", "in.safetensors", "--json").json["byte_mapped"] is False
    assert run_cli("embed", "import", "t.vec", "--tokens", "--out", "t.safetensors").code == 0
    assert json.dumps(run_cli("embed", "nearest", " the", "-v", "t.safetensors", "--json").json) == json.dumps(nearest)


def test_vectors_from_a_run_can_be_queried_in_every_format(run_cli: RunCli, folder: Path, tiny_run: Run) -> None:
    nearest = []
    for name in ("x.vec", "x.txt", "x.bin", "x.tsv", "x.safetensors"):
        assert run_cli("embed", "from-run", "-r", tiny_run.path, "--out", name, "-q").out == f"{name}\n"
        found = run_cli("embed", "nearest", " the", "-v", name, "-n", "3", "--json").json
        nearest.append([neighbor["similarity"] for neighbor in found["neighbours"]])
    assert all(similarities == pytest.approx(nearest[-1], abs=1e-6) for similarities in nearest)
    for name in ("x.kv", "x.vec.gz", "x"):
        assert "the suffix" in error_of(run_cli("embed", "from-run", "-r", tiny_run.path, "--out", name, "-q"))
        assert not Path(name).exists()


def test_embeddings_are_rejected_where_a_language_model_is_required(run_cli: RunCli, trained: Path) -> None:
    for command in (["eval", "--run", trained], ["sample", "--run", trained, "--prompt", "a"], ["compare", trained, trained]):
        assert "contains embeddings, not a language model" in error_of(run_cli(*command))
    assert run_cli("plot", trained, "--out", "loss.svg").code == 0
    shutil.copytree(trained, "runs/words")
    assert run_cli("runs", "--json").json == []
