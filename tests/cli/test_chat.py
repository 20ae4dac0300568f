"""Test the commands for conversations: chat, data show, eval and new --chat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import CommandResult, RunCli, error_of
from conversations import additions, chat_recipe, write_conversations

from tinylm.pipeline import train
from tinylm.recipe import load
from tinylm.run import Run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("chat") / "sums.jsonl", additions(20))


@pytest.fixture(scope="module")
def run(tiny_run: Run, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "chat"
    train(chat_recipe(tiny_run, data, "model.context_length=64", "training.steps=2"), folder, device="cpu")
    return Run.open(folder)


@pytest.fixture
def talk(run_cli: RunCli, run: Run) -> RunCli:
    """`talk(text, *options)` runs `tinylm chat` with `text` on standard input."""

    def start(text: str, *options: str) -> CommandResult:
        sampling = ("--temperature", "0", "--max-new-tokens", "8", "--no-compile")
        return run_cli("chat", "--run", run.path, *sampling, *options, stdin=text.encode())

    return start


def test_chat_answers_every_line_and_saves_the_conversation(talk: RunCli, tmp_path: Path) -> None:
    saved = tmp_path / "saved.jsonl"
    result = talk(
        f"What is 1 + 3?\n\n/save {saved}\n/reset\nWhat is 1 + 3?\n/save {saved}\n/quit\nnever read\n", "--system", "Brief."
    )
    assert result.code == 0, result.err
    first, second = (json.loads(line)["messages"] for line in saved.read_text().splitlines())
    assert [message["role"] for message in first] == ["system", "user", "assistant"]
    assert first == second, "after /reset, the same message gets the same answer"
    assert result.out == f"{first[2]['content']}\n{second[2]['content']}\n"
    assert "never read" not in result.out


def test_chat_reports_dropped_messages_and_truncated_answers(talk: RunCli) -> None:
    result = talk("What is 1 + 3?\n" * 6)
    assert result.code == 0, result.err
    assert "the context is full: dropped 2 messages from the beginning" in result.err
    assert "the answer was cut off after 8 tokens" in result.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/undo\n", "no such command /undo (/help lists the commands)"),
        ("/save\n", "/save: requires a file name (for example /save chat.jsonl)"),
        ("/save x.jsonl\n", "/save: there is nothing to save yet"),
        ("x" * 1000 + "\n", "the message has"),
    ],
)
def test_mistakes_in_piped_input_end_the_command(talk: RunCli, text: str, message: str) -> None:
    assert message in error_of(talk(text))


def test_chat_needs_a_model_that_was_trained_on_conversations(run_cli: RunCli, tiny_run: Run, run: Run) -> None:
    message = error_of(run_cli("chat", "--run", tiny_run.path))
    assert message == (
        f"{tiny_run.path}: this model was not trained on conversations "
        "(`tinylm new --chat FILE --from RUN` writes a recipe that fine-tunes it)"
    )
    assert error_of(run_cli("chat", "--run", run.path, "--system", " ")) == "--system: must not be empty"


def test_data_show_marks_the_text_that_is_learned(run_cli: RunCli, run: Run) -> None:
    result = run_cli("data", "show", run.path, "-n", "1")
    assert result.code == 0, result.err
    assert "<|user|>What is" in result.out
    marked = [part.partition("]]")[0] for part in result.out.split("[[")[1:]]
    assert marked
    assert all(text.endswith("<|end_of_turn|>") and "<|user|>" not in text for text in marked)
    shown = run_cli("data", "show", run.path, "-n", "2", "--start", "1", "--json").json
    learned = [part["text"] for example in shown["examples"] for parts in example["segments"] for part in parts if part["learned"]]
    assert all(text.endswith("<|end_of_turn|>") for text in learned)


def test_data_show_counts_every_token_of_a_text_except_the_first_as_learned(run_cli: RunCli, tiny_run: Run) -> None:
    [example] = run_cli("data", "show", tiny_run.path, "-n", "1", "--json").json["examples"]
    assert (example["tokens"], example["learned"], example["padding"]) == (33, 32, 0)


def test_data_show_rejects_other_objectives(run_cli: RunCli, tmp_path: Path) -> None:
    recipe = "data: {format: labels, train: a.jsonl}\nmodel: {architecture: encoder}\ntraining: {steps: 1}\n"
    (tmp_path / "labels.yaml").write_text(recipe)
    (tmp_path / "a.jsonl").write_text("")
    message = error_of(run_cli("data", "show", tmp_path / "labels.yaml", "--set", f"data.train={tmp_path / 'a.jsonl'}"))
    assert message == "objective.name: must be causal_lm or dpo to show training examples, not classification"


def test_eval_evaluates_answers_and_rejects_options_for_texts(run_cli: RunCli, run: Run, data: Path) -> None:
    result = run_cli("eval", "--run", run.path, "--json", "--mistakes", "1").json
    assert result["conversations"] == result["answers"] == 20
    assert 0 <= result["exact_match"] <= result["stop_rate"] <= 1
    assert len(result["mistakes"]) == 1
    shown = run_cli("eval", "--run", run.path)
    assert "exact match" in shown.out
    assert "stop rate" in shown.out
    assert (
        error_of(run_cli("eval", "--run", run.path, "--stride", "2"))
        == "--stride: has no effect when a chat model is evaluated on its own conversations"
    )


def test_new_writes_a_recipe_that_trains(run_cli: RunCli, tiny_run: Run, data: Path, tmp_path: Path) -> None:
    result = run_cli("new", "--chat", data, "--from", tiny_run.path, "--out", tmp_path / "my.yaml", "--name", "mine")
    assert result.code == 0, result.err
    recipe = load(tmp_path / "my.yaml")
    assert (recipe.name, recipe.data.format, recipe.training.epochs) == ("mine", "chat", 10)
    assert recipe.data.mix is not None
    assert recipe.data.mix.text == tiny_run.recipe.data.train
    trained = run_cli("train", tmp_path / "my.yaml", "--out", tmp_path / "run", "--set", "training.epochs=0.1", "--quiet", "--json")
    assert trained.code == 0, trained.err
    assert trained.json["val_loss"] > 0
    plan = run_cli("plan", tmp_path / "my.yaml", "--json").json
    assert plan["vocab_size"] == tiny_run.tokenizer.vocab_size + 4


def test_new_rejects_invalid_combinations_of_options(run_cli: RunCli, tiny_run: Run, data: Path) -> None:
    assert error_of(run_cli("new", "--chat", data)) == "--chat: requires --from RUN, the run to fine-tune"
    assert error_of(run_cli("new", data, "--from", tiny_run.path)) == "--from: requires --chat"
    message = error_of(run_cli("new", data, "--chat", data, "--from", tiny_run.path))
    assert message == "SOURCE: cannot be combined with --chat (repeat --chat for several files)"
    assert "must be messages, prompt_response or alpaca" in error_of(
        run_cli("new", "--chat", data, "--from", tiny_run.path, "--layout", "x")
    )
