"""End-to-end embedding training: results do not depend on threads or interruptions, and run-folder problems are reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tinylm.embedding.formats import read
from tinylm.embedding.vectors import Vectors
from tinylm.embedding_pipeline import EmbeddingObserver, NeighborsEvent, ProgressEvent, train_embeddings
from tinylm.errors import InputError, WorkError
from tinylm.recipe import EmbeddingRecipe, load_any, loads_any
from tinylm.reporting import CollectingReporter
from tinylm.run import LOCK, Run
from tinylm.training.run_folder import locked_run_folder, remove_run

METHODS = ("skipgram", "cbow", "glove")


def embedding_recipe(text: Path, *overrides: str) -> EmbeddingRecipe:
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
        self.neighbor_events: list[NeighborsEvent] = []

    def progress(self, event: ProgressEvent) -> None:
        self.events.append(event)

    def neighbors(self, event: NeighborsEvent) -> None:
        self.neighbor_events.append(event)


@pytest.mark.parametrize("method", METHODS)
def test_threads_and_interruptions_do_not_change_the_result(reference: Path, tmp_path: Path, method: str) -> None:
    recipe = embedding_recipe(reference, f"method.name={method}", "checkpoint.every=0.3")
    uninterrupted = train_embeddings(recipe, tmp_path / "whole", threads=1)
    assert (uninterrupted.stopped, uninterrupted.step) == ("done", uninterrupted.steps)
    stops = 0
    result = train_embeddings(recipe, tmp_path / "parts", threads=3, stop_after=0)
    while result.stopped == "time":
        stops += 1
        assert result.vectors is None
        assert result.step == stops
        result = train_embeddings(recipe, tmp_path / "parts", resume=True, threads=2, stop_after=0 if stops < 3 else None)
    assert stops == 3
    for name in ("vectors.safetensors", "checkpoints/last"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    last = (tmp_path / "whole" / "checkpoints" / "last").read_text().strip()
    tables = [tmp_path / run / "checkpoints" / last / "model.safetensors" for run in ("whole", "parts")]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    assert uninterrupted.tokens == result.tokens


@pytest.mark.parametrize("method", METHODS)
def test_training_writes_its_files_and_sends_events(reference: Path, tmp_path: Path, method: str) -> None:
    recipe, recorder = embedding_recipe(reference, f"method.name={method}"), Recorder()
    result = train_embeddings(recipe, tmp_path / "run", threads=1, observer=recorder)
    vectors = read(tmp_path / "run")
    assert (len(vectors), vectors.dimensions) == (result.names, 16)
    assert vectors.counts is not None
    assert list(vectors.counts) == sorted(vectors.counts, reverse=True)
    assert load_any(tmp_path / "run" / "recipe.yaml") == recipe
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [event.step for event in recorder.events]
    assert lines[-1]["step"] == result.steps
    assert lines[-1]["loss"] < lines[0]["loss"]
    neighbor_lines = [json.loads(line) for line in (tmp_path / "run" / "neighbours.jsonl").read_text().splitlines()]
    assert [line["neighbours"].keys() for line in neighbor_lines] == [{"object", "class"}] * len(neighbor_lines)
    assert neighbor_lines[-1]["neighbours"]["object"] == [neighbor.token for neighbor in vectors.nearest("object", 5)]
    assert len(recorder.neighbor_events) == len(neighbor_lines) >= 8
    assert len(Run(tmp_path / "run").checkpoints()) == 1


def test_related_words_are_closer_than_chance(english: str, tmp_path: Path) -> None:
    """A word's plural is among its ten nearest neighbors far more often than among ten random words."""
    path = tmp_path / "reference.txt"
    path.write_text(english, encoding="utf-8")
    train_embeddings(
        embedding_recipe(path, "method.epochs=30", "method.dimensions=50", "checkpoint.every=0"), tmp_path / "run", threads=1
    )
    vectors = read(tmp_path / "run")
    pairs = [(name, f"{name}s") for name in vectors.names if len(name) > 3 and f"{name}s" in vectors.index]
    fraction_found = np.mean([plural in [neighbor.token for neighbor in vectors.nearest(name, 10)] for name, plural in pairs])
    chance = 10 / (len(vectors) - 1)
    assert len(pairs) > 100
    assert fraction_found > 20 * chance


def test_a_changed_recipe_or_text_cannot_be_resumed(reference: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(reference.read_text())
    train_embeddings(embedding_recipe(text), tmp_path / "run", threads=1, stop_after=0)
    with pytest.raises(InputError, match=r"method\.window: 5 -> 4"):
        train_embeddings(embedding_recipe(text, "method.window=4"), tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="--resume continues it"):
        train_embeddings(embedding_recipe(text), tmp_path / "run")
    text.write_text(reference.read_text() + " object" * 10)
    with pytest.raises(InputError, match="cannot resume because the text changed"):
        train_embeddings(embedding_recipe(text), tmp_path / "run", resume=True)
    from_scratch = train_embeddings(embedding_recipe(text, "method.window=4"), tmp_path / "run", overwrite=True, threads=1)
    assert from_scratch.stopped == "done"


def test_a_damaged_checkpoint_is_reported(reference: Path, tmp_path: Path) -> None:
    train_embeddings(embedding_recipe(reference), tmp_path / "run", threads=1, stop_after=0)
    file = next((tmp_path / "run" / "checkpoints").glob("step-*/model.safetensors"))
    file.write_bytes(file.read_bytes()[:-4] + b"oops")
    reporter = CollectingReporter()
    with pytest.raises(InputError, match="no complete checkpoint"):
        train_embeddings(embedding_recipe(reference), tmp_path / "run", resume=True, reporter=reporter)
    assert "has changed since it was saved" in reporter.warnings[0]


def test_a_language_model_run_cannot_be_resumed_as_an_embedding_run(tiny_run: Run, reference: Path) -> None:
    with pytest.raises(InputError, match="this folder contains a language model"):
        train_embeddings(embedding_recipe(reference), tiny_run.path, resume=True)


def test_training_in_a_folder_that_is_in_use_is_rejected(reference: Path, tmp_path: Path) -> None:
    with locked_run_folder(tmp_path / "run", resume=False, overwrite=False):
        with pytest.raises(InputError, match="another process is training in this folder"):
            train_embeddings(embedding_recipe(reference), tmp_path / "run", overwrite=True)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_overwriting_removes_the_files_of_the_previous_run(tiny_run: Run, reference: Path, tmp_path: Path) -> None:
    """Overwriting removes any kind of run but keeps the user's files."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_run.path, folder)
    (folder / "notes.txt").write_text("mine")
    train_embeddings(embedding_recipe(reference), folder, overwrite=True, threads=1)
    embeddings = {"recipe.yaml", "metrics.jsonl", "neighbours.jsonl", "vectors.safetensors", "checkpoints", LOCK}
    assert {path.name for path in folder.iterdir()} == {*embeddings, "notes.txt"}
    remove_run(folder)
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", LOCK, "notes.txt"}


def test_a_link_out_of_the_run_folder_is_not_followed(reference: Path, tmp_path: Path) -> None:
    train_embeddings(embedding_recipe(reference), tmp_path / "run", threads=1, stop_after=0)
    shutil.move(tmp_path / "run" / "checkpoints", tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link to a target outside the run folder"):
        train_embeddings(embedding_recipe(reference), tmp_path / "run", resume=True)


def test_an_unknown_probe_is_reported_before_training_starts(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"watch\.probes: 'objct' is not among the .* vectors \(did you mean object\?\)"):
        train_embeddings(embedding_recipe(reference, "watch.probes=[objct]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_non_finite_loss_ends_training(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"the loss is (nan|inf)"):
        train_embeddings(embedding_recipe(reference, "method.name=glove", "method.lr=1e30"), tmp_path / "run", threads=1)


def test_token_vectors_can_be_looked_up_by_text(tiny_run: Run, text_file: Path, tmp_path: Path) -> None:
    train_embeddings(
        embedding_recipe(text_file, f"vocabulary.tokenizer={tiny_run.path}", "vocabulary.min_count=3", "watch.probes=[]"),
        tmp_path / "run",
    )
    vectors = read(tmp_path / "run")
    assert isinstance(vectors, Vectors)
    assert vectors.byte_mapped
    assert vectors.find(" the") is not None
    assert vectors.find("\n") is not None
