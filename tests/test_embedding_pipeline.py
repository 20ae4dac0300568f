"""Training vectors as a whole: the same on any number of threads, stopped or not; what its folder holds and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tinylm.embedding.formats import read
from tinylm.embedding.vectors import Vectors
from tinylm.embedding_pipeline import EmbeddingObserver, NeighboursEvent, ProgressEvent, train_embeddings
from tinylm.errors import InputError, WorkError
from tinylm.recipe import EmbeddingRecipe, load_any, loads_any
from tinylm.reporting import CollectingReporter
from tinylm.run import LOCK, Run
from tinylm.training.run_folder import claimed, remove_run

METHODS = ("skipgram", "cbow", "glove")


def recipe(text: Path, *overrides: str) -> EmbeddingRecipe:
    base = f"kind: embeddings\ndata: {{train: {text}}}\nmethod: {{dimensions: 16, epochs: 8}}\nwatch: {{probes: [object, class]}}\n"
    loaded = loads_any(base, overrides)
    assert isinstance(loaded, EmbeddingRecipe)
    return loaded


@pytest.fixture(scope="module")
def reference(english: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "reference.txt"
    path.write_text(english[:200_000], encoding="utf-8")
    return path


class Recorder(EmbeddingObserver):
    def __init__(self) -> None:
        self.events: list[ProgressEvent] = []
        self.near: list[NeighboursEvent] = []

    def progress(self, event: ProgressEvent) -> None:
        self.events.append(event)

    def neighbours(self, event: NeighboursEvent) -> None:
        self.near.append(event)


@pytest.mark.parametrize("method", METHODS)
def test_threads_and_interruptions_change_no_bit(reference: Path, tmp_path: Path, method: str) -> None:
    asked = recipe(reference, f"method.name={method}", "checkpoint.every=0.3")
    whole = train_embeddings(asked, tmp_path / "whole", threads=1)
    assert (whole.stopped, whole.step) == ("done", whole.steps)
    stops = 0
    stopped = train_embeddings(asked, tmp_path / "parts", threads=3, stop_after=0)
    while stopped.stopped == "time":
        stops += 1
        assert stopped.vectors is None
        assert stopped.step == stops
        stopped = train_embeddings(asked, tmp_path / "parts", resume=True, threads=2, stop_after=0 if stops < 3 else None)
    assert stops == 3
    for name in ("vectors.safetensors", "checkpoints/last"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    last = (tmp_path / "whole" / "checkpoints" / "last").read_text().strip()
    tables = [tmp_path / run / "checkpoints" / last / "model.safetensors" for run in ("whole", "parts")]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    assert whole.tokens == stopped.tokens


@pytest.mark.parametrize("method", METHODS)
def test_what_a_training_leaves_and_tells(reference: Path, tmp_path: Path, method: str) -> None:
    asked, watching = recipe(reference, f"method.name={method}"), Recorder()
    result = train_embeddings(asked, tmp_path / "run", threads=1, observer=watching)
    vectors = read(tmp_path / "run")
    assert (len(vectors), vectors.dimensions) == (result.names, 16)
    assert vectors.counts is not None
    assert list(vectors.counts) == sorted(vectors.counts, reverse=True)
    assert load_any(tmp_path / "run" / "recipe.yaml") == asked
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [event.step for event in watching.events]
    assert lines[-1]["step"] == result.steps
    assert lines[-1]["loss"] < lines[0]["loss"]
    near = [json.loads(line) for line in (tmp_path / "run" / "neighbours.jsonl").read_text().splitlines()]
    assert [line["neighbours"].keys() for line in near] == [{"object", "class"}] * len(near)
    assert near[-1]["neighbours"]["object"] == [one.token for one in vectors.nearest("object", 5)]
    assert len(watching.near) == len(near) >= 8
    assert len(Run(tmp_path / "run").checkpoints()) == 1


def test_related_words_are_nearer_than_chance(english: str, tmp_path: Path) -> None:
    """A word's plural is among its ten nearest far more often than among ten drawn at random."""
    path = tmp_path / "reference.txt"
    path.write_text(english, encoding="utf-8")
    train_embeddings(recipe(path, "method.epochs=30", "method.dimensions=50", "checkpoint.every=0"), tmp_path / "run", threads=1)
    vectors = read(tmp_path / "run")
    pairs = [(name, f"{name}s") for name in vectors.names if len(name) > 3 and f"{name}s" in vectors.index]
    found = np.mean([plural in [one.token for one in vectors.nearest(name, 10)] for name, plural in pairs])
    chance = 10 / (len(vectors) - 1)
    assert len(pairs) > 100
    assert found > 20 * chance


def test_nothing_of_another_recipe_or_text_is_gone_on_with(reference: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(reference.read_text())
    train_embeddings(recipe(text), tmp_path / "run", threads=1, stop_after=0)
    with pytest.raises(InputError, match=r"method\.window: 5 -> 4"):
        train_embeddings(recipe(text, "method.window=4"), tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="--resume goes on"):
        train_embeddings(recipe(text), tmp_path / "run")
    text.write_text(reference.read_text() + " object" * 10)
    with pytest.raises(InputError, match="the text is not the one"):
        train_embeddings(recipe(text), tmp_path / "run", resume=True)
    anew = train_embeddings(recipe(text, "method.window=4"), tmp_path / "run", overwrite=True, threads=1)
    assert anew.stopped == "done"


def test_a_damaged_checkpoint_is_told(reference: Path, tmp_path: Path) -> None:
    train_embeddings(recipe(reference), tmp_path / "run", threads=1, stop_after=0)
    file = next((tmp_path / "run" / "checkpoints").glob("step-*/model.safetensors"))
    file.write_bytes(file.read_bytes()[:-4] + b"oops")
    reporter = CollectingReporter()
    with pytest.raises(InputError, match="no whole checkpoint"):
        train_embeddings(recipe(reference), tmp_path / "run", resume=True, reporter=reporter)
    assert "is not what was saved" in reporter.warnings[0]


def test_a_run_of_a_language_model_is_left_alone(tiny_run: Run, reference: Path) -> None:
    with pytest.raises(InputError, match="a language model was trained here"):
        train_embeddings(recipe(reference), tiny_run.path, resume=True)


def test_nobody_trains_where_another_does(reference: Path, tmp_path: Path) -> None:
    with claimed(tmp_path / "run", resume=False, overwrite=False):
        with pytest.raises(InputError, match="another process trains into this folder"):
            train_embeddings(recipe(reference), tmp_path / "run", overwrite=True)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_beginning_anew_leaves_nothing_of_what_was_there(tiny_run: Run, reference: Path, tmp_path: Path) -> None:
    """Whatever kind it was; but what is the user's stays."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_run.path, folder)
    (folder / "notes.txt").write_text("mine")
    train_embeddings(recipe(reference), folder, overwrite=True, threads=1)
    embeddings = {"recipe.yaml", "metrics.jsonl", "neighbours.jsonl", "vectors.safetensors", "checkpoints", LOCK}
    assert {path.name for path in folder.iterdir()} == {*embeddings, "notes.txt"}
    remove_run(folder)
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", LOCK, "notes.txt"}


def test_a_link_that_leads_out_is_not_followed(reference: Path, tmp_path: Path) -> None:
    train_embeddings(recipe(reference), tmp_path / "run", threads=1, stop_after=0)
    shutil.move(tmp_path / "run" / "checkpoints", tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="leads out of the run folder"):
        train_embeddings(recipe(reference), tmp_path / "run", resume=True)


def test_an_unknown_probe_is_told_before_training(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"watch\.probes: no vector for 'objct'.*did you mean object\?"):
        train_embeddings(recipe(reference, "watch.probes=[objct]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_loss_that_is_no_number_ends_the_training(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="no longer a number"):
        train_embeddings(recipe(reference, "method.name=glove", "method.lr=1e30"), tmp_path / "run", threads=1)


def test_tokens_get_vectors_under_names_that_can_be_asked(tiny_run: Run, text_file: Path, tmp_path: Path) -> None:
    train_embeddings(
        recipe(text_file, f"vocabulary.tokenizer={tiny_run.path}", "vocabulary.min_count=3", "watch.probes=[]"), tmp_path / "run"
    )
    vectors = read(tmp_path / "run")
    assert isinstance(vectors, Vectors)
    assert vectors.byte_mapped
    assert vectors.find(" the") is not None
    assert vectors.find("\n") is not None
