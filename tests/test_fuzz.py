"""Randomly damaged recipes, tokenizer files and run folders are either read or rejected with a printable error message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinylm.errors import InputError, TinylmError
from tinylm.recipe import load, loads
from tinylm.run import Run
from tinylm.tokenizer import Tokenizer

FUZZ = settings(
    derandomize=True, max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 10**6, 10**18, 10**400, 2**63, 1e308, 1e-320, float("nan"), float("inf")]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", ".", "~nosuchuser", "\0", "\ud800", "off", "auto", "²", "a" * 300]),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3))
CHECKPOINT = "checkpoints/step-000020"
KEYS = (
    "name",
    "seed",
    "data.train",
    "data.heldout",
    "data.heldout.share",
    "tokenizer",
    "tokenizer.kind",
    "tokenizer.vocab_size",
    "tokenizer.split",
    "tokenizer.alphabet",
    "model.n_layer",
    "model.n_head",
    "model.n_embd",
    "model.head_dim",
    "model.context_length",
    "model.rope_theta",
    "model.init_from",
    "model.ngram_rows",
    "training.steps",
    "training.tokens",
    "training.minutes",
    "training.global_batch_size",
    "training.micro_batch_size",
    "training.optimizer",
    "training.optimizer.lr",
    "training.schedule.warmup",
    "evaluation.every",
    "sampling.prompts",
    "sampling.temperature",
)
TAGS = ("int", "float", "bool", "null", "timestamp", "binary", "set", "omap", "merge", "str", "python/object:os.system")
BASE: dict[str, Any] = {"data": {"train": "text.txt"}, "training": {"steps": 10}}


def _check_read_or_rejected(read: Callable[[], object]) -> None:
    """Call `read`. The only exception that it may raise is a `TinylmError` with a printable message."""
    try:
        read()
    except TinylmError as error:
        str(error).encode("utf-8", "surrogateescape")


def _with(key: str, value: object) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(BASE))
    target, (*sections, last) = document, key.split(".")
    for section in sections:
        target = target.setdefault(section, {})
    target[last] = value
    return document


@FUZZ
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_any_value_of_a_key_is_accepted_or_rejected(key: str, value: object) -> None:
    text = json.dumps(_with(key, value))  # JSON is valid YAML
    _check_read_or_rejected(lambda: loads(text, check_files=True))


@FUZZ
@given(key=st.sampled_from(KEYS), tag=st.sampled_from(TAGS), value=st.text(st.characters(codec="ascii"), max_size=6))
def test_any_tag_is_accepted_or_rejected(key: str, tag: str, value: str) -> None:
    section, _, last = key.rpartition(".")
    line = f"{last}: !!{tag} {json.dumps(value)}"
    text = f"{section}: {{{line}}}" if section and "." not in section else line
    _check_read_or_rejected(lambda: loads(f"{text}\n", check_files=False))


@FUZZ
@given(text=st.text(max_size=60))
def test_any_text_is_read_as_a_recipe_or_rejected(text: str) -> None:
    _check_read_or_rejected(lambda: loads(text, check_files=False))


@FUZZ
@given(override=st.text(max_size=30), key=st.sampled_from(KEYS))
def test_any_override_is_accepted_or_rejected(override: str, key: str) -> None:
    for written in (override, f"{key}={override}"):
        _check_read_or_rejected(lambda written=written: loads(json.dumps(BASE), [written], check_files=False))


@FUZZ
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30))
def test_any_prompt_survives_a_round_trip_through_a_recipe(text: str) -> None:
    recipe = loads(json.dumps(BASE), check_files=False)
    recipe = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"prompts": (text,)})})
    assert loads(recipe.to_yaml(), check_files=False) == recipe


def _damaged(document: Any, data: st.DataObject) -> Any:
    """Replace or remove one value in a JSON document."""
    if isinstance(document, dict) and document and data.draw(st.integers(0, 5)):
        key = data.draw(st.sampled_from(sorted(document)))
        if not data.draw(st.integers(0, 6)):
            return {name: value for name, value in document.items() if name != key}
        return {**document, key: _damaged(document[key], data)}
    if isinstance(document, list) and document and data.draw(st.integers(0, 3)):
        index = data.draw(st.integers(0, len(document) - 1))
        return [*document[:index], _damaged(document[index], data), *document[index + 1 :]]
    return data.draw(VALUES)


TEXT = "The quick <|endoftext|> brown fox, 42 times. naïve 🙂\n"


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece", "char"])
@settings(FUZZ, max_examples=40)
@given(data=st.data())
def test_a_damaged_tokenizer_file_is_usable_or_rejected(kind: str, tokenizers_by_kind: dict[str, Any], data: st.DataObject) -> None:
    damaged = json.dumps(_damaged(tokenizers_by_kind[kind], data))

    def read() -> None:
        tokenizer = Tokenizer.from_text(damaged)
        assert tokenizer.vocab_size < 1_000_000
        ids = tokenizer.encode(TEXT)
        assert all(0 <= id < tokenizer.vocab_size for id in ids)
        tokenizer.decode(ids)
        tokenizer.encoder.encode(TEXT.encode())

    _check_read_or_rejected(read)


@pytest.fixture(scope="module")
def tokenizers_by_kind(english: str) -> dict[str, Any]:
    """Return a small tokenizer of each kind as parsed JSON."""
    from tinylm.text.sources import Piece
    from tinylm.tokenizer import training

    parsed = {}
    for kind in ("bpe", "unigram", "wordpiece", "char"):
        options = {"kind": kind, **({"vocab_size": 360} if kind != "char" else {})}
        section = loads(json.dumps({**BASE, "tokenizer": options}), check_files=False).tokenizer
        parsed[kind] = training.train(section, [Piece(english[:3000], True)], lambda warning: None).tokenizer_json
    return parsed


@pytest.fixture(scope="module")
def copied_run(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    shutil.copytree(tiny_run.path, folder)
    return folder


def _open_and_read(folder: Path) -> None:
    run = Run.open(folder)
    checkpoint = run.checkpoint("last")
    list(run.metrics())
    run.heldout()
    assert run.recipe.model.context_length > 0
    assert checkpoint.problem() is None or checkpoint.problem()
    assert checkpoint.state["fingerprints"]


@pytest.mark.parametrize(
    "name",
    [
        "recipe.yaml",
        "metrics.jsonl",
        "heldout/heldout.json",
        "heldout/heldout.npy",
        "checkpoints/last",
        f"{CHECKPOINT}/state.json",
        f"{CHECKPOINT}/manifest.json",
    ],
)
@settings(FUZZ, max_examples=15)
@given(data=st.data())
def test_a_damaged_run_file_is_read_or_rejected(name: str, copied_run: Path, data: st.DataObject) -> None:
    file = copied_run / name
    original = file.read_bytes()
    start = data.draw(st.integers(0, len(original)))
    end = data.draw(st.integers(start, min(len(original), start + 40)))
    file.write_bytes(original[:start] + data.draw(st.binary(max_size=12)) + original[end:])
    try:
        _check_read_or_rejected(lambda: _open_and_read(copied_run))
    finally:
        file.write_bytes(original)


@pytest.mark.parametrize("name", [f"{CHECKPOINT}/state.json", f"{CHECKPOINT}/manifest.json", "heldout/heldout.json"])
@settings(FUZZ, max_examples=20)
@given(data=st.data())
def test_forged_json_in_a_run_is_read_or_rejected(name: str, copied_run: Path, data: st.DataObject) -> None:
    file = copied_run / name
    original = file.read_bytes()
    file.write_text(json.dumps(_damaged(json.loads(original), data)))
    try:
        _check_read_or_rejected(lambda: _open_and_read(copied_run))
    finally:
        file.write_bytes(original)


def test_the_undamaged_run_can_be_read(copied_run: Path) -> None:
    _open_and_read(copied_run)
    with pytest.raises(InputError):
        load(copied_run / "tokenizer.json")
