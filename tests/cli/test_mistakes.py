"""Wrong texts, wrong recipes, damaged runs: one line, the promised exit code, and nothing on disk is worse for it."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from command import Here, complaint

from tinylm.run import Run

TEXTS = {
    "empty.txt": (b"", "the text is empty"),
    "byte.txt": (b"a", "32 is longer than the training text"),
    "binary.bin": (bytes(range(256)) * 100, "not UTF-8 at byte 128"),
    "half an emoji.txt": (b"some words " * 500 + "🙂".encode()[:2], "not UTF-8 at byte 5500"),
    "broken.jsonl": (b'{"text": "' + b"words " * 400 + b'"}\n{oops\n', "broken.jsonl:2: not JSON"),
    "other field.jsonl": (b'{"body": "' + b"words " * 400 + b'"}\n', "no text in field 'text' (body)"),
}
RECIPES = {
    "empty": (b"", "the recipe is empty"),
    "list": (b"- a\n", "not a list"),
    "word": (b"hello\n", "not a single value"),
    "tab": (b"data:\n\ttrain: x\n", ".yaml:2: a tab cannot indent YAML (use spaces)"),
    "twice": (b"seed: 1\nseed: 2\n", ".yaml:2: seed is given twice (first in line 1)"),
    "not YAML": (b"a: b: c\n", ".yaml:1: not valid YAML"),
    "binary": (bytes(range(128, 256)), "not UTF-8 at byte 0"),
    "NUL": (b"name: a\0b\n", "not valid YAML"),
    "unknown key": (b"data: {train: '-'}\ntraining: {step: 3}\n", ".yaml:2: training.step: unknown key (did you mean steps?)"),
    "negative": (b"data: {train: '-'}\ntraining: {steps: -3}\n", "training.steps: must be a whole number of at least 1"),
}
FILES = ("recipe.yaml", "tokenizer.json", "heldout/heldout.npy", "heldout/heldout.json", "checkpoints/best")
SAVED = ("model.safetensors", "state.json", "manifest.json")
DAMAGE = {"gone": None, "empty": b"", "garbage": b"\x93\xff\x00garbage" * 20}


@pytest.fixture
def copy(tiny_run: Run, tmp_path: Path) -> Run:
    return Run.open(shutil.copytree(tiny_run.path, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_cannot_be_learned(here: Here, recipe_file: Path, tmp_path: Path, name: str) -> None:
    content, expected = TEXTS[name]
    (tmp_path / name).write_bytes(content)
    answer = here("train", recipe_file, "--set", f"data.train={tmp_path / name}", "--out", tmp_path / "run", "-q")
    assert expected in complaint(answer)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("files", [{}, {"a.bin": b"\0\1\2"}])
def test_a_folder_without_text(here: Here, recipe_file: Path, tmp_path: Path, files: dict[str, bytes]) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert "no text in this folder" in complaint(here("plan", recipe_file, "--set", f"data.train={folder}"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_wrong_recipe(here: Here, tmp_path: Path, name: str) -> None:
    content, expected = RECIPES[name]
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content)
    answer = here("plan", path)
    assert (answer.code, answer.out) == (2, "")
    assert expected in answer.err
    assert all(str(path) in line for line in answer.err.splitlines())


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, *SAVED])
def test_a_damaged_run_is_not_measured(here: Here, copy: Run, name: str, how: str) -> None:
    file = copy.path / name if name in FILES else copy.checkpoint("best").path / name
    damage(file, how)
    answer = here("eval", "-r", copy.path, "--json")
    assert str(copy.path) in complaint(answer)


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_metrics_do_not_stop_the_other_verbs(here: Here, copy: Run, how: str) -> None:
    damage(copy.path / "metrics.jsonl", how)
    assert here("runs", copy.path.parent, "--json").json[0]["step"] == 0
    assert "no metrics yet" in complaint(here("plot", copy.path, "--out", copy.path / "x.png"))
    assert here("eval", "-r", copy.path, "--json").code == 0


def damage(file: Path, how: str) -> None:
    content = DAMAGE[how]
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)


def test_one_changed_bit_of_the_weights_is_noticed(here: Here, copy: Run) -> None:
    weights = copy.checkpoint("best").path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "damaged: model.safetensors is not what was saved" in complaint(here("sample", "-r", copy.path))
    answer = here("train", copy.path, "--resume", "-q")
    assert (answer.code, answer.out) == (2, "")
    assert "no whole checkpoint to resume from" in answer.err


def test_another_tokenizer_of_the_same_size_is_noticed(here: Here, copy: Run) -> None:
    file = copy.path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    assert "not the tokenizer this model was trained with" in complaint(here("eval", "-r", copy.path))


def test_a_run_of_another_version_is_named_as_such(here: Here, copy: Run) -> None:
    folder = copy.checkpoint("best").path
    state = json.loads((folder / "state.json").read_text()) | {"format": 99, "version": "9.9"}
    content = json.dumps(state).encode()
    (folder / "state.json").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "saved in format 99 by tinylm 9.9" in complaint(here("eval", "-r", copy.path))
    assert "saved in format 99 by tinylm 9.9" in complaint(here("train", copy.path, "--resume", "-q"))


def test_a_run_is_never_overwritten_unasked(here: Here, recipe_file: Path, copy: Run, tmp_path: Path) -> None:
    before = contents(copy.path)
    for extra in ((), ("--dry-run",)):
        message = complaint(here("train", recipe_file, "--out", copy.path, *extra))
        assert "--resume goes on with it, --overwrite begins anew" in message
    changed = here("train", copy.path, "--resume", "--set", "model.n_embd=64")
    assert (changed.code, changed.out) == (2, "")
    assert "model.n_embd: 32 -> 64" in changed.err
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("do not lose me")
    assert "not empty and not a run" in complaint(here("train", recipe_file, "--out", other, "--overwrite"))
    assert "is a file" in complaint(here("train", recipe_file, "--out", recipe_file))
    assert contents(copy.path) == before
    assert (other / "thesis.txt").read_text() == "do not lose me"


def test_a_tokenizer_is_never_overwritten_unasked(here: Here, text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("mine")
    train = ("tokenize", "train", text_file, "--kind", "byte", "--out")
    assert "exists already (--overwrite replaces it)" in complaint(here(*train, path))
    assert path.read_text() == "mine"
    assert "is a folder" in complaint(here(*train, tmp_path, "--overwrite"))
    assert here(*train, path, "--overwrite").code == 0


WRONG = {
    "--checkpoint nonsense": "--checkpoint: 'nonsense' is not best, last or a step",
    "--checkpoint 7": "--checkpoint: no checkpoint of step 7",
    "--device tpu": "--device: no such device 'tpu'",
    "--temperature -1": "--temperature: must be 0 or more",
    "--temperature nan": "--temperature",
    "--top-p 2": "--top-p",
    "--top-k 0": "--top-k",
    "--min-p 1.5": "--min-p",
    "--max-new-tokens -1": "--max-new-tokens",
    "--repetition-penalty 0": "--repetition-penalty",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options_of_sample(here: Here, tiny_run: Run, options: str) -> None:
    assert WRONG[options] in complaint(here("sample", "-r", tiny_run.path, *options.split()))


@pytest.mark.parametrize("options", ["--stride 0", "--stride 99", "--context 0", "--context 99", "--context -1"])
def test_windows_that_do_not_fit(here: Here, tiny_run: Run, options: str) -> None:
    assert complaint(here("eval", "-r", tiny_run.path, *options.split())).startswith(options.split()[0])


def test_text_from_the_command_line_that_is_not_utf8(here: Here, tiny_run: Run) -> None:
    assert complaint(here("sample", "-r", tiny_run.path, "--prompt", "a\udcff")) == "--prompt: is not UTF-8"


def test_nothing_on_standard_input(here: Here, tiny_run: Run) -> None:
    assert "-: the text is empty" in complaint(here("eval", "-", "-r", tiny_run.path))
    assert "standard input can be read once" in complaint(here("eval", "-", "-", "-r", tiny_run.path))


@pytest.mark.parametrize("ids", ["-1", "99999", "12 fish", "9" * 5000])
def test_what_is_no_id(here: Here, tiny_run: Run, ids: str) -> None:
    answer = here("tokenize", "decode", "-r", tiny_run.path, stdin=ids.encode())
    assert answer.code == 2
    assert "is not an id below 400" in answer.err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that refuses even root")
def test_what_the_system_refuses_is_told_in_one_line(here: Here, recipe_file: Path, text_file: Path) -> None:
    assert complaint(here("train", recipe_file, "--out", "/proc/self/run", "-q")).startswith("/proc/self: this folder may not be")
    refused = here("tokenize", "train", text_file, "--out", "/proc/self/tokenizer.json", "--kind", "byte", "-q")
    assert complaint(refused, code=1).startswith("/proc/self/")


def test_a_mistake_in_tinylm_is_told_in_one_line(here: Here, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    here("--version")
    sys.excepthook(KeyError, KeyError("x"), None)
    told = capfdbinary.readouterr().err
    assert told == b"error: KeyError: 'x' (a mistake in tinylm: TINYLM_DEBUG=1 shows the traceback to report)\n"


def test_a_folder_that_happens_to_be_called_like_a_recipe_is_no_run(
    here: Here, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs-bpe").mkdir()
    sources = ("--set", f"data.train={text_file}", "--set", "data.heldout.by=tail")
    assert here("train", "docs-bpe", *sources, "--dry-run").code == 0
