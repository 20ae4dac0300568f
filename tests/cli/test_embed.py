"""`tinylm embed` from the command line: every verb answers, in JSON too, and a recipe does what options do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import Here, complaint

from tinylm.embedding.formats import read
from tinylm.run import Run

OPTIONS = ("--dimensions", "16", "--epochs", "2", "--min-count", "2", "--threads", "1", "--seed", "3")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(here: Here, folder: Path, text_file: Path) -> Path:
    answer = here("embed", "train", text_file, *OPTIONS, "--name", "words", "-q")
    assert answer.code == 0, answer
    assert answer.out == "embeddings/words/vectors.safetensors\n"
    return folder / "embeddings" / "words"


def test_the_verbs_that_ask(here: Here, trained: Path) -> None:
    found = here("embed", "nearest", "object", "-n", "3", "--json").json
    assert found["query"] == "object"
    assert [set(one) for one in found["neighbours"]] == [{"token", "similarity"}] * 3
    said = here("embed", "nearest", "object", "-n", "3")
    assert "using embeddings/words" in said.err
    assert all(one["token"] in said.out for one in found["neighbours"])
    several = here("embed", "nearest", "--json", "-q", stdin=b"object\nclass\n").json
    assert [one["query"] for one in several] == ["object", "class"]
    assert len(several[0]["neighbours"]) == 10
    for method in ("3cosadd", "3cosmul"):
        analogy = here("embed", "analogy", "object", "objects", "class", "--method", method, "--json").json
        assert not {one["token"] for one in analogy["neighbours"]} & {"object", "objects", "class"}
    lines = here("embed", "analogy", "-", "--json", stdin=b"object\tobjects\tclass\nclass object objects\n").json
    assert [one["query"] for one in lines] == [["object", "objects", "class"], ["class", "object", "objects"]]
    similarity = here("embed", "similarity", "object", "objects", "--json").json["similarity"]
    assert here("embed", "similarity", "object", "objects").out == f"{similarity:.4f}\n"
    assert len(here("embed", "similarity", stdin=b"object class\nobject object\n").out.splitlines()) == 2
    odd = here("embed", "odd-one-out", "object", "class", "the", "--json").json
    assert odd["odd"] == odd["similarities"][0]["token"]
    assert "-:2: similarity takes two words, not 1" in here("embed", "similarity", stdin=b"object class\nobject\n").err
    assert "nothing was asked" in complaint(here("embed", "nearest", "-q", stdin=b""))


def test_a_recipe_is_the_options_and_train_takes_it(here: Here, trained: Path, text_file: Path) -> None:
    recipe = trained.parent.parent / "vectors.yaml"
    shutil.copy(trained / "recipe.yaml", recipe)
    result = here("train", recipe, "--out", "again", "--json", "-q", "--threads", "2").json
    assert result["stopped"] == "done"
    assert Path("again/vectors.safetensors").read_bytes() == (trained / "vectors.safetensors").read_bytes()
    assert "there is a run here already" in complaint(here("train", recipe, "--out", "again"))
    stopped = here("train", recipe, "--out", "parts", "--stop-after", "0", "--json", "-q").json
    assert (stopped["stopped"], stopped["vectors"]) == ("time", None)
    assert "has its training ended?" in complaint(here("embed", "nearest", "object", "-v", "parts"))
    assert here("train", "parts", "--resume", "-q").out == "parts/vectors.safetensors\n"
    assert Path("parts/vectors.safetensors").read_bytes() == (trained / "vectors.safetensors").read_bytes()


def test_training_shows_its_loss_and_neighbours_off_a_terminal(here: Here, folder: Path, text_file: Path) -> None:
    answer = here("embed", "train", text_file, *OPTIONS, "--method", "glove", "--probe", "object", "--out", "g")
    assert "  object: " in answer.err
    assert "pairs/s" in answer.err
    assert "loss" in answer.err
    assert "no vector for 'objct'" in complaint(here("embed", "train", text_file, *OPTIONS, "--probe", "objct", "--out", "h", "-q"))


def test_export_and_import_are_each_other_undone(here: Here, trained: Path) -> None:
    original = read(trained)
    for file, options in (("v.vec", ()), ("v.bin", ()), ("v.txt", ("--to", "glove")), ("v.tsv", ()), ("w.safetensors", ())):
        assert here("embed", "export", file, *options, "-q").out == f"{file}\n"
        found = here("embed", "import", file, "--out", "back.safetensors", "--overwrite", "--json").json
        assert (found["names"], found["dimensions"]) == (len(original), 16)
        assert read(Path("back.safetensors")).matrix.tobytes() == original.matrix.tobytes()
        assert here("embed", "nearest", "object", "-v", file, "--json").json == here("embed", "nearest", "object", "--json").json


def test_eval_says_what_it_covers(here: Here, trained: Path) -> None:
    Path("a.txt").write_text(": s\nobject objects class classes\nking queen man woman\n")
    Path("s.csv").write_text("object,class,7\nclass,the,2\nobject,the,1.5\nking,queen,9\n")
    answers = here("embed", "eval", "a.txt", "s.csv", "--json").json
    assert {"correct", "total", "accuracy", "coverage"} <= set(answers[0]["analogies"])
    assert (answers[0]["analogies"]["covered"], answers[0]["analogies"]["coverage"]) == (1, 0.5)
    assert {"pairs", "covered", "spearman", "pearson"} <= set(answers[1]["similarity"])
    assert (answers[1]["similarity"]["covered"], answers[1]["similarity"]["pairs"]) == (3, 4)
    assert "coverage   50.0%: 1 of 2" in here("embed", "eval", "a.txt").out


def test_plot_from_run_and_tokens(here: Here, folder: Path, tiny_run: Run, text_file: Path) -> None:
    assert here("embed", "from-run", "--run", tiny_run.path, "--out", "in.safetensors", "-q").out == "in.safetensors\n"
    found = here("embed", "nearest", " the", "-v", "in.safetensors", "--json").json
    assert found["query"] == " the"
    assert here("embed", "plot", "map.html", "-v", "in.safetensors", "--json").json["names"] == tiny_run.tokenizer.vocab_size
    assert "atob(" in Path("map.html").read_text()
    Path("short.txt").write_text(text_file.read_text()[:2000])
    contextual = ("embed", "from-run", "short.txt", "--run", tiny_run.path, "--which", "contextual", "--layer", "1")
    document = here(*contextual, "--words", "--min-count", "2", "--out", "c.safetensors", "--json", "-q").json
    assert document["dimensions"] == 32
    assert here("embed", "export", "t.vec", "-v", "in.safetensors", "--json").json["byte_mapped"] is False
    assert here("embed", "import", "t.vec", "--tokens", "--out", "t.safetensors").code == 0
    assert json.dumps(here("embed", "nearest", " the", "-v", "t.safetensors", "--json").json) == json.dumps(found)


def test_embeddings_are_no_language_model(here: Here, trained: Path) -> None:
    for verb in (["eval", "--run", trained], ["sample", "--run", trained, "--prompt", "a"], ["compare", trained, trained]):
        assert "holds embeddings, not a language model" in complaint(here(*verb))
    assert here("plot", trained, "--out", "loss.svg").code == 0
    shutil.copytree(trained, "runs/words")
    assert here("runs", "--json").json == []
