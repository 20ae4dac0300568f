"""Recurrent translation models can be trained, resumed, evaluated and compared like transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training_processes
from command import RunCli
from pairs import REVERSE, reversed_pairs, write_jsonl
from safetensors.torch import load_file

from tinylm.errors import InputError
from tinylm.inspection.overview import inspect_text
from tinylm.interchange.exporting import export
from tinylm.pipeline import train
from tinylm.recipe import Recipe, RecipeError, loads
from tinylm.run import Run
from tinylm.translation.evaluate import TranslationEvaluationOptions, evaluate_translator
from tinylm.translation.translator import Translator

SIZES = "architecture: recurrent_encoder_decoder, n_embd: 16, context_length: 12"
MODELS = {"bahdanau": f"{{{SIZES}, dropout: 0.2}}", "sutskever": f"{{{SIZES}, preset: sutskever, n_layer: 2}}"}


def recipe_of(model: str, pairs: Path, *overrides: str, steps: int = 6) -> Recipe:
    return loads(REVERSE.format(pairs=pairs, preset="modern", steps=steps), [f"model={MODELS[model]}", *overrides])


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", reversed_pairs(200))


@pytest.fixture(scope="module")
def runs(pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("recurrent")
    for name in MODELS:
        train(recipe_of(name, pairs_file), folder / name, device="cpu")
    return {name: Run.open(folder / name) for name in MODELS}


def tensors_of(run: Run) -> dict[str, torch.Tensor]:
    last = run.checkpoint("last").path
    return {name: tensor for file in sorted(last.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_a_model_with_attention_learns_to_reverse_letters(tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", reversed_pairs(400, letters="abc", longest=4))
    data = ("data.overlap=keep", "data.duplicates=keep", "data.heldout.by=tail")
    training = ("training.optimizer={name: muon, lr: 0.05, adamw_lr: 0.02}", "training.global_batch_size=32")
    model = ("model.n_embd=32", "model.dropout=0", "objective.label_smoothing=0")
    rest = ("training.micro_batch_size=32", "evaluation.every=60", "checkpoint.every=60")
    train(recipe_of("bahdanau", pairs, *data, *training, *model, *rest, steps=60), tmp_path / "run", device="cpu")
    run = Run.open(tmp_path / "run")
    result = evaluate_translator(run, options=TranslationEvaluationOptions(baselines=False))
    assert result.exact == 1.0
    [translation] = Translator.open(run, device="cpu").translate(["a b c"], align=True)
    assert translation.alignment is not None
    assert [token.token for token in translation.alignment] == ["c", "b", "a"]


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_is_bitwise_identical_to_an_uninterrupted_run(
    name: str, runs: dict[str, Run], pairs_file: Path, tmp_path: Path
) -> None:
    stopped = train(recipe_of(name, pairs_file), tmp_path / "run", device="cpu", stop_after=0.0)
    assert stopped.step < 6
    train(recipe_of(name, pairs_file), tmp_path / "run", device="cpu", resume=True)
    weights, expected = tensors_of(Run.open(tmp_path / "run")), tensors_of(runs[name])
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights.items())


def test_micro_batches_and_processes_do_not_change_the_gradient(pairs_file: Path, runs: dict[str, Run], tmp_path: Path) -> None:
    train(recipe_of("sutskever", pairs_file, "training.micro_batch_size=16"), tmp_path / "whole", device="cpu")
    training_processes.run(recipe_of("sutskever", pairs_file), tmp_path / "both", world_size=2)
    for folder in ("whole", "both"):
        for name, tensor in (
            Run.open(tmp_path / folder)
            .network(Run.open(tmp_path / folder).checkpoint("last"), torch.device("cpu"))
            .state_dict()
            .items()
        ):
            torch.testing.assert_close(tensor, tensors_of(runs["sutskever"])[name], atol=1e-4, rtol=1e-3)


def test_the_held_out_loss_is_the_mean_over_target_tokens(runs: dict[str, Run]) -> None:
    logged = [line["val_loss"] for line in runs["bahdanau"].metrics() if line["kind"] == "eval"][-1]
    result = evaluate_translator(runs["bahdanau"], checkpoint="last", options=TranslationEvaluationOptions(baselines=False))
    assert result.loss == pytest.approx(logged, rel=1e-5)


def test_the_translate_and_compare_commands_support_the_models(runs: dict[str, Run], run_cli: RunCli) -> None:
    translated = run_cli("translate", "a b c", "--run", runs["bahdanau"].path, "-n", "2", "--attention", "--json")
    assert translated.code == 0, translated.err
    [document] = translated.json
    assert len(document["translations"]) == 2
    assert all(token["source"] for token in document["alignment"])
    refused = run_cli("translate", "a b c", "--run", runs["sutskever"].path, "--attention")
    assert refused.code == 2
    assert "this model has no attention" in refused.err
    compared = run_cli("compare", runs["bahdanau"].path, runs["sutskever"].path, "--json")
    assert compared.code == 0, compared.err


@pytest.mark.parametrize("format", ["hf", "gguf", "onnx"])
def test_exports_and_inspection_reject_the_architecture(format: str, runs: dict[str, Run], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="recurrent_encoder_decoder"):
        export(runs["bahdanau"], format, tmp_path / "model")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="models with the recurrent_encoder_decoder architecture cannot be inspected"):
        inspect_text(runs["bahdanau"], "a b c")


def test_a_shared_embedding_requires_a_shared_vocabulary_and_compilation_is_rejected(pairs_file: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_of("bahdanau", pairs_file, "data.vocabulary=separate", "model.tie_embeddings=all", "training.compile=on")
    assert any("all requires data.vocabulary: shared" in problem for problem in caught.value.problems)
    assert any("architecture does not support this value" in problem for problem in caught.value.problems)
