"""Masked language models can be trained, resumed and evaluated."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import environment
from encoders import masked_recipe
from safetensors.torch import load_file

from tinylm.data.framing import with_control_tokens
from tinylm.data.masking import Masking
from tinylm.errors import InputError
from tinylm.evaluation import masked
from tinylm.evaluation.filling import FilledText, fill
from tinylm.evaluation.perplexity import evaluate as evaluate_perplexity
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.model import registry
from tinylm.pipeline import train
from tinylm.run import Run
from tinylm.text.sources import Piece
from tinylm.tokenizer.control_tokens import ControlTokens
from tinylm.tokenizer.training import train as train_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("masked")
    extra = "objective: {name: masked_lm, rate: [0.3, 0.15]}\nseed: 5\nsampling: {every: 3, prompts: ['The [MASK] is [MASK]']}\n"
    train(masked_recipe(folder, model="preset: bert, dropout: 0.1", extra=extra), folder / "run", device="cpu")
    return Run.open(folder / "run")


def _weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoint("last").path / "model.safetensors")


def _losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.metrics() if line["kind"] == "step"]


def test_a_sample_prompt_that_is_longer_than_the_context_is_refused_before_training(tmp_path: Path) -> None:
    recipe = masked_recipe(tmp_path, extra="sampling: {every: 3, prompts: ['[MASK] is longer than the context']}\n")
    with pytest.raises(InputError, match=r"sampling.prompts: .* has 28 tokens, but only 14 fit into the context"):
        train(recipe, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_resumed_run_is_bitwise_equal(run: Run, tmp_path: Path) -> None:
    train(run.recipe, tmp_path / "other", device="cpu")
    other = Run.open(tmp_path / "other")
    for name in ("best", "last"):
        (other.path / "checkpoints" / name).write_text("step-000003\n")
    shutil.rmtree(other.path / "checkpoints" / "step-000006")
    train(run.recipe, other.path, device="cpu", resume=True)
    assert _losses(other) == _losses(run)
    weights = _weights(run)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in _weights(other).items())


def test_micro_batches_do_not_change_the_loss(run: Run, tmp_path: Path) -> None:
    recipe = run.recipe.model_copy(update={"model": run.recipe.model.model_copy(update={"dropout": 0.0})})
    losses = []
    for size in (2, 8):
        training = recipe.training.model_copy(update={"micro_batch_size": size, "steps": 2})
        train(recipe.model_copy(update={"training": training}), tmp_path / str(size), device="cpu")
        losses.append(_losses(Run.open(tmp_path / str(size))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_two_processes_train_the_same_model_up_to_rounding(run: Run, tmp_path: Path) -> None:
    recipe = run.recipe.model_copy(update={"model": run.recipe.model.model_copy(update={"dropout": 0.0})})
    train(recipe, tmp_path / "one", device="cpu")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml().replace("micro_batch_size: 4", "micro_batch_size: 2"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tinylm"]
    command = [*launcher, "train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "two"), "--device", "cpu"]
    finished = subprocess.run(command, capture_output=True, env=environment(), timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr
    one, two = Run.open(tmp_path / "one"), Run.open(tmp_path / "two")
    assert _losses(two) == pytest.approx(_losses(one), rel=1e-4)
    evaluations = [[line["val_masked_loss"] for line in each.metrics() if line["kind"] == "eval"] for each in (one, two)]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-4)


def test_batched_evaluation_matches_a_loop_over_rows(run: Run) -> None:
    network, tokenizer, shard = run.model(device="cpu"), run.tokenizer, run.heldout()
    scores = masked.evaluate(network, shard, tokenizer)
    control, masking = ControlTokens.of(tokenizer), Masking.of(tokenizer)
    nats, correct, count, row = 0.0, 0, 0, 0
    with torch.no_grad():
        for start, end in shard.documents():
            for begin in range(start, end, 14):
                text = shard.tokens[begin : min(begin + 14, end)].astype(np.int64)
                framed = np.array([[control.cls, *text, control.sep]])
                _, targets = masking.apply(framed, np.array([0.15]), masked.SEED, np.array([row]))
                inputs = np.where(targets >= 0, control.mask, framed)
                logits = network(torch.from_numpy(inputs))[0].double()
                for position in np.flatnonzero(targets[0] >= 0):
                    target = int(targets[0, position])
                    nats -= float(logits[position].log_softmax(-1)[target])
                    correct += int(logits[position].argmax()) == target
                    count += 1
                row += 1
    assert (scores.masked, scores.correct) == (count, correct)
    assert scores.loss == pytest.approx(nats / count, rel=1e-5)
    logged = [line["val_masked_loss"] for line in run.metrics() if line["kind"] == "eval"]
    assert min(logged) == pytest.approx(scores.loss, rel=1e-5)


def test_pseudo_perplexity_masks_each_token_once(run: Run) -> None:
    network, tokenizer, shard = run.model(device="cpu"), run.tokenizer, run.heldout()
    scores = masked.evaluate(network, shard, tokenizer, pseudo=True, max_tokens=30)
    assert scores.masked == scores.tokens == 30
    control = ControlTokens.of(tokenizer)
    nats, left = 0.0, 30
    with torch.no_grad():
        for start, end in shard.documents():
            for begin in range(start, end, 14):
                text = shard.tokens[begin : min(begin + 14, end, begin + left)].astype(np.int64)
                left -= len(text)
                for position, target in enumerate(text):
                    row = [control.cls, *text, control.sep]
                    row[position + 1] = control.mask
                    nats -= float(network(torch.tensor([row]))[0, position + 1].log_softmax(-1)[target])
    perplexity, (low, high) = masked.pseudo_perplexity(scores)
    assert perplexity == pytest.approx(math.exp(nats / 30), rel=1e-5)
    assert math.isnan(low) or low < perplexity < high


def test_fill_returns_the_predicted_probabilities(run: Run) -> None:
    network, tokenizer = run.model(device="cpu"), run.tokenizer
    result = fill(network, tokenizer, "ab[MASK]d[MASK]", top=4)
    control = ControlTokens.of(tokenizer)
    row = [control.cls, *tokenizer.encode("ab"), control.mask, *tokenizer.encode("d"), control.mask, control.sep]
    assert [mask.position for mask in result.masks] == [2, 4]
    with torch.no_grad():
        probabilities = network(torch.tensor([row]))[0].softmax(-1)
    for mask in result.masks:
        expected, ids = probabilities[mask.position + 1].topk(4)
        assert [candidate.id for candidate in mask.candidates] == ids.tolist()
        assert [candidate.probability for candidate in mask.candidates] == pytest.approx(expected.tolist(), rel=1e-4)
    with pytest.raises(InputError, match=r"has no \[MASK\]"):
        fill(network, tokenizer, "nothing to fill")
    with pytest.raises(InputError, match="only 14 fit"):
        fill(network, tokenizer, "a" * 20 + "[MASK]")


@pytest.mark.parametrize("kind", ["byte", "char", "word", "wordpiece", "bpe"])
def test_filling_masks_does_not_change_the_rest_of_the_text(kind: str, tmp_path: Path) -> None:
    size = "" if kind in ("byte", "char") else ", vocab_size: 300"
    recipe = masked_recipe(tmp_path, tokenizer=f"{{kind: {kind}{size}}}")
    tokenizer = train_tokenizer(
        with_control_tokens(recipe.tokenizer, recipe.model), [Piece("the apple is near the pear", True)], print
    )
    network = registry.build(recipe.model, tokenizer.vocab_size, 0).eval()
    result = fill(network, tokenizer, "Zü\n  [MASK], [MASK]\n", top=1)
    first, second = (mask.candidates[0].token.strip() for mask in result.masks)
    assert re.fullmatch(rf"Zü\n ? ?\s?{re.escape(first)}, ?\s?{re.escape(second)}\n", result.filled)


def test_a_filled_text_is_written_on_one_line() -> None:
    assert FilledText("a[MASK]b", "a\r\nb", []).filled_line == "a\\r\\nb"


def test_an_encoder_cannot_generate_text_or_predict_next_tokens(run: Run) -> None:
    network = run.model(device="cpu")
    with pytest.raises(InputError, match="cannot generate text"):
        generate(network, run.tokenizer, "The", SamplingOptions())
    with pytest.raises(InputError, match="does not predict the next token"):
        evaluate_perplexity(network, run.heldout(), run.tokenizer.token_byte_lengths)


def test_samples_during_training_fill_the_masks(run: Run) -> None:
    text = (run.path / "samples.md").read_text()
    assert "The [MASK] is [MASK]" in text
    assert json.loads((run.path / "environment.json").read_text())["processes"] == 1
