"""A model that memorized twenty conversations reproduces each answer and then stops, in tinylm, transformers and llama.cpp."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversations import HOSTILE, exchange, write_conversations

from tinylm.errors import InputError
from tinylm.generation.chat import ChatSession, answer_all, chat_prompt
from tinylm.generation.chat_evaluation import evaluate_chat_run
from tinylm.generation.sampling import SamplingOptions
from tinylm.interchange import chat_files
from tinylm.interchange.exporting import export
from tinylm.model.decoder import Decoder
from tinylm.pipeline import train
from tinylm.recipe import loads
from tinylm.run import Run
from tinylm.text.conversations import ASSISTANT, SYSTEM, USER, Message

CPU = torch.device("cpu")
NAMES = [chr(ord("A") + number) + "lex" for number in range(20)]
ANSWERS = [f"{name} likes the number {7 * number % 20}." for number, name in enumerate(NAMES)]
QUESTIONS = [f"What does {name} like?" for name in NAMES]
GREEDY = SamplingOptions(30, temperature=0.0, top_k=None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("overfit")
    conversations = [exchange(question, answer) for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    data = write_conversations(folder / "twenty.jsonl", conversations)
    recipe = loads(
        f"data: {{format: chat, train: {data}, heldout: {data}}}\ntokenizer: {{kind: bpe, split: gpt2, vocab_size: 320}}\n"
        "model: {preset: llama, n_layer: 2, n_head: 2, n_embd: 64, context_length: 64}\n"
        "training: {steps: 120, global_batch_size: 10, micro_batch_size: 10, precision: fp32, compile: off,"
        " optimizer: {name: adamw, lr: 1e-2}}\nevaluation: {every: 120}\ncheckpoint: {every: 120}\n"
        "sampling: {every: 120, prompts: ['What does Alex like?'], max_new_tokens: 20}\n"
    )
    train(recipe, folder / "run", device="cpu")
    return Run.open(folder / "run")


@pytest.fixture(scope="module")
def network(run: Run) -> Any:
    return run.network(run.checkpoint(), CPU)


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Export the run and load its tokenizer and model with transformers."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export(run, "hf", folder)
    return transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)


def prompts(run: Run) -> list[list[int]]:
    encoder = run.require_chat()
    return [encoder.prompt(encoder.turns([Message(USER, question)])) for question in QUESTIONS]


def test_the_model_reproduces_each_answer_and_then_stops(run: Run, network: Any) -> None:
    samples = list(answer_all(network, run.require_chat(), prompts(run), GREEDY))
    assert [sample.text for sample in samples] == ANSWERS
    assert {sample.finish_reason for sample in samples} == {"end"}


def test_the_evaluation_counts_exact_matches_and_stops(run: Run) -> None:
    result = evaluate_chat_run(run, device="cpu").as_dict()
    assert (result["exact_match"], result["stop_rate"], result["answers"]) == (1.0, 1.0, 20)
    logged = [line for line in run.metrics() if line["kind"] == "eval"][-1]
    assert result["loss"] == pytest.approx(logged["val_loss"], rel=1e-5)
    assert result["bytes"] == sum(len(answer) for answer in ANSWERS)
    questions = [answer.question for answer in evaluate_chat_run(run, max_answers=3, device="cpu").answers]
    assert questions == QUESTIONS[:3]


def test_samples_during_training_answer_the_prompts(run: Run) -> None:
    assert "What does Alex like?\n" in (run.path / "samples.md").read_text()


def test_transformers_produces_the_same_ids_and_text(run: Run, exported: tuple[Any, Any]) -> None:
    tokenizer, model = exported
    encoder = run.require_chat()
    for question, answer, ids in zip(QUESTIONS, ANSWERS, prompts(run), strict=True):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert inputs["input_ids"][0].tolist() == ids
        output = model.generate(**inputs, max_new_tokens=30)[0, len(ids) :].tolist()
        assert output == [*run.tokenizer.encode(answer), encoder.end_of_turn]
        assert tokenizer.decode(output, skip_special_tokens=True) == answer


def test_llama_cpp_produces_the_same_text(run: Run, tmp_path: Path) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    import llama_cpp

    export(run, "gguf", tmp_path / "model.gguf")
    model = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, n_threads=1, verbose=False)
    for question, answer in zip(QUESTIONS[:3], ANSWERS, strict=False):
        reply = model.create_chat_completion([{"role": "user", "content": question}], max_tokens=30, temperature=0.0)
        assert reply["choices"][0]["message"]["content"] == answer
        assert reply["choices"][0]["finish_reason"] == "stop"


def test_a_gguf_file_contains_the_template_and_the_end_of_turn(run: Run, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    export(run, "gguf", tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    encoder = run.require_chat()
    assert fields["tokenizer.chat_template"].contents() == encoder.jinja()
    assert fields["tokenizer.ggml.eos_token_id"].contents() == encoder.end_of_turn
    assert fields["tokenizer.ggml.eot_token_id"].contents() == encoder.end_of_turn


@pytest.mark.parametrize("content", HOSTILE)
def test_hostile_messages_contain_no_control_tokens_and_have_the_same_ids_in_jinja(
    run: Run, exported: tuple[Any, Any], content: str
) -> None:
    encoder, (tokenizer, _) = run.require_chat(), exported
    control = {run.tokenizer.backend.token_to_id(name) for name in encoder.control_tokens}
    for messages in (
        [Message(USER, content)],
        [Message(SYSTEM, content), Message(USER, content), Message(ASSISTANT, content), Message(USER, content)],
    ):
        turns = encoder.turns(messages)
        assert not control & {id for turn in turns for id in turn.ids[1:-1]}
        rendered = [message.as_dict() for message in messages]
        theirs = tokenizer.apply_chat_template(rendered, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert theirs == encoder.prompt(turns)


def test_an_ordinary_message_is_not_changed(run: Run) -> None:
    encoder = run.require_chat()
    for text in ("a < b |> c", "{{ x }}", "<|im_start|>"):
        assert run.tokenizer.decode(encoder.turn(Message(USER, text)).ids[1:-1]) == text
    assert run.tokenizer.decode(encoder.turn(Message(USER, "say <|user|>")).ids[1:-1]) == "say < |user|>"


def test_the_export_fails_if_the_template_differs(run: Run, exported: tuple[Any, Any]) -> None:
    from tinylm.errors import WorkError

    tokenizer, _ = exported
    before = tokenizer.chat_template
    tokenizer.chat_template = before.replace(".replace('<|user|>', '< |user|>')", "")
    try:
        with pytest.raises(WorkError, match="the exported chat template produces different tokens"):
            chat_files.check_ids(tokenizer, run.require_chat())
    finally:
        tokenizer.chat_template = before


def test_a_session_remembers_its_turns_and_drops_the_oldest(run: Run, network: Any) -> None:
    session = ChatSession(Decoder(network), run.require_chat(), GREEDY, system="s")
    sample, prompt = session.ask(QUESTIONS[3])
    assert prompt.left_out == 0
    assert [message.role for message in session.conversation] == [SYSTEM, USER, ASSISTANT]
    assert session.conversation[-1].content == sample.text
    for _ in range(4):
        sample, prompt = session.ask(QUESTIONS[5])
    assert prompt.left_out > 0
    assert prompt.left_out % 2 == 0
    assert len(prompt.ids) + prompt.new_tokens <= 65
    messages = list(session.messages)
    with pytest.raises(InputError, match="tokens with its control tokens, but the model's context has only 64"):
        session.ask("x" * 500)
    assert session.messages == messages
    session.reset()
    assert [message.role for message in session.conversation] == [SYSTEM]


def test_only_whole_exchanges_are_dropped_from_the_history_and_the_system_message_is_kept(run: Run) -> None:
    encoder = run.require_chat()
    messages = [Message(SYSTEM, "s"), *exchange("first", "a"), *exchange("second", "b"), Message(USER, "third")]
    turns = encoder.turns(messages)
    full = len(encoder.prompt(turns))
    assert chat_prompt(messages, encoder, full + 10, 10).left_out == 0
    shorter = chat_prompt(messages, encoder, full + 1, 10)
    assert shorter.left_out == 2
    assert shorter.ids == encoder.prompt([turns[0], *turns[3:]])


def test_a_run_that_was_not_trained_on_conversations_is_rejected(tiny_run: Run) -> None:
    with pytest.raises(InputError, match="was not trained on conversations"):
        tiny_run.require_chat()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("chat_template.json", b"{}x", "not a chat template"),
        ("chat_template.json", b'{"user": "nobody"}', "the tokenizer has no control token nobody"),
        ("heldout/heldout-turns.npy", b"", "the turns are missing or damaged"),
        ("heldout/heldout-turns.npy", None, "the turns are missing or damaged"),
        ("heldout/heldout-turns.npy", np.array([[0, 1, 3]]), "the turns do not match the conversations"),
        ("heldout/heldout-turns.npy", np.array([[0, 7, 3]]), "an unexpected structure"),
        ("heldout/heldout-turns.npy", np.array([[0, 1, -3]]), "an unexpected structure"),
        ("heldout/heldout-turns.npy", np.array([[10**12, 1, 3]]), "an unexpected structure"),
        ("heldout/heldout-turns.npy", np.zeros((2, 3)), "an unexpected structure"),
    ],
)
def test_damaged_run_files_are_reported(run: Run, tmp_path: Path, name: str, damage: Any, message: str) -> None:
    shutil.copytree(run.path, tmp_path / "copy")
    file = tmp_path / "copy" / name
    file.unlink()
    if isinstance(damage, bytes):
        file.write_bytes(damage)
    elif damage is not None:
        np.save(file, damage)
    with pytest.raises(InputError, match=message):
        evaluate_chat_run(Run.open(tmp_path / "copy"), device="cpu")
