"""Test that user errors, such as invalid texts and recipes or damaged runs, are reported on one line and change no files."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from command import RunCli, error_of

from tinylm.run import Run

TEXTS = {
    "empty.txt": (b"", "the text is empty"),
    "byte.txt": (b"a", "32 is longer than the training text"),
    "binary.bin": (bytes(range(256)) * 100, "not UTF-8 at byte 128"),
    "half an emoji.txt": (b"some words " * 500 + "🙂".encode()[:2], "not UTF-8 at byte 5500"),
    "broken.jsonl": (b'{"text": "' + b"words " * 400 + b'"}\n{oops\n', "broken.jsonl:2: not JSON"),
    "other field.jsonl": (b'{"body": "' + b"words " * 400 + b'"}\n', "no field 'text'; fields: body"),
}
RECIPES = {
    "empty": (b"", "the recipe is empty"),
    "list": (b"- a\n", "not a list"),
    "word": (b"hello\n", "not a single value"),
    "tab": (b"data:\n\ttrain: x\n", ".yaml:2: YAML cannot be indented with tabs (use spaces)"),
    "twice": (b"seed: 1\nseed: 2\n", ".yaml:2: seed is set twice (first on line 1)"),
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
def run_copy(tiny_run: Run, tmp_path: Path) -> Run:
    return Run.open(shutil.copytree(tiny_run.path, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", TEXTS)
def test_an_invalid_text_is_rejected(run_cli: RunCli, recipe_file: Path, tmp_path: Path, name: str) -> None:
    content, expected = TEXTS[name]
    (tmp_path / name).write_bytes(content)
    result = run_cli("train", recipe_file, "--set", f"data.train={tmp_path / name}", "--out", tmp_path / "run", "-q")
    assert expected in error_of(result)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("files", [{}, {"a.bin": b"\0\1\2"}])
def test_a_folder_without_text_is_rejected(run_cli: RunCli, recipe_file: Path, tmp_path: Path, files: dict[str, bytes]) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert "no text in this folder" in error_of(run_cli("plan", recipe_file, "--set", f"data.train={folder}"))


@pytest.mark.parametrize("name", RECIPES)
def test_an_invalid_recipe_is_rejected(run_cli: RunCli, tmp_path: Path, name: str) -> None:
    content, expected = RECIPES[name]
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content)
    result = run_cli("plan", path)
    assert (result.code, result.out) == (2, "")
    assert expected in result.err
    assert all(str(path) in line for line in result.err.splitlines())


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, *SAVED])
def test_a_damaged_run_is_not_evaluated(run_cli: RunCli, run_copy: Run, name: str, how: str) -> None:
    file = run_copy.path / name if name in FILES else run_copy.checkpoint("best").path / name
    damage(file, how)
    result = run_cli("eval", "-r", run_copy.path, "--json")
    assert str(run_copy.path) in error_of(result)


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_metrics_do_not_affect_other_commands(run_cli: RunCli, run_copy: Run, how: str) -> None:
    damage(run_copy.path / "metrics.jsonl", how)
    assert run_cli("runs", run_copy.path.parent, "--json").json[0]["step"] == 0
    assert "no metrics yet" in error_of(run_cli("plot", run_copy.path, "--out", run_copy.path / "x.png"))
    assert run_cli("eval", "-r", run_copy.path, "--json").code == 0


def damage(file: Path, how: str) -> None:
    content = DAMAGE[how]
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)


def test_a_single_flipped_bit_in_the_weights_is_detected(run_cli: RunCli, run_copy: Run) -> None:
    weights = run_copy.checkpoint("best").path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "damaged: model.safetensors has changed since it was saved" in error_of(run_cli("sample", "-r", run_copy.path))
    result = run_cli("train", run_copy.path, "--resume", "-q")
    assert (result.code, result.out) == (2, "")
    assert "no complete checkpoint to resume from" in result.err


def test_another_tokenizer_of_the_same_size_is_detected(run_cli: RunCli, run_copy: Run) -> None:
    file = run_copy.path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    assert "is not the tokenizer that this model was trained with" in error_of(run_cli("eval", "-r", run_copy.path))


def test_a_run_in_another_format_is_rejected(run_cli: RunCli, run_copy: Run, tmp_path: Path) -> None:
    folder = run_copy.checkpoint("best").path
    state = json.loads((folder / "state.json").read_text()) | {"format": 99, "version": "9.9"}
    content = json.dumps(state).encode()
    (folder / "state.json").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with open(run_copy.path / "recipe.yaml", "a") as recipe:
        recipe.write("key_of_another_version: 1\n")
    for arguments in (
        ("eval", "-r", run_copy.path),
        ("plan", run_copy.path),
        ("train", run_copy.path, "--resume", "-q"),
        ("train", run_copy.path, "--out", tmp_path / "new"),
    ):
        assert "saved in checkpoint format 99 by tinylm 9.9" in error_of(run_cli(*arguments)), arguments


def test_a_run_is_not_overwritten_without_the_option(run_cli: RunCli, recipe_file: Path, run_copy: Run, tmp_path: Path) -> None:
    before = contents(run_copy.path)
    for extra in ((), ("--dry-run",)):
        message = error_of(run_cli("train", recipe_file, "--out", run_copy.path, *extra))
        assert "--resume continues it, --overwrite replaces it" in message
    changed = run_cli("train", run_copy.path, "--resume", "--set", "model.n_embd=64")
    assert (changed.code, changed.out) == (2, "")
    assert "model.n_embd: 32 -> 64" in changed.err
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("important")
    assert "not empty and not a run folder" in error_of(run_cli("train", recipe_file, "--out", other, "--overwrite"))
    assert "is a file" in error_of(run_cli("train", recipe_file, "--out", recipe_file))
    assert contents(run_copy.path) == before
    assert (other / "thesis.txt").read_text() == "important"


def test_a_tokenizer_is_not_overwritten_without_the_option(run_cli: RunCli, text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("mine")
    train = ("tokenize", "train", text_file, "--kind", "byte", "--out")
    assert "already exists (--overwrite replaces it)" in error_of(run_cli(*train, path))
    assert path.read_text() == "mine"
    assert "is a folder" in error_of(run_cli(*train, tmp_path, "--overwrite"))
    assert run_cli(*train, path, "--overwrite").code == 0


INVALID_OPTIONS = {
    "--checkpoint nonsense": "--checkpoint: 'nonsense' is not best, last or a step",
    "--checkpoint 7": "--checkpoint: no checkpoint for step 7",
    "--device tpu": "--device: no such device 'tpu'",
    "--temperature -1": "--temperature: must be 0 or more",
    "--temperature nan": "--temperature",
    "--top-p 2": "--top-p",
    "--top-k 0": "--top-k",
    "--min-p 1.5": "--min-p",
    "--max-new-tokens -1": "--max-new-tokens",
    "--repetition-penalty 0": "--repetition-penalty",
}


@pytest.mark.parametrize("options", INVALID_OPTIONS)
def test_sample_rejects_invalid_options(run_cli: RunCli, tiny_run: Run, options: str) -> None:
    assert INVALID_OPTIONS[options] in error_of(run_cli("sample", "-r", tiny_run.path, *options.split()))


@pytest.mark.parametrize("options", ["--stride 0", "--stride 99", "--context 0", "--context 99", "--context -1"])
def test_an_invalid_stride_or_context_is_rejected(run_cli: RunCli, tiny_run: Run, options: str) -> None:
    assert error_of(run_cli("eval", "-r", tiny_run.path, *options.split())).startswith(options.split()[0])


def test_a_prompt_that_is_not_utf8_is_rejected(run_cli: RunCli, tiny_run: Run) -> None:
    assert error_of(run_cli("sample", "-r", tiny_run.path, "--prompt", "a\udcff")) == "--prompt: not UTF-8"


def test_empty_or_repeated_standard_input_is_rejected(run_cli: RunCli, tiny_run: Run) -> None:
    assert "-: the text is empty" in error_of(run_cli("eval", "-", "-r", tiny_run.path))
    assert "standard input can be read only once" in error_of(run_cli("eval", "-", "-", "-r", tiny_run.path))


@pytest.mark.parametrize("ids", ["-1", "99999", "12 fish", "9" * 5000])
def test_an_invalid_token_id_is_rejected(run_cli: RunCli, tiny_run: Run, ids: str) -> None:
    result = run_cli("tokenize", "decode", "-r", tiny_run.path, stdin=ids.encode())
    assert result.code == 2
    assert "is not an id below 400" in result.err
    assert result.err.startswith("error: standard input: ")
    assert not result.out or result.out.endswith("\n")


def test_a_text_in_place_of_a_source_is_rejected_with_a_hint(run_cli: RunCli, tiny_run: Run) -> None:
    error = error_of(run_cli("tokenize", "encode", "hello world", "-r", tiny_run.path))
    assert error.startswith("hello world: no such file or folder (to encode a text, pipe it in: echo ")


def test_a_missing_package_is_reported_before_the_model_is_loaded(
    run_cli: RunCli, tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    error = error_of(run_cli("export", tmp_path / "model.onnx", "--to", "onnx", "-r", tiny_run.path))
    assert error == 'writing ONNX needs an extra package: pip install "tinylm[onnx]"'


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="requires /proc, where even root cannot write")
def test_a_permission_error_is_reported_on_one_line(run_cli: RunCli, recipe_file: Path, text_file: Path) -> None:
    assert error_of(run_cli("train", recipe_file, "--out", "/proc/self/run", "-q")).startswith(
        "/proc/self: this folder is not writable"
    )
    result = run_cli("tokenize", "train", text_file, "--out", "/proc/self/tokenizer.json", "--kind", "byte", "-q")
    assert error_of(result, code=1).startswith("/proc/self/")


def test_an_unexpected_exception_is_reported_on_one_line(run_cli: RunCli, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    run_cli("--version")
    sys.excepthook(KeyError, KeyError("x"), None)
    error = capfdbinary.readouterr().err
    assert error == b"error: KeyError: 'x' (a bug in tinylm: set TINYLM_DEBUG=1 for the traceback and report it)\n"


def test_a_recipe_is_found_even_if_a_folder_has_the_same_name(
    run_cli: RunCli, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs-bpe").mkdir()
    sources = ("--set", f"data.train={text_file}", "--set", "data.heldout.by=tail")
    assert run_cli("train", "docs-bpe", *sources, "--dry-run").code == 0
