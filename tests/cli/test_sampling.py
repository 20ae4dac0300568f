"""Test that every option of `sample`, `eval`, `compare` and `serve` either takes effect or is rejected."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from command import COMMAND, CommandResult, RunCli, environment, error_of

from tinylm.data import shards
from tinylm.generation import precompile
from tinylm.native import NativeFunction
from tinylm.recipe import load
from tinylm.recipe.schema import dump_yaml
from tinylm.reporting import Reporter
from tinylm.run import Run


def _texts(result: CommandResult) -> list[str]:
    return [sample["text"] for sample in result.json["samples"]]


@pytest.fixture
def run_sample(run_cli: RunCli, tiny_run: Run) -> RunCli:
    """`run_sample(*options)` runs `tinylm sample` with a fixed seed."""

    def run(*more: object, **options: object) -> CommandResult:
        seed = () if "--beams" in more else ("--seed", 3)  # beam search rejects --seed
        return run_cli("sample", "-r", tiny_run.path, "--max-new-tokens", 8, *seed, *more, **options)

    return run


def test_a_prompt_can_come_from_a_file_or_standard_input(run_sample: RunCli, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes("naïve\r\n".encode())
    from_file = run_sample("--prompt-file", tmp_path / "prompt.txt", "-q")
    piped = run_sample("--prompt", "-", "-q", stdin="naïve\r\n".encode())
    assert from_file.out == piped.out == run_sample("--prompt", "naïve\r\n", "-q").out
    assert from_file.out.startswith("naïve\r\n")


@pytest.mark.parametrize("piped", [True, False])
def test_prompts_can_begin_with_a_byte_order_mark(piped: bool, run_sample: RunCli, tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"prompt": "The for"}\n"a"\n'
    (tmp_path / "prompts.jsonl").write_bytes(content)
    source = ("-",) if piped else (tmp_path / "prompts.jsonl",)
    result = run_sample("--prompts", *source, "-q", stdin=content if piped else b"")
    assert [json.loads(line)["prompt"] for line in result.out.splitlines()] == ["The for", "a"]


def test_beam_search_reports_its_speed(run_sample: RunCli) -> None:
    samples = run_sample("--prompt", "The", "--beams", 3, "-n", 2, "--json").json["samples"]
    assert all(sample["tokens"] and sample["tokens_per_second"] > 0 for sample in samples)


def test_a_prompt_generates_the_same_text_in_a_file_of_prompts_as_on_its_own(run_sample: RunCli, tmp_path: Path) -> None:
    prompts = ["The for statement", "", "a", "is"] * 5
    lines = [json.dumps({"prompt": prompt, "id": number}) for number, prompt in enumerate(prompts)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n\n")
    result = run_sample("--prompts", tmp_path / "prompts.jsonl", "-q")
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [(record["prompt"], record["id"]) for record in records] == [(prompt, number) for number, prompt in enumerate(prompts)]
    for record in records[:4]:
        assert record["text"] == _texts(run_sample("--prompt", record["prompt"], "--json"))[0]
        assert record.keys() >= {"tokens", "finish_reason", "tokens_per_second"}
    piped = run_sample("--prompts", "-", "--field", "q", "-n", 2, "-q", stdin=b'"The for"\n{"q": "a", "more": [1]}\n')
    assert [json.loads(line)["prompt"] for line in piped.out.splitlines()] == ["The for", "The for", "a", "a"]
    assert json.loads(piped.out.splitlines()[-1])["more"] == [1]
    document = run_sample("--prompts", tmp_path / "prompts.jsonl", "--json").json
    assert [sample["id"] for sample in document["samples"]] == list(range(20))


def test_constraints_biases_and_penalties_take_effect(run_sample: RunCli) -> None:
    assert re.fullmatch(r"[0-9]{2}-[0-9]{2}", _texts(run_sample("--regex", "[0-9]{2}-[0-9]{2}", "--json"))[0])
    assert set(_texts(run_sample("--choice", "yes", "--choice", "no", "-n", 6, "--json"))) <= {"yes", "no"}
    assert _texts(run_sample("--force", "For", "--json"))[0].startswith("For")
    greedy = _texts(run_sample("--temperature", 0, "--json"))[0]
    assert _texts(run_sample("--temperature", 0, "--ban", greedy[0], "--json"))[0] != greedy
    assert (
        _texts(run_sample("--temperature", 0, "--logit-bias", "@70=1000", "--json"))[0]
        == _texts(run_sample("--temperature", 0, "--logit-bias", f"{_token_70(run_sample)}=1000", "--json"))[0]
    )
    assert _texts(run_sample("--frequency-penalty", 100, "--json")) != _texts(run_sample("--json"))
    assert _texts(run_sample("--presence-penalty", 100, "--json")) != _texts(run_sample("--json"))


def _token_70(run_sample: RunCli) -> str:
    [sample] = run_sample("--temperature", 0, "--logit-bias", "@70=1000", "--logprobs", 0, "--json").json["samples"]
    return str(sample["logprobs"][0]["token"])


def test_logprobs_are_printed_as_json_and_as_a_table(run_sample: RunCli) -> None:
    [sample] = run_sample("--logprobs", 2, "--json").json["samples"]
    assert len(sample["logprobs"]) == sample["tokens"]
    assert all(len(token["alternatives"]) == 2 and token["logprob"] <= 0 for token in sample["logprobs"])
    shown = run_sample("--logprobs", 2, "-q").out
    assert shown.count("%") >= sample["tokens"]


def test_beam_search_and_best_of_sort_samples_by_score(run_sample: RunCli) -> None:
    for search in (("--beams", 3), ("--best-of", 4), ("--best-of", 4, "--rank", "contrast")):
        samples = run_sample("--prompt", "The", *search, "-n", 2, "--json").json["samples"]
        assert len(samples) == 2
        assert samples[0]["score"] >= samples[1]["score"]


def test_interactive_mode_alternates_between_user_and_model(run_sample: RunCli) -> None:
    result = run_sample("--interactive", "-q", stdin=b"The for\n\n/new\nagain\n")
    assert result.code == 0
    assert result.out.count("> ") == 5


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_packed_weights_generate_text(run_sample: RunCli, weights: str) -> None:
    assert run_sample("--weights", weights, "--json").json["samples"][0]["tokens"] > 0


def test_compiled_decoding_generates_the_same_text(run_sample: RunCli) -> None:
    compiled = run_sample("--compile", "-n", 3, "--json")
    assert _texts(compiled) == _texts(run_sample("--no-compile", "-n", 3, "--json"))
    assert "compile" not in compiled.err


def test_code_that_is_not_compiled_yet_is_compiled_after_the_text_is_printed(
    run_cli: RunCli, tiny_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Reporter] = []
    monkeypatch.setattr(NativeFunction, "is_compiled", lambda self: False)
    monkeypatch.setattr(precompile, "compile_in_background", started.append)
    options = ("sample", "-r", tiny_run.path, "--max-new-tokens", 200, "--seed", 3, "--json")
    default = run_cli(*options)
    assert len(started) == 1
    assert _texts(default) == _texts(run_cli(*options, "--no-compile"))
    run_cli(*options, "--max-new-tokens", 20)
    assert len(started) == 1, "20 tokens do not save the time to load the code"


INVALID = {
    "--prompt a --prompt-file b": "--prompt, --prompt-file: these options are mutually exclusive",
    "--regex a --choice b": "--regex, --choice: these options are mutually exclusive",
    "--prompts - --interactive": "--prompts, --interactive: these options are mutually exclusive",
    "--field x": "--field: requires --prompts",
    "--rank contrast": "--rank: requires --best-of",
    "--length-penalty 2": "--length-penalty: requires --beams",
    "--beams 2 --temperature 1": "--temperature: cannot be combined with --beams",
    "--regex a --stop b": "--stop: cannot be combined with --regex",
    "--interactive --json": "--json: cannot be combined with --interactive",
    "--weights fp8": "--weights: must be fp32, bf16 or int8, not 'fp8'",
    "--prompt-file nowhere.txt": "nowhere.txt: no such file",
    "--prompts nowhere.jsonl": "nowhere.jsonl: no such file",
    "--logit-bias the": "--logit-bias: 'the' is not of the form TOKEN=NUMBER",
    "--logit-bias @5=x": "--logit-bias: '@5=x' is not of the form TOKEN=NUMBER",
    "--ban @4000": "--ban: @4000 is not an id below 400",
    "--ban qzxqzx": "--ban: 'qzxqzx' is not a single token but",
    "--regex (": "--regex: not a regular expression",
    "--regex a{30}": "--regex: requires at least",
    "--beams 0": "--beams: must be at least -n (1)",
    "--beams 2 -n 3": "--beams: must be at least -n (3)",
    "--best-of 2 -n 3": "--best-of: must be at least -n (3)",
    "--best-of 2 --rank beauty": "--rank: must be one of likelihood, contrast",
    "--logprobs 50": "--logprobs: must be 0 to 20",
    "--presence-penalty nan": "--presence-penalty",
}


@pytest.mark.parametrize("options", INVALID)
def test_invalid_options_are_rejected(run_sample: RunCli, options: str) -> None:
    assert INVALID[options] in error_of(run_sample(*options.split()))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"", "-: contains no prompts"),
        (b"{oops\n", "-:1: not JSON"),
        (b'"a"\n{"q": 1}\n', "-:2: no prompt in field 'prompt'"),
        (b"\xff", "-: not UTF-8 at byte 0"),
    ],
)
def test_invalid_prompt_lines_are_rejected(run_sample: RunCli, lines: bytes, message: str) -> None:
    assert message in error_of(run_sample("--prompts", "-", stdin=lines))


def test_eval_prints_optional_tables(run_cli: RunCli, tiny_run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    more = ("--baselines", "--by-frequency", "--by-position", "--by-document", "--hardest", 3)
    shown = run_cli("eval", "-r", tiny_run.path, *more, "--html", page, "--stride", 16)
    assert shown.code == 0, shown
    for label in ("5-gram Kneser-Ney", "xz with the training text", "count in training text", "context length", "overlap"):
        assert label in shown.out
    assert "<!doctype html>" in page.read_text()
    document = run_cli("eval", "-r", tiny_run.path, *more, "--json", "--quiet").json
    assert document.keys() >= {"baselines", "overlap", "by_frequency", "by_position", "by_document", "hardest"}
    assert len(document["hardest"]) == 3


def test_eval_rejects_options_that_would_have_no_effect(run_cli: RunCli, tiny_run: Run, tmp_path: Path) -> None:
    assert error_of(run_cli("eval", "-r", tiny_run.path, "--field", "x")) == "--field: requires a SOURCE"
    assert error_of(run_cli("eval", "-r", tiny_run.path, "--errors", "replace")) == "--errors: requires a SOURCE"
    assert "is a folder" in error_of(run_cli("eval", "-r", tiny_run.path, "--html", tmp_path))


def test_compare_prints_differences_and_their_significance(run_cli: RunCli, tiny_run: Run, text_file: Path) -> None:
    result = run_cli("compare", tiny_run.path, tiny_run.path, "--on", text_file, "--json", "-q").json
    [test] = result["tests"]
    assert (test["difference"], test["p_value"], test["p_corrected"], test["better"]) == (0, 1, 1, None)
    assert (result["text"], result["split"]) == (str(text_file), None)
    assert result["curves"][-1]["values"] == [result["curves"][-1]["values"][0]] * 2
    shown = run_cli("compare", tiny_run.path, tiny_run.path).out
    assert "do not differ significantly on this text" in shown
    assert "whether these trained models differ on this text" in shown
    assert "at least two runs" in error_of(run_cli("compare", tiny_run.path))
    assert "--field: requires --on" in error_of(run_cli("compare", tiny_run.path, tiny_run.path, "--field", "x"))


def test_compare_prints_recipes_in_the_notation_of_recipes(run_cli: RunCli, tiny_run: Run, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_run.path, tmp_path / "other")
    changed = load(tiny_run.path / "recipe.yaml", ["training.compile=true", "training.optimizer.weight_decay=0.30001"])
    (other / "recipe.yaml").write_text(dump_yaml(changed.as_dict()))
    shown = run_cli("compare", tiny_run.path, other).out
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.startswith("training.")}
    assert rows["training.compile"] == ["false", "true"]
    assert rows["training.optimizer.weight_decay"][1] == "0.30001"


def test_compare_runs_no_significance_tests_if_the_held_out_texts_differ(run_cli: RunCli, tiny_run: Run, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_run.path, tmp_path / "other")
    kept = tiny_run.heldout()
    shards.write_shard(
        other / "heldout",
        "heldout",
        [(kept.tokens[1:-50], True)],
        vocab_size=tiny_run.tokenizer.vocab_size,
        end_of_text=kept.end_of_text,
        unknown=None,
        sizes=lambda: (kept.counts.bytes, kept.counts.characters),
    )
    shown = run_cli("compare", tiny_run.path, other)
    assert shown.code == 0
    assert "held-out loss at step" in shown.out
    assert "the runs have different held-out texts" in shown.err
    document = run_cli("compare", tiny_run.path, other, "--json").json
    assert (document["tests"], document["not_tested"]) == ([], "the runs have different held-out texts")
    assert document["curves"]


def test_a_split_that_the_run_does_not_have_is_rejected(run_cli: RunCli, tiny_run: Run, text_file: Path) -> None:
    assert "overlap" in run_cli("eval", "-r", tiny_run.path).out
    assert "this run has no test text" in error_of(run_cli("eval", "-r", tiny_run.path, "--split", "test"))
    assert "this run has no test text" in error_of(run_cli("compare", tiny_run.path, tiny_run.path, "--split", "test"))
    assert error_of(run_cli("eval", "-r", tiny_run.path, "--split", "x")) == "--split: must be heldout or test, not 'x'"
    assert "has no effect with a SOURCE" in error_of(run_cli("eval", "-r", tiny_run.path, text_file, "--split", "test"))


def test_serve_prints_its_address_and_stops_on_a_signal(tiny_run: Run) -> None:
    pytest.importorskip("uvicorn")
    command = [*COMMAND, "serve", "-r", str(tiny_run.path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address)
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as response:
                    assert json.load(response)["data"][0]["id"] == tiny_run.name
                break
            except OSError:
                time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)


def test_a_port_in_use_is_an_error(run_cli: RunCli, tiny_run: Run) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}: Address already in use" in error_of(
            run_cli("serve", "-r", tiny_run.path, "--port", port), code=1
        )
    assert "--host: cannot resolve" in error_of(run_cli("serve", "-r", tiny_run.path, "--host", "nowhere.invalid"))
