"""N-gram models, window networks and recurrent networks: resuming, evaluation, sampling, comparison and two processes."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import training_processes
from command import RunCli
from safetensors.torch import load_file

from tinylm.data.kneser_ney import count_shard, smooth
from tinylm.data.prepare import prepare
from tinylm.errors import InputError
from tinylm.evaluation.evaluate_run import evaluate_run
from tinylm.evaluation.perplexity import EvaluationOptions
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.ngram_model import Ngram
from tinylm.model.stateful import StatefulModel
from tinylm.pipeline import train
from tinylm.recipe import Recipe, loads
from tinylm.reporting import SILENT
from tinylm.run import Run

ROOT = Path(__file__).resolve().parent.parent
MODELS = {
    "rnn": "{architecture: rnn, n_layer: 1, n_embd: 16, context_length: 24, burn_in: 8, tie_embeddings: on}",
    "lstm": "{architecture: lstm, n_layer: 2, n_embd: 16, context_length: 24, burn_in: 8, dropout: 0.2, weight_drop: 0.2}",
    "gru": "{architecture: gru, n_layer: 1, n_embd: 16, context_length: 24, burn_in: 0}",
    "feed_forward": "{architecture: feed_forward, window: 5, n_embd: 8, n_hidden: 16, context_length: 24, dropout: 0.1}",
    "ngram": "{architecture: ngram, order: 4, context_length: 1000}",
}
RECIPE = """\
name: older
seed: 3
data: {{train: {text}, heldout: {{share: 0.1, by: tail}}}}
tokenizer: {{kind: char}}
model: {model}
training: {training}
evaluation: {{every: 3}}
checkpoint: {{every: 1, keep: 9}}
sampling: {{every: 3, prompts: [The], max_new_tokens: 5}}
"""
GRADIENTS = "{steps: 6, global_batch_size: 4, micro_batch_size: 2, precision: fp32, compile: off, log_every: 1}"
COUNTING = "{epochs: 1, global_batch_size: 1, log_every: 1}"


def recipe_of(name: str, text: Path, *overrides: str) -> Recipe:
    training = COUNTING if name == "ngram" else GRADIENTS
    return loads(RECIPE.format(text=text, model=MODELS[name], training=training), overrides)


@pytest.fixture(scope="module")
def runs(short_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Train one run for each architecture."""
    folder = tmp_path_factory.mktemp("older")
    for name in MODELS:
        train(recipe_of(name, short_file), folder / name, device="cpu")
    return {name: Run.open(folder / name) for name in MODELS}


def tensors_of(run: Run) -> dict[str, torch.Tensor]:
    last = run.checkpoint("last").path
    return {name: tensor for file in sorted(last.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def events_of(run: Run) -> list[tuple[Any, ...]]:
    return [tuple(line.get(key) for key in ("kind", "step", "loss", "val_loss", "batch")) for line in run.metrics()]


def assert_same(run: Run, other: Run) -> None:
    one, two = tensors_of(run), tensors_of(other)
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert events_of(run) == events_of(other)
    assert (run.path / "samples.md").read_text() == (other.path / "samples.md").read_text()


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_is_bitwise_identical_to_an_uninterrupted_run(
    name: str, runs: dict[str, Run], short_file: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(name, short_file)
    stopped = train(recipe, tmp_path / "run", device="cpu", stop_after=0.0)
    assert (stopped.step, stopped.stopped) == (1, "time")
    train(recipe, tmp_path / "run", device="cpu", resume=True)
    assert_same(Run.open(tmp_path / "run"), runs[name])
    assert runs[name].checkpoint("last").step > 3


@pytest.mark.parametrize("name", MODELS)
def test_the_evaluation_equals_one_pass_over_each_document(name: str, runs: dict[str, Run]) -> None:
    run = runs[name]
    shard, network = run.heldout(), run.network(run.checkpoint("last"), torch.device("cpu"))
    [(start, end)] = shard.documents()
    assert end - start > 256, "the state must be carried across several windows"
    tokens = torch.from_numpy(shard.tokens[start - 1 : end].astype("int64"))
    with torch.no_grad():
        logprobs = network(tokens[None, :-1])[0].double().log_softmax(-1)
    expected = -float(logprobs.gather(1, tokens[1:, None]).mean())
    evaluated = evaluate_run(run, checkpoint="last", device="cpu").perplexity
    assert evaluated.loss == pytest.approx(expected, rel=1e-5)
    assert (evaluated.context, evaluated.stride) == (None, None)
    logged = [line["val_loss"] for line in run.metrics() if line["kind"] == "eval"]
    assert logged[-1] == pytest.approx(expected, rel=1e-5)


def test_with_a_fixed_context_each_window_starts_with_an_empty_state(runs: dict[str, Run]) -> None:
    run = runs["gru"]
    carried = evaluate_run(run, device="cpu").perplexity
    windows = evaluate_run(run, options=EvaluationOptions(context=4), device="cpu").perplexity
    assert (windows.context, windows.stride) == (4, 4)
    assert windows.tokens == carried.tokens
    assert windows.loss != carried.loss


@pytest.mark.parametrize("name", MODELS)
def test_greedy_samples_match_full_passes_and_exceed_the_context_length(name: str, runs: dict[str, Run]) -> None:
    run = runs[name]
    network = run.network(run.checkpoint("last"), torch.device("cpu"))
    assert isinstance(network, StatefulModel)
    assert network.capacity is None
    [sample] = generate(network, run.tokenizer, "The", SamplingOptions(max_new_tokens=60, temperature=0.0))
    ids = [*run.tokenizer.encode("The"), *sample.token_ids]
    with torch.no_grad():
        best = network(torch.tensor([ids]))[0].argmax(-1).tolist()
    assert best[2 : len(ids) - 1] == sample.token_ids
    without_end = SamplingOptions(max_new_tokens=1200, logit_bias=((int(run.tokenizer.end_of_text or 0), -math.inf),))
    [long] = generate(network, run.tokenizer, "The", without_end)
    assert len(long.token_ids) == 1200


def test_counting_in_steps_produces_the_same_model_as_counting_the_whole_text_at_once(runs: dict[str, Run]) -> None:
    run = runs["ngram"]
    prepared = prepare(run.recipe.data, run.recipe.tokenizer, SILENT)  # type: ignore[arg-type]
    expected = smooth(count_shard(prepared.train, run.tokenizer.vocab_size, 4), prepared.train.end_of_text)
    network = run.network(run.checkpoint("last"), torch.device("cpu"))
    assert isinstance(network, Ngram)
    for array, other in zip(
        (*network.tables.keys, *network.tables.probabilities), (*expected.keys, *expected.probabilities), strict=True
    ):
        assert (array == other).all()
    assert run.checkpoint("last").step == math.ceil(len(prepared.train) / 1000)
    losses = [line["loss"] for line in run.metrics() if line["kind"] == "step"]
    assert all(0 < loss < math.log(run.tokenizer.vocab_size) for loss in losses)


def test_an_n_gram_run_counts_the_text_only_once(short_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="but the recipe sets 99"):
        train(recipe_of("ngram", short_file, "training={steps: 99, global_batch_size: 1}"), tmp_path / "run", device="cpu")
    minutes = recipe_of("ngram", short_file, "training={minutes: 60, global_batch_size: 1}")
    assert train(minutes, tmp_path / "run", device="cpu", overwrite=True).stopped == "done"


@pytest.mark.parametrize("damage", ["keys", "sizes", "probabilities"])
def test_damaged_n_gram_tables_are_rejected(damage: str, runs: dict[str, Run]) -> None:
    run = runs["ngram"]
    network = run.network(run.checkpoint("last"), torch.device("cpu"))
    weights = {name: tensor.clone() for name, tensor in network.stored_weights().items()}
    weights[damage][1] = 10**9
    with pytest.raises(RuntimeError, match=r"prefix|sorted|values|between 0 and 1"):
        network.load_stored_weights(weights)


def test_a_text_of_four_lines_can_be_trained_on_and_sampled(tmp_path: Path) -> None:
    text = tmp_path / "fish.txt"
    text.write_text("one fish\ntwo fish\nred fish\nblue fish\n")
    run = tmp_path / "run"
    result = train(recipe_of("ngram", text, "data.heldout.share=0.3"), run, device="cpu")
    assert math.isfinite(result.metrics["loss"] or math.nan)
    opened = Run.open(run)
    network = opened.network(opened.checkpoint(), torch.device("cpu"))
    [sample] = generate(network, opened.tokenizer, "one ", SamplingOptions(max_new_tokens=4, temperature=0.0))
    assert sample.text == "fish"


@pytest.mark.parametrize("name", ["lstm", "ngram"])
def test_two_processes_train_the_same_model_up_to_rounding(
    name: str, runs: dict[str, Run], short_file: Path, tmp_path: Path
) -> None:
    overrides = ["model.dropout=0", "model.weight_drop=0"] if name == "lstm" else []
    recipe = recipe_of(name, short_file, *overrides)
    training_processes.run(recipe, tmp_path / "both", world_size=2)
    if overrides:
        train(recipe, tmp_path / "one", device="cpu")
    one = Run.open(tmp_path / "one") if overrides else runs[name]
    for key, tensor in tensors_of(one).items():
        if not key.startswith(("adamw/", "muon/")):
            torch.testing.assert_close(tensors_of(Run.open(tmp_path / "both"))[key], tensor, atol=1e-4, rtol=1e-3)


def test_the_eval_sample_and_compare_commands_support_the_architectures(runs: dict[str, Run], run_cli: RunCli) -> None:
    evaluated = run_cli("eval", "--run", runs["ngram"].path, "--json")
    assert evaluated.code == 0, evaluated.err
    assert evaluated.json["context"] is None
    assert evaluated.json["bits_per_byte"] > 0
    compared = run_cli("compare", runs["ngram"].path, runs["gru"].path, "--on", ROOT / "LICENSE", "--json")
    assert compared.code == 0, compared.err
    assert compared.json
    text = run_cli("eval", "--run", runs["lstm"].path)
    assert "the state is carried" in text.out, text


def test_weights_that_do_not_match_the_recipe_are_rejected(runs: dict[str, Run], tmp_path: Path) -> None:
    shutil.copytree(runs["lstm"].path, tmp_path / "copy")
    recipe = tmp_path / "copy" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("n_layer: 2", "n_layer: 3"))
    copy = Run.open(tmp_path / "copy")
    with pytest.raises(InputError, match="2 layers instead of 3"):
        copy.network(copy.checkpoint(), torch.device("cpu"))
