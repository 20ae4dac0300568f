"""Test the output that other programs read: each command's JSON, and the text on stdout and stderr."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path

import pytest
from command import RunCli, error_of

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


def test_a_recipe_can_be_planned_trained_and_resumed(run_cli: RunCli, recipe_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a run with spaces, ünïcode"
    plan = run_cli("plan", recipe_file, "--json").json
    assert plan.keys() >= set(PLAN.split())
    assert plan["memory_bytes"].keys() >= {"weights", "gradients", "optimizer", "activations", "total"}

    dry_run = run_cli("train", recipe_file, "--out", folder, "--dry-run", "--json")
    assert dry_run.json.keys() == plan.keys()
    assert not folder.exists()

    trained = run_cli("train", recipe_file, "--out", folder, "--json")
    assert trained.code == 0
    assert trained.json.keys() >= set(TRAIN.split())
    assert (trained.json["run"], trained.json["step"], trained.json["stopped"]) == (str(folder), 2, "done")
    assert "held-out" in trained.err
    assert f"--run '{folder}'" in trained.err, "the suggested command must work when pasted into a shell"

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0].keys() >= {"kind", "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
    assert lines[-1].keys() >= {"kind", "step", "tokens", "val_loss", "val_bits_per_byte", "seconds"}

    longer = run_cli("train", folder, "--resume", "--set", "training.steps=3", "--allow-change", "training.steps", "-q")
    assert (longer.code, longer.out) == (0, f"{folder}\n")
    assert longer.err.startswith("warning: the learning rate changes from 0.0167")


def test_a_new_recipe_can_be_trained(run_cli: RunCli, text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    written = run_cli("new", text_file, "--minutes", "2", "--out", path)
    assert (written.code, written.out) == (0, f"{path}\n")
    assert f"next: tinylm train {path}" in written.err
    shorter = ["training.minutes=null", "training.epochs=null", "training.steps=3"]
    trained = run_cli(
        "train", path, "--out", tmp_path / "run", *(word for key in shorter for word in ("--set", key)), "--json", "-q"
    )
    assert (trained.code, trained.json["stopped"]) == (0, "done")

    result = run_cli("new", text_file, "--minutes", "2", "--json", "-q")
    assert result.json.keys() == {"path", "recipe", "plan"}
    assert result.json["recipe"]["name"] == text_file.stem
    assert result.json["plan"].keys() >= set(PLAN.split())
    printed = run_cli("new", text_file, "--minutes", "2", "-q", "--name", "other")
    assert "\nname: other\n" in printed.out, "without --out, the recipe is printed"


def test_the_time_limit_stops_training_and_saves_a_checkpoint(run_cli: RunCli, recipe_file: Path, tmp_path: Path) -> None:
    stopped = run_cli("train", recipe_file, "--out", tmp_path / "run", "--stop-after", "0s", "--json")
    assert (stopped.code, stopped.json["stopped"], stopped.json["step"]) == (0, "time", 1)
    assert f"Continue with: tinylm train {tmp_path / 'run'} --resume" in stopped.err
    best = run_cli("sample", "-r", tmp_path / "run", "--checkpoint", "best")
    assert "no best checkpoint yet (use the newest with --checkpoint 1)" in best.err
    early = run_cli("sample", "-r", tmp_path / "run", "--max-new-tokens", 1)
    assert (early.code, early.err.count("using the newest, step-000001")) == (0, 1)


def test_eval_prints_a_confidence_interval_and_reads_standard_input(run_cli: RunCli, tiny_run: Run, tmp_path: Path) -> None:
    evaluated = run_cli("eval", "-r", tiny_run.path, "--json")
    assert evaluated.json.keys() >= set(EVAL.split())
    assert evaluated.err == ""
    low, high = evaluated.json["bits_per_byte_ci95"]
    assert low <= evaluated.json["bits_per_byte"] <= high

    text = "The for statement is used to iterate over the elements of a sequence.\n" * 20
    (tmp_path / "text.jsonl").write_text(json.dumps({"body": text}) + "\n")
    piped = run_cli("eval", "-", "-r", tiny_run.path, "--json", stdin=text.encode()).json
    lines = run_cli("eval", tmp_path / "text.jsonl", "--field", "body", "-r", tiny_run.path, "--json").json
    assert piped["loss"] == pytest.approx(lines["loss"])
    assert (piped["bytes"], piped["documents"]) == (len(text), 1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="requires named pipes")
def test_eval_reads_a_named_pipe(run_cli: RunCli, tiny_run: Run, text_file: Path, tmp_path: Path) -> None:
    text, pipe = text_file.read_text()[:2000], tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(text,), daemon=True)
    writer.start()
    result = run_cli("eval", pipe, "-r", tiny_run.path, "--json")
    writer.join()
    assert result.json["characters"] == len(text)


def test_eval_prints_the_same_numbers_in_text_and_json(run_cli: RunCli, tiny_run: Run) -> None:
    numbers = run_cli("eval", "-r", tiny_run.path, "--json").json
    shown = dict(line.split("  ", 1) for line in run_cli("eval", "-r", tiny_run.path).out.splitlines())
    assert shown["bits per byte"].strip().startswith(f"{numbers['bits_per_byte']:.4f} ")
    assert shown["perplexity"].strip() == f"{numbers['perplexity']:.3f} per token"
    assert f"{numbers['tokens']:,} tokens" in shown["text"]


def test_warnings_are_printed_on_stderr(run_cli: RunCli, recipe_file: Path, tmp_path: Path) -> None:
    options = ("--set", 'tokenizer={"kind": "char"}', "--out", tmp_path / "run", "--json")
    assert run_cli("train", recipe_file, *options).code == 0
    evaluated = run_cli("eval", "-", "-r", tmp_path / "run", "--json", "--quiet", stdin="plain and 🙂".encode())
    assert evaluated.json["documents"] == 1
    assert evaluated.err.startswith("warning: 1 tokens are unknown")


def test_sample_streams_the_text_that_it_prints_as_json(run_cli: RunCli, tiny_run: Run) -> None:
    command = ("sample", "-r", tiny_run.path, "--prompt", "The 🙂", "--max-new-tokens", 6, "--seed", 5)
    result = run_cli(*command, "-n", 3, "--json").json
    assert result.keys() >= {"run", "checkpoint", "seed", "samples"}
    assert result["seed"] == 5
    for sample in result["samples"]:
        assert sample.keys() >= {"prompt", "text", "tokens", "finish_reason", "tokens_per_second"}
    first = result["samples"][0]
    assert len(result["samples"]) == 3
    streamed = run_cli(*command)
    assert streamed.out == f"The 🙂{first['text']}\n"
    assert "--seed 5" in streamed.err
    assert run_cli(*command, "--no-stream", "-q").out == streamed.out
    assert run_cli(*command, "-q").err == ""


def test_a_prompt_can_be_empty_or_longer_than_the_context(run_cli: RunCli, tiny_run: Run, english: str) -> None:
    for prompt in ("", english[:2000]):
        result = run_cli("sample", "-r", tiny_run.path, "-p", prompt, "--max-new-tokens", 2, "--json")
        assert result.json["samples"][0]["tokens"] <= 2


def test_the_run_is_set_by_option_or_environment_variable_and_defaults_to_the_newest(
    run_cli: RunCli, tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYLM_RUN", str(tiny_run.path))
    named = run_cli("eval", "--json")
    assert (named.json["run"], named.err) == (str(tiny_run.path), "")
    monkeypatch.delenv("TINYLM_RUN")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "newest").symlink_to(tiny_run.path)
    monkeypatch.chdir(tmp_path)
    newest = run_cli("eval", "--json")
    assert (newest.json["run"], newest.err) == ("runs/newest", "using runs/newest\n")
    last = tiny_run.checkpoint("last")
    assert run_cli("eval", "-r", last.path, "--json").json["checkpoint"] == last.name
    assert run_cli("eval", "--checkpoint", last.step, "--json", "-q").json["step"] == last.step


def test_runs_and_recipes_are_listed(run_cli: RunCli, tiny_run: Run) -> None:
    (row,) = run_cli("runs", tiny_run.path.parent, "--json").json
    assert (row["name"], row["step"]) == ("tiny", 20)
    table = run_cli("runs", tiny_run.path.parent).out
    assert f"{row['best_val_loss']:.4f}" in table
    names = [recipe["name"] for recipe in run_cli("recipes", "--json").json]
    assert "quickstart" in names
    assert run_cli("recipes", "quickstart").out.startswith("# ")


def test_a_tokenizer_can_be_trained_and_evaluated(run_cli: RunCli, text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "tokenizer.json"
    trained = run_cli("tokenize", "train", text_file, "--out", path, "--vocab-size", 300, "--json")
    assert trained.json.keys() >= {"tokenizer", "kind", "vocab_size", "seconds"}
    assert trained.json["vocab_size"] == 300
    report = run_cli("tokenize", "report", text_file, "-t", path, "--no-baselines", "--json").json
    assert report.keys() >= set(REPORT.split())
    assert "tokens per word" in run_cli("tokenize", "report", text_file, "-t", path, "--no-baselines").out
    for kind in ("char", "byte"):
        assert run_cli("tokenize", "train", text_file, "--out", tmp_path / f"{kind}.json", "--kind", kind).code == 0


@pytest.mark.parametrize("text", ["", "two\r\nlines\0 and a NUL", "héllo 🙂 wörld\n\n", " "])
def test_decode_inverts_encode(run_cli: RunCli, tokenizer: Path, text: str) -> None:
    ids = run_cli("tokenize", "encode", "-t", tokenizer, stdin=text.encode())
    assert run_cli("tokenize", "decode", "-t", tokenizer, stdin=ids.out.encode()).out == text
    assert (ids.err, ids.code) == ("", 0)


def test_encode_returns_the_same_tokens_in_every_output_format(run_cli: RunCli, tiny_run: Run) -> None:
    ids = run_cli("tokenize", "encode", "-r", tiny_run.path, stdin=b"The for")
    record = run_cli("tokenize", "encode", "-r", tiny_run.path, "--format", "jsonl", stdin=b"The for").json
    assert " ".join(map(str, record["ids"])) == ids.out.strip()
    assert "".join(record["tokens"]) == "The for"
    tokens = run_cli("tokenize", "encode", "-r", tiny_run.path, "--format", "tokens", stdin=b"The for").out
    assert [json.loads(line) for line in tokens.splitlines()] == record["tokens"]


def test_plot_writes_an_image(run_cli: RunCli, tiny_run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    image = tmp_path / "curves.png"
    assert run_cli("plot", tiny_run.path, "--out", image).out == f"{image}\n"
    assert image.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [image]


ACCELERATOR_PLAN = "hardware devices mfu precision seconds_per_step tokens_per_second compute_optimal evaluation_seconds compiled"


def test_plan_estimates_the_cost_on_accelerators(run_cli: RunCli, recipe_file: Path) -> None:
    local = run_cli("plan", recipe_file, "--json").json
    planned = run_cli("plan", recipe_file, "--hardware", "H100-SXM", "--devices", 2, "--json").json
    assert planned.keys() == local.keys() >= set(ACCELERATOR_PLAN.split())
    assert (local["hardware"], local["devices"]) == ("cpu", 1)
    assert (planned["hardware"], planned["devices"], planned["precision"]) == ("h100-sxm", 2, "fp32")
    assert (planned["micro_batch_size"], planned["gradient_accumulation_steps"]) == (2, 1)
    assert planned["flops"] == local["flops"]
    assert planned["compute_optimal"]["unique_tokens"] == local["compute_optimal"]["unique_tokens"] > 0
    shown = run_cli("plan", recipe_file, "--hardware", "h100-sxm", "--devices", 2).out
    assert "time on 2 h100-sxm" in shown
    assert "(20 per parameter, " in shown


def test_plan_writes_the_files_that_start_a_run_on_several_machines(run_cli: RunCli, recipe_file: Path, tmp_path: Path) -> None:
    script, task = tmp_path / "job.sbatch", tmp_path / "task.yaml"
    command = ("plan", recipe_file, "--hardware", "h100-sxm", "--nodes", 2, "--gpus-per-node", 2, "--sbatch", script)
    planned = run_cli(*command, "--time-limit", "2h", "--json").json
    assert (planned["devices"], planned["nodes"], planned["skypilot"]) == (4, 2, None)
    assert planned["sbatch"] == {"file": str(script), "text": script.read_text()}
    assert "#SBATCH --time=0-02:00:00" in planned["sbatch"]["text"]
    assert "the file already exists (--overwrite replaces it)" in error_of(run_cli(*command))
    outside = error_of(run_cli("plan", recipe_file, "--hardware", "t4", "--nodes", 1, "--gpus-per-node", 1, "--skypilot", task))
    assert f"RECIPE: {recipe_file} is not in the current folder" in outside
    assert "--skypilot: requires --hardware and --nodes" in error_of(run_cli("plan", recipe_file, "--skypilot", task))


def test_plan_prints_the_step_time_for_several_numbers_of_accelerators(run_cli: RunCli, recipe_file: Path) -> None:
    command = ("plan", recipe_file, "--hardware", "h100-sxm", "--gpus", "1,4,64")
    table = run_cli(*command, "--json").json
    assert [row["gpus"] for row in table["strong"]] == [1, 4]
    assert [row["gpus"] for row in table["weak"]] == [1, 4, 64]
    shown = run_cli(*command).out
    assert "4 sequences cannot be divided among 64 GPUs" in shown
    assert "h100-sxm, 8 per node, 3,200 Gbit/s between nodes" in shown
    assert "100 Gbit/s" in run_cli(*command, "--network", 100).out
    assert "--gpus: must be numbers separated by commas, such as 1,8,64, not '1;2'" in error_of(
        run_cli("plan", recipe_file, "--hardware", "t4", "--gpus", "1;2")
    )


def test_a_plan_warns_about_parts_that_it_does_not_estimate(run_cli: RunCli, recipe_file: Path) -> None:
    shown = run_cli("plan", recipe_file, "--set", "model.attention_window=8")
    assert "not estimated: attention_window 8; the plan does not include the cost of these parts" in " ".join(shown.err.split())
    assert "not estimated" not in run_cli("plan", recipe_file).err


@pytest.mark.parametrize(("share", "warns"), [(0.5, True), (0.95, False)])
def test_a_plan_warns_if_the_machine_is_busy(
    share: float, warns: bool, run_cli: RunCli, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Processor(350e9, 27e9, 14e9, cores=2, has_amx=False, cpu_share=share)
    monkeypatch.setattr("tinylm.cost.cpu.measure", lambda *sizes: measured)
    plan = ("plan", recipe_file, "--set", "training.steps=100000")
    shown = run_cli(*plan)
    assert ("other programs use this CPU" in " ".join(shown.err.split())) == warns
    time = next(line for line in shown.out.splitlines() if line.startswith("time on this CPU"))
    assert (re.search(r"about \d+:\d+ to \d+:\d+", time) is not None) == warns
    low, high = run_cli(*plan, "--json").json["seconds_range"]
    assert high == pytest.approx(low / share if warns else low, rel=0.01)
    by_clock = ("--set", "training.minutes=1", "--set", "training.steps=null", "--json")
    low, high = run_cli("plan", recipe_file, *by_clock).json["steps_range"]
    assert low == pytest.approx(share * high if warns else high, abs=1)
    length = next(
        line for line in run_cli("plan", recipe_file, *by_clock[:-1]).out.splitlines() if line.startswith("training length")
    )
    assert ("up to" in length) == warns


def test_plan_lists_accelerators_and_rejects_invalid_device_counts(run_cli: RunCli, recipe_file: Path) -> None:
    listed = run_cli("plan", "--hardware", "list")
    assert [line.split()[0] for line in listed.out.splitlines()] == [sheet.name for sheet in ACCELERATORS]
    assert run_cli("new", "text.txt", "--hardware", "list").out == listed.out
    sheets = run_cli("plan", "--hardware", "list", "--json").json["accelerators"]
    assert [sheet["name"] for sheet in sheets] == [sheet.name for sheet in ACCELERATORS]
    uneven = run_cli("plan", recipe_file, "--hardware", "t4", "--devices", 3, "-q")
    assert (uneven.code, uneven.err.count("\n")) == (2, 1)
    assert "4 sequences cannot be divided among 3 devices (use 3 or 6)" in uneven.err
    assert "--devices: requires --hardware" in run_cli("plan", recipe_file, "--devices", 2).err
