"""Direct preference optimization: the loss, the reference model, exact resumption, several processes, and invalid preferences."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_processes
from command import RunCli
from conversations import additions, chat_recipe, losses, write_conversations
from planning import IDLE
from safetensors.torch import load_file

from tinylm.cost.plan import make_plan
from tinylm.data import formats
from tinylm.data.chat import EncodedConversations, PreparedChat
from tinylm.data.estimate import estimate_data_size
from tinylm.data.preferences import ANSWER, PreferencePairs, fit_pair
from tinylm.errors import InputError
from tinylm.model.base import Model
from tinylm.pipeline import train
from tinylm.recipe import Recipe, loads
from tinylm.reporting import SILENT, CollectingReporter
from tinylm.run import Run
from tinylm.tokenizer.chat_template import Turn
from tinylm.training.distillation import Teachers
from tinylm.training.dpo import DPO
from tinylm.training.feed import LocalBatch
from tinylm.training.metrics import Observer
from tinylm.training.precision import Precision
from tinylm.training.step import GradientSettings, accumulate

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)


def _sums(count: int = 12) -> list[dict[str, Any]]:
    """Return preferences about sums, with answers of different lengths. Some continue a longer conversation."""
    records = []
    for number in range(count):
        chosen, rejected = f"It is {number + 3}.", "No idea, sorry." if number % 2 else "No."
        record: dict[str, Any] = {"prompt": f"What is {number} + 3?", "chosen": chosen, "rejected": rejected}
        if number % 3 == 0:
            earlier = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
            record = {**record, "messages": [*earlier, {"role": "user", "content": record.pop("prompt")}]}
        records.append(record)
    return records


def _write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _recipe(run: Run, data: Path, *overrides: str) -> Recipe:
    return loads(
        f"data: {{format: preferences, train: {data}, heldout: {data}}}\nmodel: {{init_from: {run.path}}}\n"
        "training: {steps: 6, global_batch_size: 4, micro_batch_size: 4, precision: fp32, compile: off, log_every: 1,\n"
        "  optimizer: {name: adamw, lr: 3.0e-3}}\n"
        "evaluation: {every: 3}\ncheckpoint: {every: 2, keep: 3}\n",
        overrides,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("preferences") / "sums.jsonl", _sums())


@pytest.fixture(scope="module")
def chat_run(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs")
    conversations = write_conversations(folder / "chat.jsonl", additions(6))
    train(chat_recipe(tiny_run, conversations, "model.context_length=64", "training.steps=2"), folder / "chat", device="cpu")
    return Run.open(folder / "chat")


@pytest.fixture(scope="module")
def recipe(chat_run: Run, data: Path) -> Recipe:
    return _recipe(chat_run, data)


@pytest.fixture(scope="module")
def prepared(recipe: Recipe) -> PreparedChat:
    result = formats.find(recipe.data).prepare(recipe, SILENT, 1)
    assert isinstance(result, PreparedChat)
    return result


@pytest.fixture(scope="module")
def dpo_run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "dpo"
    train(recipe, folder, device="cpu")
    return Run.open(folder)


def _weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoint("last").path / "model.safetensors")


def _network(run: Run, noise: float = 0.0) -> Model:
    network = run.network(run.checkpoint("last"), CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return network


def _answer_logprob(network: Model, conversations: EncodedConversations, index: int) -> torch.Tensor:
    """Return log p(last answer | all earlier turns), computed without padding and one token at a time."""
    turns = conversations[index]
    ids = [conversations.shard.end_of_text, *(id for turn in turns for id in turn.ids)]
    logprobs = network(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    first = len(ids) - len(turns[-1].ids) + 1  # the token after the role
    return torch.stack([logprobs[position - 1, ids[position]] for position in range(first, len(ids))]).sum()


def _margin(network: Model, reference: Model, conversations: EncodedConversations, pair: int, beta: float) -> torch.Tensor:
    ratios = []
    for index in (2 * pair, 2 * pair + 1):
        with torch.no_grad():
            before = _answer_logprob(reference, conversations, index)
        ratios.append(_answer_logprob(network, conversations, index) - before)
    return beta * (ratios[0] - ratios[1])


def _examples(prepared: PreparedChat, network: Model, count: int) -> LocalBatch:
    dataset = PreferencePairs(prepared.train, network.model.context_length)
    return LocalBatch.whole(DPO(1.0).batch(dataset.examples(0, count), 0, 0))


def test_the_loss_and_its_gradient_equal_a_plain_reference(chat_run: Run, prepared: PreparedChat) -> None:
    network, reference = _network(chat_run, noise=0.05).double(), _network(chat_run).double()
    margins = torch.stack([_margin(network, reference, prepared.train, pair, 0.3) for pair in range(12)])
    expected = -(1 / (1 + (-margins).exp())).log().sum()
    gradients = torch.autograd.grad(expected, list(network.parameters()))
    batch = _examples(prepared, network, 12).share
    loss = DPO(0.3, reference).loss_sum(network, batch)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_the_mean_loss_does_not_depend_on_micro_batches_or_processes(chat_run: Run, prepared: PreparedChat) -> None:
    objective = DPO(0.3, _network(chat_run))
    batch = _examples(prepared, _network(chat_run), 8)
    assert batch.global_target_count == 8

    def step(micro_batch_size: int, shares: list[LocalBatch]) -> tuple[torch.Tensor, torch.Tensor]:
        network = _network(chat_run, noise=0.05)
        settings = GradientSettings(micro_batch_size, FP32, objective)
        loss = torch.stack([accumulate(network, share, settings) for share in shares]).sum()
        return loss, torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])

    halves = [replace(batch, share=batch.share.rows(slice(first, first + 4))) for first in (0, 4)]
    expected = step(8, [batch])
    for result in (step(2, [batch]), step(1, halves)):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


def test_only_the_last_answers_are_scored_and_both_have_the_same_prompt(prepared: PreparedChat) -> None:
    conversations = prepared.train
    longest = max(range(12), key=lambda pair: sum(len(turn.ids) for turn in conversations[2 * pair]))
    complete = fit_pair(conversations, longest, 1000)
    assert complete is not None
    assert [turn.role for turn in conversations[2 * longest]] == ["user", "assistant", "user", "assistant"]
    for context in (1000, complete[0].shape[1] - 3):
        pair = fit_pair(conversations, longest, context)
        assert pair is not None
        prompts = []
        for side, conversation in enumerate(pair):
            turn: Turn = conversations[2 * longest + side][-1]
            ids, segments = conversation
            assert ids[segments == ANSWER].tolist() == turn.ids[1:]
            prompts.append(ids[: len(ids) - len(turn.ids)].tolist())
        assert prompts[0] == prompts[1]
    assert len(prompts[0]) < len(complete[0][0])


def test_a_plan_counts_both_answers_and_the_reference_model(recipe: Recipe, prepared: PreparedChat) -> None:
    data = estimate_data_size(recipe, SILENT)
    dataset = PreferencePairs(prepared.train, recipe.model.context_length)
    assert data.example is not None
    assert data.example.length == dataset.examples(0, 1)["tokens"].shape[1]
    tokens = sum(side.shape[1] for pair in dataset.pairs for side in pair)
    assert (data.tokens.train_tokens, data.tokens.heldout_tokens) == (tokens, tokens), "the same file is held out"
    alone, planned = (
        make_plan(recipe, data.tokens.vocab_size, tokens, size=data.example, teachers=teachers, processor=IDLE)
        for teachers in ((), (recipe.model,))
    )
    assert planned.tokens_per_step == round(4 * data.example.tokens)
    assert planned.memory_bytes.teachers == alone.memory_bytes.weights
    assert planned.flops > alone.flops


def test_training_raises_the_margin_of_held_out_pairs(recipe: Recipe, chat_run: Run, dpo_run: Run, prepared: PreparedChat) -> None:
    evaluations = [line for line in dpo_run.metrics() if line["kind"] == "eval"]
    first = next(line for line in dpo_run.metrics() if line["kind"] == "step")
    assert first["loss"] == pytest.approx(math.log(2))
    assert evaluations[-1]["val_reward_margin"] > 0.1
    assert evaluations[-1]["val_preference_loss"] < math.log(2)
    network, reference = _network(dpo_run), chat_run.network(chat_run.checkpoint(), CPU)
    margins = torch.stack([_margin(network, reference, prepared.heldout, pair, 0.1) for pair in range(12)]).detach().double()
    assert evaluations[-1]["val_reward_margin"] == pytest.approx(float(margins.mean()), rel=1e-3)
    assert evaluations[-1]["val_preference_loss"] == pytest.approx(float(-margins.sigmoid().log().mean()), rel=1e-3)
    assert evaluations[-1]["val_accuracy"] == float((margins > 0).double().mean())
    assert dpo_run.require_chat().end_of_turn == chat_run.require_chat().end_of_turn


def test_a_resumed_run_is_bitwise_identical(recipe: Recipe, dpo_run: Run, tmp_path: Path) -> None:
    train(recipe, tmp_path / "resumed", device="cpu", stop_after=0.0)
    stopped = Run.open(tmp_path / "resumed")
    assert stopped.checkpoint("last").step < 6
    train(recipe, stopped.path, device="cpu", resume=True)
    resumed = Run.open(stopped.path)
    assert losses(resumed) == losses(dpo_run)
    assert all(torch.equal(tensor, _weights(dpo_run)[name]) for name, tensor in _weights(resumed).items())


def test_a_run_is_not_resumed_with_another_reference_model(chat_run: Run, data: Path, tmp_path: Path) -> None:
    shutil.copytree(chat_run.path, tmp_path / "chat")
    recipe = _recipe(Run.open(tmp_path / "chat"), data)
    train(recipe, tmp_path / "dpo", device="cpu", stop_after=0.0)
    shutil.rmtree(tmp_path / "chat")
    train(chat_run.recipe.model_copy(update={"seed": 2}), tmp_path / "chat", device="cpu")
    with pytest.raises(InputError, match=r"the weights of the reference model \(model\.init_from\) are not the ones"):
        train(recipe, tmp_path / "dpo", device="cpu", resume=True)


def test_two_processes_train_the_same_model(recipe: Recipe, dpo_run: Run, tmp_path: Path) -> None:
    both = recipe.model_copy(update={"training": recipe.training.model_copy(update={"micro_batch_size": 1})})
    training_processes.run(both, tmp_path / "both", world_size=2)
    run = Run.open(tmp_path / "both")
    for key in ("loss", "val_preference_loss"):
        values = [[line[key] for line in member.metrics() if line.get(key) is not None] for member in (run, dpo_run)]
        assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_the_reference_of_a_lora_run_is_the_model_without_adapters(chat_run: Run, data: Path, tmp_path: Path) -> None:
    recipe = _recipe(chat_run, data, "training.lora={rank: 4}")
    train(recipe, tmp_path / "lora", device="cpu")
    run = Run.open(tmp_path / "lora")
    steps = [line["loss"] for line in run.metrics() if line["kind"] == "step"]
    assert steps[0] == pytest.approx(math.log(2))
    assert steps[-1] < steps[0]
    teachers = Teachers.open(recipe, run.path)
    assert teachers is not None
    assert teachers.key == "model.init_from"


_PROMPT = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."}


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": "Hi?", "chosen": "Hello."}, r"no field 'rejected'; fields: prompt, chosen"),
        ({"chosen": "Hello.", "rejected": "No."}, "no field 'prompt'"),
        ({**_PROMPT, "rejected": "Hello."}, "the chosen and the rejected answer are the same"),
        ({**_PROMPT, "chosen": "  "}, "chosen: the assistant message is empty"),
        ({**_PROMPT, "prompt": ""}, "the user message is empty"),
        ({**_PROMPT, "rejected": 7}, "field 'rejected' must be text, not 7"),
        (
            {**_PROMPT, "rejected": [{"role": "user", "content": "No."}]},
            "rejected: must be text, or a list with one assistant message",
        ),
        ({**_PROMPT, "messages": [{"role": "assistant", "content": "Hi."}]}, "message 1: must have the role user, not assistant"),
        (
            {**_PROMPT, "messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}]},
            "the last message must have the role user, not assistant",
        ),
        ({**_PROMPT, "messages": [{"role": "tool", "content": "Hi."}]}, "unknown role 'tool'"),
        ([], "not a JSON object"),
    ],
)
def test_an_invalid_preference_is_reported_with_its_line(chat_run: Run, tmp_path: Path, record: Any, problem: str) -> None:
    recipe = _recipe(chat_run, _write(tmp_path / "bad.jsonl", [_PROMPT, record]))
    with pytest.raises(InputError, match=rf"bad\.jsonl:2.*{problem}"):
        formats.find(recipe.data).prepare(recipe, SILENT, 1)


def test_a_list_with_one_assistant_message_is_the_same_as_its_text(chat_run: Run, data: Path, tmp_path: Path) -> None:
    def as_list(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    records = [{**record, "chosen": as_list(record["chosen"]), "rejected": as_list(record["rejected"])} for record in _sums()]
    written = _write(tmp_path / "lists.jsonl", records)
    fingerprints = []
    for path in (data, written):
        recipe = _recipe(chat_run, path)
        fingerprints.append(formats.find(recipe.data).prepare(recipe, SILENT, 1).fingerprint)
    assert fingerprints[0] == fingerprints[1]


def test_pairs_with_the_same_prompt_are_in_the_same_split(chat_run: Run, tmp_path: Path) -> None:
    records = [{**record, "rejected": answer} for record in _sums(8) for answer in ("No.", "Perhaps.", "Ask me later.")]
    recipe = _recipe(chat_run, _write(tmp_path / "many.jsonl", records), "data.heldout=0.3")
    reporter = CollectingReporter()
    prepared = formats.find(recipe.data).prepare(recipe, reporter, 1)
    assert reporter.warnings == []
    prompts = [
        {str([turn.ids for turn in part[index][:-1]]) for index in range(len(part))} for part in (prepared.train, prepared.heldout)
    ]
    assert not prompts[0] & prompts[1]
    assert (len(prepared.train) + len(prepared.heldout)) // 2 == 24


def test_pairs_that_do_not_fit_are_skipped_with_their_line(chat_run: Run, tmp_path: Path) -> None:
    path = _write(tmp_path / "long.jsonl", [*_sums(3), {**_PROMPT, "rejected": "no " * 400}])
    recipe, reporter = _recipe(chat_run, path), CollectingReporter()
    prepared = formats.find(recipe.data).prepare(recipe, reporter, 1)
    assert any("skipped 1 preference" in warning and "long.jsonl:4" in warning for warning in reporter.warnings)
    assert formats.find(recipe.data).dataset(recipe, prepared).examples_per_epoch == 3


def test_the_reference_model_must_be_a_chat_model(tiny_run: Run, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the dpo objective requires a reference model \(set model\.init_from"):
        loads(f"data: {{format: preferences, train: {data}}}\ntraining: {{steps: 1}}")
    with pytest.raises(InputError, match=r"fine-tune it on conversations first \(data\.format: chat\)"):
        train(_recipe(tiny_run, data, "model.context_length=32"), tmp_path / "dpo", device="cpu", observer=Observer())


def test_data_show_marks_both_answers(run_cli: RunCli, chat_run: Run, data: Path, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "dpo.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    shown = run_cli("data", "show", tmp_path / "dpo.yaml", "-n", "12", "--set", "training.steps=1")
    assert shown.code == 0
    lines = [line for line in shown.out.splitlines() if "What is 1 + 3?" in line]
    assert lines == [
        "chosen    <|endoftext|><|user|>What is 1 + 3?<|end_of_turn|><|assistant|>[[It is 4.<|end_of_turn|>]]",
        "rejected  <|endoftext|><|user|>What is 1 + 3?<|end_of_turn|><|assistant|>[[No idea, sorry.<|end_of_turn|>]]",
    ]
    document = json.loads(run_cli("data", "show", tmp_path / "dpo.yaml", "-n", "1", "--json").out)
    assert document["examples"][0]["labels"] == ["chosen", "rejected"]


def test_eval_without_a_source_explains_where_the_results_are(run_cli: RunCli, dpo_run: Run, text_file: Path) -> None:
    refused = run_cli("eval", "--run", dpo_run.path)
    assert refused.code == 2
    assert "was trained on preferences, which are only evaluated during training" in refused.err
    assert run_cli("eval", text_file, "--run", dpo_run.path).code == 0


def test_the_command_line_trains_a_model_that_chats_and_exports(run_cli: RunCli, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "dpo.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    trained = run_cli("train", tmp_path / "dpo.yaml", "--out", tmp_path / "run", "--set", "training.steps=2", "--device", "cpu")
    assert trained.code == 0
    assert "the reference model is" in trained.err
    assert "tinylm chat --run" in trained.err
    assert "tinylm eval" not in trained.err
    assert run_cli("chat", "--run", tmp_path / "run", stdin=b"Hello\n").code == 0
    assert run_cli("export", tmp_path / "hf", "--to", "hf", "--run", tmp_path / "run").code == 0
    assert "<|end_of_turn|>" in json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["chat_template"]
