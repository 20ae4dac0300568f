"""What programs read: the JSON of every verb, and which words go to stdout and which to stderr."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from command import Here

from tinylm.cost.accelerators import ACCELERATORS
from tinylm.cost.cpu import Processor
from tinylm.run import Run

TRAIN = """run step steps tokens train_loss val_loss val_perplexity val_bits_per_byte best_step best_val_loss seconds train_seconds
    tokens_per_second parameters device precision peak_memory_bytes stopped"""
PLAN = """parameters parameters_non_embedding context_length vocab_size global_batch_size micro_batch_size
    gradient_accumulation_steps tokens_per_step steps tokens epochs flops memory_bytes checkpoint_bytes seconds_estimate"""
EVAL = """run checkpoint step documents tokens bytes characters loss perplexity bits_per_byte bits_per_character
    bits_per_byte_ci95 context stride"""
REPORT = """tokenizer kind vocab_size documents bytes characters tokens bytes_per_token tokens_per_word unused_tokens
    unknown_tokens renyi_efficiency round_trip_failures encode_megabytes_per_second"""


@pytest.fixture
def tokenizer(tiny_run: Run) -> Path:
    return tiny_run.path / "tokenizer.json"


def test_train_plan_resume(here: Here, recipe_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a run with spaces, ünïcode"
    plan = here("plan", recipe_file, "--json").json
    assert plan.keys() >= set(PLAN.split())
    assert plan["memory_bytes"].keys() >= {"weights", "gradients", "optimizer", "activations", "total"}

    dry = here("train", recipe_file, "--out", folder, "--dry-run", "--json")
    assert dry.json.keys() == plan.keys()
    assert not folder.exists()

    trained = here("train", recipe_file, "--out", folder, "--json")
    assert trained.code == 0
    assert trained.json.keys() >= set(TRAIN.split())
    assert (trained.json["run"], trained.json["step"], trained.json["stopped"]) == (str(folder), 2, "done")
    assert "held-out" in trained.err
    assert f"--run '{folder}'" in trained.err, "what is proposed next can be pasted into a shell"

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0].keys() >= {"kind", "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
    assert lines[-1].keys() >= {"kind", "step", "tokens", "val_loss", "val_bits_per_byte", "seconds"}

    longer = here("train", folder, "--resume", "--set", "training.steps=3", "--allow-change", "training.steps", "-q")
    assert (longer.code, longer.out, longer.err) == (0, f"{folder}\n", "")


def test_a_new_recipe_trains_as_it_is(here: Here, text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    written = here("new", text_file, "--minutes", "2", "--out", path)
    assert (written.code, written.out) == (0, f"{path}\n")
    assert f"next: tinylm train {path}" in written.err
    shorter = ["training.minutes=null", "training.epochs=null", "training.steps=3"]
    trained = here("train", path, "--out", tmp_path / "run", *(word for key in shorter for word in ("--set", key)), "--json", "-q")
    assert (trained.code, trained.json["stopped"]) == (0, "done")

    answer = here("new", text_file, "--minutes", "2", "--json", "-q")
    assert answer.json.keys() == {"path", "recipe", "plan"}
    assert answer.json["recipe"]["name"] == text_file.stem
    assert answer.json["plan"].keys() >= set(PLAN.split())
    printed = here("new", text_file, "--minutes", "2", "-q", "--name", "other")
    assert "\nname: other\n" in printed.out, "without --out the recipe itself is the answer"


def test_the_time_limit_stops_saved(here: Here, recipe_file: Path, tmp_path: Path) -> None:
    stopped = here("train", recipe_file, "--out", tmp_path / "run", "--stop-after", "0s", "--json")
    assert (stopped.code, stopped.json["stopped"], stopped.json["step"]) == (0, "time", 1)
    assert f"go on with: tinylm train {tmp_path / 'run'} --resume" in stopped.err
    early = here("sample", "-r", tmp_path / "run")
    assert "no best checkpoint yet (--checkpoint 1 names the newest)" in early.err
    assert here("sample", "-r", tmp_path / "run", "--checkpoint", "last", "--max-new-tokens", 1).code == 0


def test_eval(here: Here, tiny_run: Run, tmp_path: Path) -> None:
    own = here("eval", "-r", tiny_run.path, "--json")
    assert own.json.keys() >= set(EVAL.split())
    assert own.err == ""
    low, high = own.json["bits_per_byte_ci95"]
    assert low <= own.json["bits_per_byte"] <= high

    text = "The for statement is used to iterate over the elements of a sequence.\n" * 20
    (tmp_path / "text.jsonl").write_text(json.dumps({"body": text}) + "\n")
    piped = here("eval", "-", "-r", tiny_run.path, "--json", stdin=text.encode()).json
    lines = here("eval", tmp_path / "text.jsonl", "--field", "body", "-r", tiny_run.path, "--json").json
    assert piped["loss"] == pytest.approx(lines["loss"])
    assert (piped["bytes"], piped["documents"]) == (len(text), 1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_eval_reads_a_pipe_as_it_reads_a_file(here: Here, tiny_run: Run, text_file: Path, tmp_path: Path) -> None:
    text, pipe = text_file.read_text()[:2000], tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(text,), daemon=True)
    writer.start()
    answer = here("eval", pipe, "-r", tiny_run.path, "--json")
    writer.join()
    assert answer.json["characters"] == len(text)


def test_eval_shows_the_same_numbers_to_people(here: Here, tiny_run: Run) -> None:
    numbers = here("eval", "-r", tiny_run.path, "--json").json
    shown = dict(line.split("  ", 1) for line in here("eval", "-r", tiny_run.path).out.splitlines())
    assert shown["bits per byte"].strip().startswith(f"{numbers['bits_per_byte']:.4f} ")
    assert shown["perplexity"].strip() == f"{numbers['perplexity']:.3f} per token"
    assert f"{numbers['tokens']:,} tokens" in shown["text"]


def test_a_warning_stays_off_stdout(here: Here, recipe_file: Path, tmp_path: Path) -> None:
    settings = ("--set", 'tokenizer={"kind": "char"}', "--out", tmp_path / "run", "--json")
    assert here("train", recipe_file, *settings).code == 0
    strange = here("eval", "-", "-r", tmp_path / "run", "--json", "--quiet", stdin="plain and 🙂".encode())
    assert strange.json["documents"] == 1
    assert strange.err.startswith("warning: 1 tokens are unknown")


def test_sample(here: Here, tiny_run: Run) -> None:
    ask = ("sample", "-r", tiny_run.path, "--prompt", "The 🙂", "--max-new-tokens", 6, "--seed", 5)
    answer = here(*ask, "-n", 3, "--json").json
    assert answer.keys() >= {"run", "checkpoint", "seed", "samples"}
    assert answer["seed"] == 5
    for sample in answer["samples"]:
        assert sample.keys() >= {"prompt", "text", "tokens", "finish_reason", "tokens_per_second"}
    first = answer["samples"][0]
    assert len(answer["samples"]) == 3
    streamed = here(*ask)
    assert streamed.out == f"The 🙂{first['text']}\n"
    assert "--seed 5" in streamed.err
    assert here(*ask, "--no-stream", "-q").out == streamed.out
    assert here(*ask, "-q").err == ""


def test_a_prompt_may_be_empty_or_longer_than_the_context(here: Here, tiny_run: Run, english: str) -> None:
    for prompt in ("", english[:2000]):
        answer = here("sample", "-r", tiny_run.path, "-p", prompt, "--max-new-tokens", 2, "--json")
        assert answer.json["samples"][0]["tokens"] <= 2


def test_the_run_is_the_one_meant(here: Here, tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLM_RUN", str(tiny_run.path))
    named = here("eval", "--json")
    assert (named.json["run"], named.err) == (str(tiny_run.path), "")
    monkeypatch.delenv("TINYLM_RUN")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "newest").symlink_to(tiny_run.path)
    monkeypatch.chdir(tmp_path)
    found = here("eval", "--json")
    assert (found.json["run"], found.err) == ("runs/newest", "using runs/newest\n")
    last = tiny_run.checkpoint("last")
    assert here("eval", "-r", last.path, "--json").json["checkpoint"] == last.name
    assert here("eval", "--checkpoint", last.step, "--json", "-q").json["step"] == last.step


def test_runs_and_recipes(here: Here, tiny_run: Run) -> None:
    (row,) = here("runs", tiny_run.path.parent, "--json").json
    assert (row["name"], row["step"]) == ("tiny", 20)
    table = here("runs", tiny_run.path.parent).out
    assert f"{row['best_val_loss']:.4f}" in table
    names = [recipe["name"] for recipe in here("recipes", "--json").json]
    assert "quickstart" in names
    assert here("recipes", "quickstart").out.startswith("# ")


def test_tokenize(here: Here, text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "tokenizer.json"
    trained = here("tokenize", "train", text_file, "--out", path, "--vocab-size", 300, "--json")
    assert trained.json.keys() >= {"tokenizer", "kind", "vocab_size", "seconds"}
    assert trained.json["vocab_size"] == 300
    report = here("tokenize", "report", text_file, "-t", path, "--no-baselines", "--json").json
    assert report.keys() >= set(REPORT.split())
    assert "tokens per word" in here("tokenize", "report", text_file, "-t", path, "--no-baselines").out
    for kind in ("char", "byte"):
        assert here("tokenize", "train", text_file, "--out", tmp_path / f"{kind}.json", "--kind", kind).code == 0


@pytest.mark.parametrize("text", ["", "two\r\nlines\0 and a NUL", "héllo 🙂 wörld\n\n", " "])
def test_decode_gives_back_what_encode_was_given(here: Here, tokenizer: Path, text: str) -> None:
    ids = here("tokenize", "encode", "-t", tokenizer, stdin=text.encode())
    assert here("tokenize", "decode", "-t", tokenizer, stdin=ids.out.encode()).out == text
    assert (ids.err, ids.code) == ("", 0)


def test_other_formats_of_encode(here: Here, tiny_run: Run) -> None:
    ids = here("tokenize", "encode", "-r", tiny_run.path, stdin=b"The for")
    record = here("tokenize", "encode", "-r", tiny_run.path, "--format", "jsonl", stdin=b"The for").json
    assert " ".join(map(str, record["ids"])) == ids.out.strip()
    assert "".join(record["tokens"]) == "The for"
    tokens = here("tokenize", "encode", "-r", tiny_run.path, "--format", "tokens", stdin=b"The for").out
    assert [json.loads(line) for line in tokens.splitlines()] == record["tokens"]


def test_plot_draws_a_picture(here: Here, tiny_run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curves.png"
    assert here("plot", tiny_run.path, "--out", picture).out == f"{picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [picture]


PLAN_ELSEWHERE = "hardware devices mfu precision seconds_per_step tokens_per_second compute_optimal evaluation_seconds compiled"


def test_a_plan_for_a_machine_that_is_not_here(here: Here, recipe_file: Path) -> None:
    local = here("plan", recipe_file, "--json").json
    there = here("plan", recipe_file, "--hardware", "H100-SXM", "--devices", 2, "--json").json
    assert there.keys() == local.keys() >= set(PLAN_ELSEWHERE.split())
    assert (local["hardware"], local["devices"]) == ("cpu", 1)
    assert (there["hardware"], there["devices"], there["precision"]) == ("h100-sxm", 2, "fp32")
    assert (there["micro_batch_size"], there["gradient_accumulation_steps"]) == (2, 1)
    assert there["flops"] == local["flops"]
    assert there["compute_optimal"]["unique_tokens"] == local["compute_optimal"]["unique_tokens"] > 0
    shown = here("plan", recipe_file, "--hardware", "h100-sxm", "--devices", 2).out
    assert "time on 2 h100-sxm" in shown
    assert "20 tokens a parameter" in shown


@pytest.mark.parametrize(("undisturbed", "told"), [(0.5, True), (0.95, False)])
def test_a_plan_of_a_busy_machine_says_so(
    undisturbed: float, told: bool, here: Here, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Processor(350e9, 27e9, 14e9, cores=2, has_amx=False, undisturbed=undisturbed)
    monkeypatch.setattr("tinylm.cost.cpu.measure", lambda *sizes: measured)
    assert ("busy with something else" in here("plan", recipe_file).err) == told


def test_a_plan_says_which_machines_and_which_batches_there_are(here: Here, recipe_file: Path) -> None:
    listed = here("plan", "--hardware", "list")
    assert [line.split()[0] for line in listed.out.splitlines()] == [sheet.name for sheet in ACCELERATORS]
    assert here("new", "text.txt", "--hardware", "list").out == listed.out
    sheets = here("plan", "--hardware", "list", "--json").json["accelerators"]
    assert [sheet["name"] for sheet in sheets] == [sheet.name for sheet in ACCELERATORS]
    uneven = here("plan", recipe_file, "--hardware", "t4", "--devices", 3, "-q")
    assert (uneven.code, uneven.err.count("\n")) == (2, 1)
    assert "4 sequences do not split over 3 devices (3 and 6 would)" in uneven.err
    assert "--devices: only means something with --hardware" in here("plan", recipe_file, "--devices", 2).err
