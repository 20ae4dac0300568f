"""A preparation writes the same files with any number of processes, and continues after it was killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinylm.curation import blocks, preparation
from tinylm.curation.blocks import Documents
from tinylm.curation.cleaning import clean
from tinylm.curation.preparation import Preparation
from tinylm.curation.settings import Settings
from tinylm.data.shards import open_shard
from tinylm.errors import InputError
from tinylm.recipe.schema import BpeTokenizer
from tinylm.reporting import CollectingReporter
from tinylm.tokenizer import Tokenizer

FILTERS = ("gopher", "c4", "fineweb")
TOKENIZER = BpeTokenizer(kind="bpe", vocab_size=400)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", 5000)


@pytest.fixture
def corpus(english: str, tmp_path: Path) -> Path:
    """40 documents of different lengths, of which the last 5 repeat others."""
    texts = [clean(english[start * 900 : start * 900 + 300 + 37 * start]) for start in range(35)]
    texts += [texts[0], texts[7], f"{texts[20]} An additional sentence.", texts[3].upper(), texts[34]]
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def settings_for(*sources: Path, **options: Any) -> Settings:
    return Settings(tuple(map(str, sources)), **{"without": FILTERS, "heldout_share": 0.2, "tokenizer": TOKENIZER, **options})


def run(settings: Settings, folder: Path, jobs: int = 1) -> dict[str, Any]:
    return Preparation(settings, folder).run(jobs, lambda report: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def decoded(folder: Path, part: str) -> list[str]:
    shard, tokenizer = open_shard(folder, part), Tokenizer.load(folder / "tokenizer.json")
    assert shard.problem(tokenizer.vocab_size) is None
    return [tokenizer.decode(shard.tokens[start:end]) for start, end in shard.documents()]


@pytest.mark.usefixtures("small_blocks")
def test_three_processes_write_the_same_files_as_one(corpus: Path, tmp_path: Path) -> None:
    settings = settings_for(corpus)
    manifest = run(settings, tmp_path / "one")
    assert run(settings, tmp_path / "three", jobs=3) == manifest
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert sorted(contents(tmp_path / "one")) == [
        ".lock", "heldout.json", "heldout.npy", "manifest.json", "removed.jsonl", "tokenizer.json",
        "train-ngrams.safetensors", "train.json", "train.npy",
    ]  # fmt: skip


@pytest.mark.usefixtures("small_blocks")
def test_the_tokens_are_the_kept_documents_in_their_order(corpus: Path, tmp_path: Path) -> None:
    manifest = run(settings_for(corpus), tmp_path / "out")
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    removed = [json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(entry["document"], entry["rule"], entry["original"]) for entry in removed] == [
        (35, "exact_duplicates", 0),
        (36, "exact_duplicates", 7),
        (37, "near_duplicates", 20),
        (38, "near_duplicates", 3),
        (39, "exact_duplicates", 34),
    ]
    train, heldout = (decoded(tmp_path / "out", part) for part in ("train", "heldout"))
    assert [text for text in texts[:35] if text in train] == train
    assert [text for text in texts[:35] if text in heldout] == heldout
    assert len(train) + len(heldout) == 35
    counts = {step["step"]: step["removed"] for step in manifest["steps"] if step["removed"]}
    assert counts == {"exact_duplicates": 3, "near_duplicates": 2}
    assert manifest["output"]["train"]["bytes"] == sum(len(text.encode()) for text in train)


@pytest.mark.usefixtures("small_blocks")
def test_the_tokenizer_learns_from_every_nth_kept_document_of_a_large_text(tmp_path: Path) -> None:
    texts = [f"{'ab' if index % 4 else 'xy'} " * 1000 + str(index) for index in range(1000)]
    texts.insert(500, texts[0])  # a duplicate, which is not kept
    corpus, heldout = tmp_path / "corpus.jsonl", tmp_path / "heldout.txt"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    heldout.write_text("a held-out text", encoding="utf-8")
    tokenizer = BpeTokenizer(kind="bpe", vocab_size=260, max_megabytes=1)
    without = (*FILTERS, "near_duplicates")
    settings = settings_for(corpus, heldout=(str(heldout),), without=without, tokenizer=tokenizer)
    reporter = CollectingReporter()
    manifest = Preparation(settings, tmp_path / "out", reporter).run(1, lambda report: None)
    assert manifest["output"]["train"]["documents"] == 1000
    assert "the tokenizer learns from 1/4 of the text (tokenizer.max_megabytes 1)" in reporter.warnings
    trained = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    assert len(trained.encode("xy")) == 1, "documents with xy must be used"
    assert len(trained.encode("ab")) == 2, "documents with ab must not be used"


KILLED_IN = {
    "analyzing": "tinylm.curation.analysis.np.savez",
    "encoding": "tinylm.curation.encoding.write_shard",
    "joining": "tinylm.curation.encoding.concatenate",
    "finishing": "tinylm.curation.preparation.write_removed",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="requires fork")
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("stage", KILLED_IN)
def test_a_killed_preparation_continues_and_writes_the_same_files(
    stage: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(corpus)
    run(settings, tmp_path / "unbroken")
    if (process := os.fork()) == 0:
        _kill_at_second_call(KILLED_IN[stage])
        run(settings, tmp_path / "killed")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "killed" / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "work").rglob("0*") if path.is_file()}
    assert finished, "the process must be killed after the first block"
    kept: dict[Path, int] = {}
    finish = Preparation.finish

    def record(self: Preparation, report: Any) -> Any:
        kept.update({path: path.stat().st_mtime_ns for path in finished if path.exists()})
        return finish(self, report)

    monkeypatch.setattr(Preparation, "finish", record)
    run(settings, tmp_path / "killed")
    complete = {path for path in finished if path.suffix == ".npz" or (path.suffix == ".json" and "-" not in path.name)}
    assert {path: kept[path] for path in complete} == {path: finished[path] for path in complete}, "finished blocks are reused"
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")


def _kill_at_second_call(target: str) -> None:
    """Kill this process in the second call of a function, or in the first call of a function that is called once."""
    patch = pytest.MonkeyPatch()
    calls = 1 if "write_removed" in target else 2
    module, _, name = target.rpartition(".")
    original = _resolve(module, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls -= 1
        if not calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    patch.setattr(target, counted)


def _resolve(module: str, name: str) -> Callable[..., Any]:
    from pkgutil import resolve_name

    function: Callable[..., Any] = getattr(resolve_name(module), name)
    return function


def test_another_tokenizer_continues_with_the_same_analysis(corpus: Path, tmp_path: Path) -> None:
    settings = settings_for(corpus)
    first = Preparation(settings, tmp_path / "out")
    with Documents(settings) as documents:
        first.analyze_and_decide(documents, 1)
    files = {path: path.stat().st_mtime_ns for path in first.analyses.glob("0*")}
    other = Preparation(replace(settings, tokenizer=BpeTokenizer(kind="bpe", vocab_size=300)), tmp_path / "out")
    with Documents(settings) as documents:
        other.analyze_and_decide(documents, 1)
    assert {path: path.stat().st_mtime_ns for path in other.analyses.glob("0*")} == files
    assert not first.tokens.exists(), "decisions for other settings are removed"


@pytest.mark.usefixtures("small_blocks")
def test_a_text_that_changes_is_analyzed_again(corpus: Path, tmp_path: Path) -> None:
    settings = settings_for(corpus)
    Preparation(settings, tmp_path / "out").report(1)
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    corpus.write_text("".join([*lines[:20], '{"text": "Another document, in place of the last ones."}\n']), encoding="utf-8")
    run(settings, tmp_path / "out")
    run(settings, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.usefixtures("small_blocks")
def test_a_text_that_changes_while_it_is_prepared_is_an_error(corpus: Path, tmp_path: Path) -> None:
    def change(report: Any) -> None:
        corpus.write_text(corpus.read_text(encoding="utf-8").replace("the", "teh"), encoding="utf-8")

    with pytest.raises(InputError, match="changed while it was read"):
        Preparation(settings_for(corpus), tmp_path / "out").run(1, change)


@pytest.mark.parametrize("contaminated", ["heldout", "train"])
def test_held_out_documents_that_occur_in_the_training_text_are_removed(
    contaminated: str, corpus: Path, english: str, tmp_path: Path
) -> None:
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    heldout = tmp_path / "heldout.jsonl"
    fresh, edited = clean(english[200_000:201_000]), f"{texts[10]} Another sentence."
    heldout.write_text("".join(json.dumps({"text": text}) + "\n" for text in (texts[5], fresh, edited)), encoding="utf-8")
    settings = settings_for(corpus, heldout=(str(heldout),), contaminated=contaminated)
    manifest = run(settings, tmp_path / "out")
    train, held = (decoded(tmp_path / "out", part) for part in ("train", "heldout"))
    if contaminated == "heldout":
        assert held == [fresh]
        assert train == texts[:35]
    else:
        assert held == [texts[5], fresh, edited]
        assert train == [text for text in texts[:35] if text not in (texts[5], texts[10])]
    removed = {step["step"]: step["removed"] for step in manifest["steps"]}
    assert (removed["exact_contamination"], removed["near_contamination"]) == (1, 1)


def test_quality_rules_do_not_apply_to_a_held_out_text_of_its_own(corpus: Path, tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.txt"
    heldout.write_text("Too short {\n", encoding="utf-8")
    run(settings_for(corpus, heldout=(str(heldout),), without=("fineweb",)), tmp_path / "out")
    assert decoded(tmp_path / "out", "heldout") == ["Too short {\n"]


def test_a_very_long_document_is_divided(english: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MAX_DOCUMENT_CHARACTERS", 300_000)
    text = english * 2
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "b.txt").write_text(english[5000:9000], encoding="utf-8")
    settings = settings_for(tmp_path / "a.txt", heldout=(str(tmp_path / "b.txt"),), without=("clean", *FILTERS, "near_duplicates"))
    manifest = run(settings, tmp_path / "out")
    documents = decoded(tmp_path / "out", "train")
    assert manifest["input"] == {"documents": 5, "bytes": len((text + english[5000:9000]).encode()), "divided": len(documents) - 1}
    assert max(map(len, documents)) <= 300_000
    assert "".join(documents) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"without": ()}, "all training documents were removed"),
        ({"heldout_share": 1e-6}, "no held-out documents are left"),
    ],
)
def test_an_empty_result_is_an_error(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A short text.\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        run(settings_for(tmp_path / "a.txt", **options), tmp_path / "out")


def test_a_folder_is_prepared_by_one_process_at_a_time(corpus: Path, tmp_path: Path) -> None:
    with Preparation(settings_for(corpus), tmp_path).locked(), pytest.raises(InputError, match="another process"):
        run(settings_for(corpus), tmp_path)


def test_an_unknown_rule_is_an_error() -> None:
    with pytest.raises(InputError, match="did you mean gopher_words"):
        Settings(("a",), without=("gopher_word",))


@pytest.mark.usefixtures("small_blocks")
def test_the_recorded_ngrams_are_those_of_the_joined_tokens(corpus: Path, tmp_path: Path) -> None:
    from tinylm.data.ngrams import open_ngrams, sample_ngrams

    run(settings_for(corpus), tmp_path / "out")
    recorded = open_ngrams(tmp_path / "out" / preparation.NGRAMS_FILE)
    expected = sample_ngrams(open_shard(tmp_path / "out", "train"))
    assert (recorded.length, recorded.rate) == (expected.length, expected.rate)
    assert np.array_equal(recorded.hashes, expected.hashes)


@pytest.mark.usefixtures("small_blocks")
def test_datatrove_writes_the_same_files(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    from tinylm.curation.datatrove_engine import Cluster
    from tinylm.curation.datatrove_engine import run as run_datatrove

    settings = settings_for(corpus)
    manifest = run(settings, tmp_path / "builtin")
    for tasks in (1, 3):
        folder = tmp_path / f"tasks-{tasks}"
        assert run_datatrove(Preparation(settings, folder), Cluster("local", tasks, 1)) == manifest
        written = {name: data for name, data in contents(folder).items() if not name.startswith("logs/")}
        assert written == contents(tmp_path / "builtin")
