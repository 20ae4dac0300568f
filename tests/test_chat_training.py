"""Fine-tuning on conversations: the prompt mask, packing, the loss, exact resumption, two processes, and mixed-in plain text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import training_processes
from conversations import additions, chat_recipe, exchange, losses, write_conversations
from safetensors.torch import load_file

from tinylm.data import formats
from tinylm.data.chat import PreparedChat, fit, pack
from tinylm.data.mixture import Mixture
from tinylm.data.shards import open_shard
from tinylm.errors import InputError
from tinylm.evaluation import answers
from tinylm.evaluation.evaluate_run import evaluate_run
from tinylm.model.init_from import load_pretrained
from tinylm.pipeline import train
from tinylm.recipe import Recipe, loads
from tinylm.reporting import SILENT, CollectingReporter
from tinylm.run import Run
from tinylm.text.conversations import ASSISTANT, Message
from tinylm.tokenizer.vocab_editing import extension
from tinylm.training.feed import Feed, LocalBatch
from tinylm.training.objectives import CausalLM

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("chat") / "sums.jsonl", additions(12))


@pytest.fixture(scope="module")
def recipe(tiny_run: Run, data: Path) -> Recipe:
    # On CPUs with bfloat16 units, Muon would amplify the differences between micro-batches.
    return chat_recipe(tiny_run, data, "model.context_length=64", "training.optimizer.newton_schulz_dtype=fp32")


@pytest.fixture(scope="module")
def prepared(recipe: Recipe) -> PreparedChat:
    prepared = formats.find(recipe.data).prepare(recipe, SILENT, 1)
    assert isinstance(prepared, PreparedChat)
    return prepared


@pytest.fixture(scope="module")
def chat_run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "chat"
    train(recipe, folder, device="cpu")
    return Run.open(folder)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoint("last").path / "model.safetensors")


def reference_sum(network: torch.nn.Module, prepared: PreparedChat, index: int) -> tuple[float, int]:
    """Return the summed loss in nats and the number of target tokens for one conversation, computed token by token."""
    encoder, ids, learned = prepared.encoder, [prepared.encoder.start], [False]
    for turn in prepared.train[index]:
        ids += turn.ids
        learned += [turn.role == ASSISTANT and position > 0 for position in range(len(turn.ids))]
    logprobs = network(torch.tensor([ids]))[0].double().log_softmax(-1)
    assert ids[-1] == encoder.end_of_turn
    scored = [position for position in range(1, len(ids)) if learned[position]]
    return -sum(float(logprobs[position - 1, ids[position]]) for position in scored), len(scored)


def test_a_sample_prompt_that_is_longer_than_the_context_is_refused_before_training(recipe: Recipe, tmp_path: Path) -> None:
    sampling = recipe.sampling.model_copy(update={"every": 3, "prompts": ("word " * 100,)})
    with pytest.raises(InputError, match=r"sampling.prompts: 'word .* tokens, but the model's context has only 64"):
        train(recipe.model_copy(update={"sampling": sampling}), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_only_the_answers_and_their_end_of_turn_tokens_are_targets(prepared: PreparedChat) -> None:
    encoder, tokenizer = prepared.encoder, prepared.tokenizer
    turns = prepared.train[0]
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    fitted = fit(turns, encoder.start, 64)
    assert fitted is not None
    targets = fitted.targets(mask_prompt=True)
    learned = targets[targets >= 0].tolist()
    expected = [*tokenizer.encode("It is 3."), encoder.end_of_turn, *tokenizer.encode("6"), encoder.end_of_turn]
    assert learned == expected
    assert fitted.targets(mask_prompt=False).tolist() == fitted.ids[1:].tolist()


def test_packing_uses_every_conversation_once_per_epoch_without_changing_its_targets(
    recipe: Recipe, prepared: PreparedChat
) -> None:
    plain = recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": False})})
    datasets = [formats.find(variant.data).dataset(variant, prepared) for variant in (recipe, plain)]
    assert datasets[0].examples_per_epoch < datasets[1].examples_per_epoch == 12
    seen = []
    for dataset in datasets:
        examples = dataset.examples(0, dataset.examples_per_epoch)
        pairs = []
        for tokens, targets, segments in zip(
            examples["tokens"][:, :-1], examples["targets"], examples["segments"][:, :-1], strict=True
        ):
            for segment in range(segments.max() + 1):
                inside = segments == segment
                pairs.append((tokens[inside].tolist(), targets[inside].tolist()))
            assert (targets[segments < 0] < 0).all()
        seen.append(sorted(pairs))
    assert seen[0] == seen[1]
    assert len(seen[0]) == 12


def test_items_are_packed_into_few_bins() -> None:
    sizes = dict(enumerate([7, 5, 5, 3, 3, 2, 10]))
    bins = pack(sizes, 10)
    assert sorted(item for items in bins for item in items) == list(sizes)
    assert all(sum(sizes[item] for item in items) <= 10 for items in bins)
    assert len(bins) == 4


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("micro", [1, 4])
def test_the_mean_loss_covers_exactly_the_target_tokens(
    tiny_run: Run, recipe: Recipe, prepared: PreparedChat, packing: bool, micro: int
) -> None:
    """Check every combination of packing and gradient accumulation."""
    from tinylm.model import registry
    from tinylm.training.precision import Precision
    from tinylm.training.step import GradientSettings, accumulate

    changed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": packing})})
    network = registry.build(recipe.model, prepared.tokenizer.vocab_size, 3).eval()
    dataset = formats.find(changed.data).dataset(changed, prepared)
    objective = CausalLM()
    batch = LocalBatch.whole(objective.batch(dataset.examples(0, dataset.examples_per_epoch), 1, 0))
    loss = accumulate(network, batch, GradientSettings(micro, Precision("fp32", CPU), objective))
    with torch.no_grad():
        sums = [reference_sum(network, prepared, index) for index in range(12)]
        scores = answers.evaluate(network, prepared.train, prepared.tokenizer.token_byte_lengths)
    nats, count = sum(nats for nats, _ in sums), sum(count for _, count in sums)
    assert batch.global_target_count == count
    assert float(loss) == pytest.approx(nats / count, rel=1e-5)
    assert (scores.tokens, scores.loss) == (count, pytest.approx(nats / count, rel=1e-5))
    assert scores.bytes == sum(len(m.content) for messages in additions(12) for m in messages if m.role == ASSISTANT)


def test_the_parts_of_a_batch_on_all_ranks_add_up_to_the_whole_batch(recipe: Recipe, prepared: PreparedChat) -> None:
    dataset = formats.find(recipe.data).dataset(recipe, prepared)
    with Feed(dataset, CausalLM(), seed=1) as feed:
        whole = feed.batch(0, 4)
    shares = []
    for rank in range(2):
        with Feed(dataset, CausalLM(), seed=1, rank=rank, world_size=2) as feed:
            shares.append(feed.batch(0, 4))
    assert torch.equal(torch.cat([share.share.targets for share in shares]), whole.share.targets)
    assert {share.global_target_count for share in shares} == {whole.global_target_count}


def test_a_control_token_starts_with_the_mean_embedding_of_the_tokens_in_its_name(
    tiny_run: Run, recipe: Recipe, prepared: PreparedChat
) -> None:
    from tinylm.model import registry

    before, tokenizer = tiny_run.tokenizer, prepared.tokenizer
    assert tokenizer.vocab_size == before.vocab_size + 4
    edited = extension(before, tokenizer)
    assert edited is not None
    assert extension(tokenizer, before) is None
    source = tiny_run.network(tiny_run.checkpoint(), CPU)
    network = registry.build(recipe.model, tokenizer.vocab_size, 0)
    assert load_pretrained(network, source, same_tokenizer=False, sources=edited.sources) == []
    for ours, theirs in ((network.embedding.weight, source.embedding.weight), (network.head.weight, source.head.weight)):
        assert torch.equal(ours[: before.vocab_size], theirs)
        user = tokenizer.backend.token_to_id("<|user|>")
        torch.testing.assert_close(ours[user], theirs[before.encode("<|user|>")].mean(0))


def test_a_resumed_run_is_bitwise_identical_and_keeps_its_template(chat_run: Run, recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "resumed", device="cpu", stop_after=0.0)
    stopped = Run.open(tmp_path / "resumed")
    assert stopped.checkpoint("last").step < 8
    train(recipe, stopped.path, device="cpu", resume=True)
    resumed = Run.open(stopped.path)
    assert losses(resumed) == losses(chat_run)
    assert all(torch.equal(tensor, weights(chat_run)[name]) for name, tensor in weights(resumed).items())
    assert (resumed.path / "chat_template.json").read_text() == (chat_run.path / "chat_template.json").read_text()
    assert json.loads((resumed.path / "chat_template.json").read_text())["end_of_turn"] == "<|end_of_turn|>"


def test_two_processes_with_accumulation_train_the_same_model(chat_run: Run, recipe: Recipe, tmp_path: Path) -> None:
    both = recipe.model_copy(update={"training": recipe.training.model_copy(update={"micro_batch_size": 1})})
    training_processes.run(both, tmp_path / "both", world_size=2)
    run = Run.open(tmp_path / "both")
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, weights(chat_run)[name], atol=2e-4, rtol=1e-3)
    logged = [line["val_loss"] for line in run.metrics() if line["kind"] == "eval"]
    assert logged == pytest.approx([line["val_loss"] for line in chat_run.metrics() if line["kind"] == "eval"], rel=1e-4)


def test_long_conversations_lose_their_oldest_exchanges_first(prepared: PreparedChat) -> None:
    encoder = prepared.encoder
    messages = [Message("system", "Be brief."), *exchange("a " * 30, "one"), *exchange("b " * 12, "two")]
    turns = encoder.turns(messages)
    last = sum(len(turn.ids) for turn in (turns[0], *turns[3:]))
    fitted = fit(turns, encoder.start, last)
    assert fitted is not None
    assert fitted.cut
    assert fitted.ids.tolist() == [encoder.start, *turns[0].ids, *turns[3].ids, *turns[4].ids]
    shorter = fit(turns, encoder.start, last - 5)
    assert shorter is not None
    assert shorter.ids.tolist() == [encoder.start, *turns[0].ids, turns[3].ids[0], *turns[3].ids[6:], *turns[4].ids]
    without_system = fit(turns, encoder.start, len(turns[4].ids) + 5)
    assert without_system is not None
    assert without_system.ids.tolist() == [encoder.start, turns[3].ids[0], *turns[3].ids[-4:], *turns[4].ids]
    assert fit(turns, encoder.start, len(turns[4].ids) + 1) is None


def test_a_huge_message_is_truncated_a_huge_answer_is_skipped_and_both_lines_are_reported(tiny_run: Run, tmp_path: Path) -> None:
    conversations = [*additions(3), exchange("x" * 100_000, "yes"), exchange("no", "y" * 100_000)]
    data = write_conversations(tmp_path / "long.jsonl", conversations)
    reporter = CollectingReporter()
    recipe = chat_recipe(tiny_run, data, "model.context_length=64")
    prepared_data = formats.find(recipe.data).prepare(recipe, reporter, 1)
    dataset = formats.find(recipe.data).dataset(recipe, prepared_data)
    assert any("1 conversation longer than the context" in note and "long.jsonl:4" in note for note in reporter.notes)
    assert any("skipped 1 conversation" in warning and "long.jsonl:5" in warning for warning in reporter.warnings)
    examples = dataset.examples(0, dataset.examples_per_epoch)
    assert ((examples["targets"] >= 0).any(axis=1)).all()
    only_long = write_conversations(tmp_path / "only.jsonl", [exchange("no", "y" * 100_000)])
    with pytest.raises(InputError, match="no conversation has an answer that fits into context_length 64"):
        formats.find(recipe.data).prepare(chat_recipe(tiny_run, only_long, "model.context_length=64"), SILENT, 1)


def test_the_requested_fraction_of_sequences_is_plain_text_with_a_loss_on_every_token(
    tiny_run: Run, data: Path, text_file: Path
) -> None:
    recipe = chat_recipe(tiny_run, data, "model.context_length=64", f"data.mix={{{text_file}: 0.25}}")
    prepared_data = formats.find(recipe.data).prepare(recipe, SILENT, 1)
    dataset = formats.find(recipe.data).dataset(recipe, prepared_data)
    assert isinstance(dataset, Mixture)
    examples = dataset.examples(3, 40)
    is_text = (examples["segments"] == 0).all(axis=1) & (examples["targets"] >= 0).all(axis=1)
    assert is_text.sum() == 10
    assert (examples["targets"][is_text] == examples["tokens"][is_text][:, 1:]).all()
    one_by_one = [dataset.examples(position, 1) for position in range(3, 43)]
    for name, values in examples.items():
        assert np.array_equal(np.concatenate([example[name] for example in one_by_one]), values)
    heldout = open_shard(tiny_run.path / "heldout", "heldout")
    assert prepared_data.mix.heldout.tokens.tolist() == heldout.tokens.tolist(), (
        "the run's held-out text must not be used for training"
    )


def test_a_chat_run_can_still_be_evaluated_on_text_and_records_its_training_texts(
    chat_run: Run, tiny_run: Run, data: Path, text_file: Path
) -> None:
    result = evaluate_run(chat_run, [str(text_file)], device="cpu")
    assert result.perplexity.bits_per_byte > 0
    assert [(text.run, text.sources) for text in chat_run.training_texts()] == [
        (None, (str(data),)),
        (tiny_run.name, (str(text_file),)),
    ]
    own, inherited = result.overlaps
    assert own.share == 0
    assert inherited.share > 0.5


def test_lora_trains_the_embedding_rows_of_the_control_tokens_and_keeps_all_other_rows(
    tiny_run: Run, data: Path, tmp_path: Path
) -> None:
    lora = ("training.lora={rank: 4}", "training.optimizer={name: adamw, lr: 0.01, weight_decay: 0.1}", "training.steps=4")
    recipe = chat_recipe(tiny_run, data, *lora, "model.context_length=64")
    train(recipe, tmp_path / "lora", device="cpu")
    before, tuned = load_file(tiny_run.checkpoint().path / "model.safetensors"), Run.open(tmp_path / "lora")
    encoder = tuned.require_chat()
    for name in ("embedding.weight", "head.weight"):
        after, count = weights(tuned)[name], len(before[name])
        assert torch.equal(after[:count], before[name])
        mean = before[name][tiny_run.tokenizer.encode("<|end_of_turn|>")].mean(0)
        assert not torch.allclose(after[encoder.end_of_turn], mean)
    train(recipe, tmp_path / "stopped", device="cpu", stop_after=0.0)
    train(recipe, tmp_path / "stopped", device="cpu", resume=True)
    resumed = weights(Run.open(tmp_path / "stopped"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights(tuned).items())


def test_other_architectures_and_keys_that_have_no_effect_are_rejected(data: Path, tiny_run: Run) -> None:
    with pytest.raises(InputError, match="the chat format requires the decoder architecture, not lstm"):
        loads(f"data: {{format: chat, train: {data}}}\nmodel: {{architecture: lstm}}\ntraining: {{steps: 1}}")
    with pytest.raises(InputError, match=r"data\.prompt: has no effect with layout: messages"):
        chat_recipe(tiny_run, data, "data.prompt=question")
