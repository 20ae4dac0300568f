"""Test the file formats for labeled texts, stratified splits, and messages about unusual data."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from encoders import WORDS, classifier_recipe, write_labeled

from tinylm.data import formats
from tinylm.data.framing import Framing, batches_by_length
from tinylm.data.labels import LabeledDocuments, PreparedLabels, open_labeled
from tinylm.errors import InputError
from tinylm.recipe import Recipe, loads
from tinylm.reporting import CollectingReporter
from tinylm.text.labeled import LabeledText, read_labeled, stratified, subset


def read(source: Path) -> list[LabeledText]:
    return list(read_labeled([str(source)], "text", "label", "strict"))


def write_rows(file: Path, rows: list[tuple[str, object]]) -> Path:
    file.write_text("".join(f"{json.dumps({'text': text, 'label': label})}\n" for text, label in rows))
    return file


def prepare(recipe: Recipe) -> tuple[PreparedLabels, CollectingReporter]:
    reporter = CollectingReporter()
    return formats.find(recipe.data).prepare(recipe, reporter, 1), reporter


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_tables_are_read_like_json_lines(tmp_path: Path, suffix: str) -> None:
    assert read(write_labeled(tmp_path, suffix)) == read(write_labeled(tmp_path))


def test_parquet_files_and_folders_are_read_like_json_lines(tmp_path: Path) -> None:
    texts = read(write_labeled(tmp_path))
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": [item.text for item in texts], "label": [item.label for item in texts]})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "labeled.parquet")
    assert read(tmp_path / "labeled.parquet") == texts
    for number, item in enumerate(texts):
        (tmp_path / "folder" / item.label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / item.label / f"{number:03}.txt").write_text(item.text)
    assert sorted(read(tmp_path / "folder"), key=str) == sorted(texts, key=str)


def test_whitespace_around_a_label_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text, label\nx, spam\ny,spam \n")
    assert [item.label for item in read(tmp_path / "a.csv")] == ["spam", "spam"]


def test_numbers_and_booleans_become_labels_in_json_notation(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [("x", 1), ("y", True), ("z\nsecond line", 0.5)])
    assert [item.label for item in read(file)] == ["1", "true", "0.5"]
    assert read(file)[2].text == "z\nsecond line"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"text": "a"}\n', "no field 'label'"),
        ('{"text": "a", "label": null}\n', "'label' must be a label, not null"),
        ('{"text": 3, "label": "a"}\n', "'text' must be text, not 3"),
        ('{"text": "a", "label": ["a"]}\n', "must be a label"),
        ('{"text": "a", "label": NaN}\n', "must be a label, not NaN"),
        ('{"text": "a", "label": " "}\n', "'label' is empty"),
    ],
)
def test_the_error_for_an_invalid_record_contains_its_line_number(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "b"}\n' + content)
    with pytest.raises(InputError, match=problem) as caught:
        read(tmp_path / "a.jsonl")
    assert str(caught.value.where).endswith("a.jsonl:2")


def test_a_text_file_without_a_label_folder_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for source in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(InputError, match="a text file has no label"):
            read(source)


def test_a_split_is_stratified_by_label_and_keeps_identical_texts_together() -> None:
    texts = [LabeledText(f"text {i % 150}", "abc"[i % 3]) for i in range(300)]
    chosen = stratified(texts, {"heldout": 0.2, "test": 0.1})
    assert sorted(index for part in chosen.values() for index in part) == list(range(300))
    for part, count in (("heldout", 20), ("test", 10)):
        assert Counter(texts[index].label for index in chosen[part]) == dict.fromkeys("abc", count)
    parts = {texts[index].text: part for part, indexes in chosen.items() for index in indexes}
    assert all(parts[texts[index].text] == part for part, indexes in chosen.items() for index in indexes)
    shuffled = stratified(texts[::-1], {"heldout": 0.2, "test": 0.1})
    assert {texts[i].text for i in chosen["heldout"]} == {texts[::-1][i].text for i in shuffled["heldout"]}


def test_a_split_leaves_texts_of_every_label_for_training() -> None:
    texts = [*(LabeledText(f"text {i}", "a") for i in range(40)), *[LabeledText("same", "b")] * 20]
    chosen = stratified(texts, {"heldout": 0.1, "test": 0.2})
    assert Counter(texts[index].label for index in chosen["train"]) == {"a": 28, "b": 20}
    pair = stratified([LabeledText("x", "a"), LabeledText("y", "a")], {"heldout": 0.4, "test": 0.4})
    assert {part: len(indexes) for part, indexes in pair.items()} == {"heldout": 1, "test": 0, "train": 1}


def test_a_smaller_fraction_of_the_training_texts_is_a_subset_of_a_larger_one() -> None:
    texts = [LabeledText(f"text {i}", "ab"[i % 2]) for i in range(200)]
    tenth, half = set(subset(texts, 0.1)), set(subset(texts, 0.5))
    assert len(tenth) == 20
    assert tenth < half
    assert len(subset(texts, 0.001)) == 2


def test_every_epoch_reads_every_text_once(tmp_path: Path) -> None:
    recipe = classifier_recipe(tmp_path)
    assert 48 % recipe.training.global_batch_size == 0
    prepared, _ = prepare(recipe)
    dataset = formats.find(recipe.data).dataset(recipe, prepared)
    assert isinstance(dataset, LabeledDocuments)
    assert dataset.examples_per_epoch == 48
    first, second = ([tuple(row[row >= 0]) for row in dataset.examples(start, 48)["tokens"]] for start in (0, 48))
    assert sorted(first) == sorted(second)
    assert first != second
    part = dataset.examples(10, 3)
    assert [tuple(row[row >= 0]) for row in part["tokens"]] == first[10:13]
    labels = sorted(WORDS)
    for row, label in zip(part["tokens"], part["labels"][:, 0], strict=True):
        assert any(word[:4] in prepared.tokenizer.decode(row[row >= 0].tolist()) for word in WORDS[labels[label]])


def test_batches_contain_texts_of_similar_lengths(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [("x" * (1 + i % 60), "ab"[i % 2]) for i in range(512)])
    recipe = loads(
        f"data: {{train: {file}, format: labels, heldout: {{share: 0.25}}}}\ntokenizer: byte\n"
        "model: {architecture: encoder, n_layer: 1, n_head: 2, n_embd: 16, context_length: 64}\n"
        "training: {steps: 1, global_batch_size: 16}"
    )
    prepared, _ = prepare(recipe)
    dataset = formats.find(recipe.data).dataset(recipe, prepared)
    batches = [dataset.examples(16 * number, 16)["tokens"] for number in range(24)]
    text, positions = sum((batch >= 0).sum() for batch in batches), sum(batch.size for batch in batches)
    assert text / positions > 0.9
    longest = [batch.shape[1] for batch in batches]
    assert longest != sorted(longest)


def test_token_dropout_removes_different_tokens_in_each_epoch(tmp_path: Path) -> None:
    recipe = classifier_recipe(tmp_path)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"context_length": 64})})
    prepared, _ = prepare(recipe)
    objective = recipe.objective.model_copy(update={"token_dropout": 0.5})
    whole = formats.find(recipe.data).dataset(recipe, prepared).examples(0, 96)["tokens"]
    dropped = formats.find(recipe.data).dataset(recipe.model_copy(update={"objective": objective}), prepared)
    rows = dropped.examples(0, 96)["tokens"]
    assert 0.4 < ((rows >= 0).sum() - 2 * 96) / ((whole >= 0).sum() - 2 * 96) < 0.6
    assert (rows >= 0).sum(axis=1).min() >= 3
    for row, full in zip(rows, whole, strict=True):
        remaining = iter(full[full >= 0])
        assert all(token in remaining for token in row[row >= 0])
    first, second = ({tuple(row[row >= 0]) for row in part} for part in (rows[:48], rows[48:]))
    assert first != second
    assert np.array_equal(dropped.examples(50, 1)["tokens"][0], rows[50][: (rows[50] >= 0).sum()])


def test_unusual_data_is_reported(tmp_path: Path) -> None:
    rows: list[tuple[str, object]] = [(f"text {i}", "ab"[i % 2]) for i in range(40)]
    train = write_rows(tmp_path / "train.jsonl", [*rows, ("", "a"), ("  ", "b"), ("text 1", "a"), ("a long text " * 9, "a")])
    heldout = write_rows(tmp_path / "held.jsonl", [("text 3", "b"), ("new", "c"), ("other", "a"), ("seventeen letters", "a")])
    recipe = loads(
        f"data: {{train: {train}, heldout: {heldout}, format: labels}}\ntokenizer: byte\n"
        "model: {architecture: encoder, n_layer: 1, n_head: 2, n_embd: 16, context_length: 16}\ntraining: {steps: 1}"
    )
    _, reporter = prepare(recipe)
    reported = "\n".join([*reporter.warnings, *reporter.notes])
    assert "skipped 2 empty texts" in reported
    assert "1 text with more than one label" in reported
    assert "1 held-out text with labels that do not occur in the training texts ('c') will count as mistakes" in reported
    assert "1 of 4 held-out texts also occur in the training texts" in reported
    assert "1 of 42 training texts have more than 14 tokens" in reported
    assert "1 of 4 held-out texts have more than 14 tokens (up to 17)" in reported
    assert "the 16 tokens of model.context_length include [CLS] and [SEP]" in reported


def test_texts_with_only_one_label_are_rejected(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [(f"text {i}", "a") for i in range(20)])
    recipe = loads(f"data: {{train: {file}, format: labels}}\ntokenizer: byte\ntraining: {{steps: 1}}")
    prepared, _ = prepare(recipe)
    with pytest.raises(InputError, match="all training texts have the label 'a'"):
        prepared.fill_in(recipe)


def test_damaged_labels_are_rejected(tmp_path: Path) -> None:
    recipe = classifier_recipe(tmp_path)
    prepared, _ = prepare(recipe)
    size = prepared.tokenizer.vocab_size
    for name in prepared.heldout_files:
        (tmp_path / name).write_bytes((prepared.folder / name).read_bytes())
    assert len(open_labeled(tmp_path, "heldout", size)) == 12
    file = tmp_path / "heldout-labels.json"
    good = json.loads(file.read_text())
    for damaged in ({**good, "labels": good["labels"][1:]}, {**good, "names": ["x"]}, {"names": []}, []):
        file.write_text(json.dumps(damaged))
        with pytest.raises(InputError, match="labels are missing or damaged"):
            open_labeled(tmp_path, "heldout", size)


def test_long_texts_keep_their_head_or_head_and_tail() -> None:
    ids = np.arange(100)
    head = Framing(first=500, last=501, pad=0, context_length=18)
    assert head.frame(ids).tolist() == [500, *range(16), 501]
    assert Framing(500, 501, 0, 18, "head_tail").frame(ids).tolist() == [500, *range(12), *range(96, 100), 501]
    assert head.frame(ids[:3]).tolist() == [500, 0, 1, 2, 501]


def test_batches_contain_every_text_once_and_little_padding() -> None:
    lengths = [3, 9, 4, 100, 5, 8, 2]
    batches = batches_by_length(lengths, 20)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 20 for batch in batches[1:])
