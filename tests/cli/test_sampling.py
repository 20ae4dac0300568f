"""`sample`, `eval`, `compare` and `serve` as people use them: every option has its effect or is refused."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from command import COMMAND, Here, complaint, environment

from tinylm.run import Run


def _texts(answer: object) -> list[str]:
    return [sample["text"] for sample in answer.json["samples"]]  # type: ignore[attr-defined]


@pytest.fixture
def ask(here: Here, tiny_run: Run) -> Here:
    def asked(*more: object, **options: object) -> object:
        seed = () if "--beams" in more else ("--seed", 3)  # a search draws nothing
        return here("sample", "-r", tiny_run.path, "--max-new-tokens", 8, *seed, *more, **options)

    return asked


def test_a_prompt_may_come_from_a_file_or_from_a_pipe(ask: Here, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes("naïve\r\n".encode())
    from_file = ask("--prompt-file", tmp_path / "prompt.txt", "-q")
    piped = ask("--prompt", "-", "-q", stdin="naïve\r\n".encode())
    assert from_file.out == piped.out == ask("--prompt", "naïve\r\n", "-q").out
    assert from_file.out.startswith("naïve\r\n")


def test_many_prompts_answer_line_by_line_in_their_order_and_each_as_alone(ask: Here, tmp_path: Path) -> None:
    prompts = ["The for statement", "", "a", "is"] * 5
    lines = [json.dumps({"prompt": prompt, "id": number}) for number, prompt in enumerate(prompts)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n\n")
    answer = ask("--prompts", tmp_path / "prompts.jsonl", "-q")
    records = [json.loads(line) for line in answer.out.splitlines()]
    assert [(record["prompt"], record["id"]) for record in records] == [(prompt, number) for number, prompt in enumerate(prompts)]
    for record in records[:4]:
        assert record["text"] == _texts(ask("--prompt", record["prompt"], "--json"))[0]
        assert record.keys() >= {"tokens", "finish_reason", "tokens_per_second"}
    piped = ask("--prompts", "-", "--field", "q", "-n", 2, "-q", stdin=b'"The for"\n{"q": "a", "more": [1]}\n')
    assert [json.loads(line)["prompt"] for line in piped.out.splitlines()] == ["The for", "The for", "a", "a"]
    assert json.loads(piped.out.splitlines()[-1])["more"] == [1]
    whole = ask("--prompts", tmp_path / "prompts.jsonl", "--json").json
    assert [sample["id"] for sample in whole["samples"]] == list(range(20))


def test_the_continuation_can_be_bound(ask: Here) -> None:
    assert re.fullmatch(r"[0-9]{2}-[0-9]{2}", _texts(ask("--regex", "[0-9]{2}-[0-9]{2}", "--json"))[0])
    assert set(_texts(ask("--choice", "yes", "--choice", "no", "-n", 6, "--json"))) <= {"yes", "no"}
    assert _texts(ask("--force", "For", "--json"))[0].startswith("For")
    plain = _texts(ask("--temperature", 0, "--json"))[0]
    assert _texts(ask("--temperature", 0, "--ban", plain[0], "--json"))[0] != plain
    assert (
        _texts(ask("--temperature", 0, "--logit-bias", "@70=1000", "--json"))[0]
        == _texts(ask("--temperature", 0, "--logit-bias", f"{_named(ask)}=1000", "--json"))[0]
    )
    assert _texts(ask("--frequency-penalty", 100, "--json")) != _texts(ask("--json"))
    assert _texts(ask("--presence-penalty", 100, "--json")) != _texts(ask("--json"))


def _named(ask: Here) -> str:
    [sample] = ask("--temperature", 0, "--logit-bias", "@70=1000", "--logprobs", 0, "--json").json["samples"]
    return str(sample["logprobs"][0]["token"])


def test_probabilities_are_told_to_programs_and_people(ask: Here) -> None:
    [sample] = ask("--logprobs", 2, "--json").json["samples"]
    assert len(sample["logprobs"]) == sample["tokens"]
    assert all(len(one["alternatives"]) == 2 and one["logprob"] <= 0 for one in sample["logprobs"])
    shown = ask("--logprobs", 2, "-q").out
    assert shown.count("%") >= sample["tokens"]


def test_searches_give_scored_texts_best_first(ask: Here) -> None:
    for search in (("--beams", 3), ("--best-of", 4), ("--best-of", 4, "--rank", "contrast")):
        samples = ask("--prompt", "The", *search, "-n", 2, "--json").json["samples"]
        assert len(samples) == 2
        assert samples[0]["score"] >= samples[1]["score"]


def test_turns_go_on_from_what_was_written(ask: Here) -> None:
    answer = ask("--interactive", "-q", stdin=b"The for\n\n/new\nagain\n")
    assert answer.code == 0
    assert answer.out.count("> ") == 5


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_other_weights_write_too(ask: Here, weights: str) -> None:
    assert ask("--weights", weights, "--json").json["samples"][0]["tokens"] > 0


def test_a_compiled_step_writes_the_same(ask: Here) -> None:
    compiled = ask("--compile", "-n", 3, "--json")
    assert _texts(compiled) == _texts(ask("--no-compile", "-n", 3, "--json"))
    assert "compile" not in compiled.err


WRONG = {
    "--prompt a --prompt-file b": "--prompt, --prompt-file: one of them",
    "--regex a --choice b": "--regex, --choice: one of them",
    "--prompts - --interactive": "--prompts, --interactive: one of them",
    "--field x": "--field: only means something with --prompts",
    "--rank contrast": "--rank: only means something with --best-of",
    "--length-penalty 2": "--length-penalty: only means something with --beams",
    "--beams 2 --temperature 1": "--temperature: not together with --beams",
    "--regex a --stop b": "--stop: not together with --regex",
    "--interactive --json": "--json: not together with --interactive",
    "--weights fp8": "--weights: must be fp32, bf16 or int8, not 'fp8'",
    "--prompt-file nowhere.txt": "nowhere.txt: no such file",
    "--prompts nowhere.jsonl": "nowhere.jsonl: no such file",
    "--logit-bias the": "--logit-bias: 'the' is not TOKEN=X",
    "--logit-bias @5=x": "--logit-bias: '@5=x' is not TOKEN=X",
    "--ban @4000": "--ban: @4000 is not an id below 400",
    "--ban qzxqzx": "--ban: 'qzxqzx' is not one token but",
    "--regex (": "--regex: not a regular expression",
    "--regex a{30}": "--regex: needs",
    "--beams 0": "--beams: the best 1 of 0?",
    "--beams 2 -n 3": "--beams: the best 3 of 2? (3 or more)",
    "--best-of 2 -n 3": "--best-of: the best 3 of 2?",
    "--best-of 2 --rank beauty": "--rank: must be one of likelihood, contrast",
    "--logprobs 50": "--logprobs: must be 0 to 20",
    "--presence-penalty nan": "--presence-penalty",
}


@pytest.mark.parametrize("options", WRONG)
def test_what_does_not_go_together_or_is_out_of_range(ask: Here, options: str) -> None:
    assert WRONG[options] in complaint(ask(*options.split()))


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (b"", "-: no prompts"),
        (b"{oops\n", "-:1: not JSON"),
        (b'"a"\n{"q": 1}\n', "-:2: no prompt in field 'prompt'"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_lines_that_are_no_prompts(ask: Here, lines: bytes, told: str) -> None:
    assert told in complaint(ask("--prompts", "-", stdin=lines))


def test_eval_tells_more_when_asked(here: Here, tiny_run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    more = ("--baselines", "--by-frequency", "--by-position", "--by-document", "--hardest", 3)
    shown = here("eval", "-r", tiny_run.path, *more, "--html", page, "--stride", 16)
    assert shown.code == 0, shown
    for words in ("5-gram Kneser-Ney", "xz, the training text", "times in the training text", "tokens before it", "overlap"):
        assert words in shown.out
    assert "<!doctype html>" in page.read_text()
    document = here("eval", "-r", tiny_run.path, *more, "--json", "--quiet").json
    assert document.keys() >= {"baselines", "overlap", "by_frequency", "by_position", "by_document", "hardest"}
    assert len(document["hardest"]) == 3


def test_eval_refuses_what_would_be_ignored(here: Here, tiny_run: Run, tmp_path: Path) -> None:
    assert complaint(here("eval", "-r", tiny_run.path, "--field", "x")) == "--field: only means something with a SOURCE"
    assert complaint(here("eval", "-r", tiny_run.path, "--errors", "replace")) == "--errors: only means something with a SOURCE"
    assert "is a folder" in complaint(here("eval", "-r", tiny_run.path, "--html", tmp_path))


def test_compare_says_what_differs_and_whether_it_matters(here: Here, tiny_run: Run, text_file: Path) -> None:
    answer = here("compare", tiny_run.path, tiny_run.path, "--on", text_file, "--json", "-q").json
    [test] = answer["tests"]
    assert (test["difference"], test["p_value"]) == (0, 1)
    assert answer["curves"][-1]["values"] == [answer["curves"][-1]["values"][0]] * 2
    assert "not told apart" in here("compare", tiny_run.path, tiny_run.path).out
    assert "two runs or more" in complaint(here("compare", tiny_run.path))
    assert "--field: only means something with --on" in complaint(here("compare", tiny_run.path, tiny_run.path, "--field", "x"))


def test_serve_says_where_and_stops_when_told(tiny_run: Run) -> None:
    pytest.importorskip("uvicorn")
    command = [*COMMAND, "serve", "-r", str(tiny_run.path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                with urllib.request.urlopen(f"{address}/v1/models", timeout=5) as answer:
                    assert json.load(answer)["data"][0]["id"] == tiny_run.name
                break
            except OSError:
                time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)


def test_a_port_that_is_taken_is_told(here: Here, tiny_run: Run) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}: Address already in use" in complaint(here("serve", "-r", tiny_run.path, "--port", port), code=1)
    assert "--host: no such address" in complaint(here("serve", "-r", tiny_run.path, "--host", "nowhere.invalid"))
