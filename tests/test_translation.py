"""Translation models can be trained, resumed, evaluated, compared, exported and imported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training_processes
from pairs import REVERSE, reversed_pairs, write_jsonl
from safetensors.torch import load_file

from tinylm.errors import InputError
from tinylm.interchange.exporting import export
from tinylm.interchange.importing import import_model
from tinylm.pipeline import train
from tinylm.recipe import Recipe, loads
from tinylm.reporting import CollectingReporter
from tinylm.run import Run
from tinylm.translation.evaluate import TranslationEvaluationOptions, compare_translators, evaluate_translator
from tinylm.translation.translator import Translator


def _recipe(pairs: Path, *overrides: str, preset: str = "modern", steps: int = 12) -> Recipe:
    return loads(REVERSE.format(pairs=pairs, preset=preset, steps=steps), overrides)


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", reversed_pairs(800))


@pytest.fixture(scope="module")
def run(pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "reverse"
    train(_recipe(pairs_file), folder, device="cpu")
    return Run.open(folder)


@pytest.fixture(scope="module")
def marian_run(pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "marian"
    train(_recipe(pairs_file, preset="transformer", steps=6), folder, device="cpu")
    return Run.open(folder)


def _weights(run: Run) -> dict[str, torch.Tensor]:
    last = run.checkpoint("last").path
    return {name: tensor for file in sorted(last.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_reversal_is_learned_exactly(tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", reversed_pairs(400, letters="abcd", longest=4))
    data = ("data.overlap=keep", "data.duplicates=keep", "data.heldout.by=tail")
    training = ("training.optimizer=muon", "training.global_batch_size=32", "training.micro_batch_size=32", "model.n_layer=2")
    rest = ("objective.label_smoothing=0", "evaluation.every=150", "checkpoint.every=150")
    train(_recipe(pairs, *data, *training, *rest, steps=150), tmp_path / "run", device="cpu")
    result = evaluate_translator(Run.open(tmp_path / "run"), options=TranslationEvaluationOptions(hardest=2))
    assert result.exact == 1.0
    assert result.scores.chrf == 100.0
    assert result.scores.bleu > result.baselines["copy"].bleu
    assert len(result.hardest) == 2


def test_resuming_an_interrupted_run_produces_bit_identical_weights(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    train(run.recipe, folder, device="cpu", stop_after=0.0)
    assert Run.open(folder).checkpoint("last").step < 12
    train(run.recipe, folder, device="cpu", resume=True)
    weights, expected = _weights(Run.open(folder)), _weights(run)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def test_micro_batches_do_not_change_the_gradient(pairs_file: Path, run: Run, tmp_path: Path) -> None:
    train(_recipe(pairs_file, "training.micro_batch_size=16"), tmp_path / "whole", device="cpu")
    for name, tensor in _weights(Run.open(tmp_path / "whole")).items():
        torch.testing.assert_close(tensor, _weights(run)[name], atol=2e-4, rtol=1e-3)


def test_batches_by_tokens_train_the_same_model_in_micro_batches(pairs_file: Path, tmp_path: Path) -> None:
    by_tokens = ("data.batch_tokens=120", "training.global_batch_size=32")
    for size in (4, 32):
        train(_recipe(pairs_file, *by_tokens, f"training.micro_batch_size={size}", steps=3), tmp_path / str(size), device="cpu")
    expected = _weights(Run.open(tmp_path / "32"))
    for name, tensor in _weights(Run.open(tmp_path / "4")).items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-4, rtol=1e-3)


def test_two_processes_with_accumulation_train_the_same_model(pairs_file: Path, run: Run, tmp_path: Path) -> None:
    training_processes.run(_recipe(pairs_file, "training.micro_batch_size=4"), tmp_path / "both", world_size=2)
    for name, tensor in _weights(Run.open(tmp_path / "both")).items():
        torch.testing.assert_close(tensor, _weights(run)[name], atol=2e-4, rtol=1e-3)


def test_the_best_checkpoint_can_be_chosen_by_bleu(pairs_file: Path, tmp_path: Path) -> None:
    result = train(_recipe(pairs_file, "objective.select=bleu", steps=10), tmp_path / "bleu", device="cpu")
    assert list(result.metrics) == ["bleu", "loss"]
    assert result.best_value == result.metrics["bleu"]


def test_the_held_out_loss_is_the_mean_over_target_tokens(run: Run) -> None:
    logged = [line["val_loss"] for line in run.metrics() if line["kind"] == "eval"][-1]
    result = evaluate_translator(run, checkpoint="last", options=TranslationEvaluationOptions(baselines=False))
    assert result.loss == pytest.approx(logged, rel=1e-5)


def test_a_language_model_cannot_translate(tiny_run: Run) -> None:
    with pytest.raises(InputError, match="trained with the causal_lm objective, so it cannot translate"):
        Translator.open(tiny_run)


def test_averaging_checkpoints_returns_their_mean_weights(run: Run) -> None:
    mean = Translator.open(run, device="cpu", average=2).network
    last = run.checkpoints()[-2:]
    weights = [load_file(checkpoint.path / "model.safetensors") for checkpoint in last]
    for name, tensor in mean.stored_weights().items():
        torch.testing.assert_close(tensor, (weights[0][name] + weights[1][name]) / 2)


def test_one_model_translates_into_several_languages(tmp_path: Path) -> None:
    pairs = [{**pair, "lang": ("de", "fr")[i % 2]} for i, pair in enumerate(reversed_pairs(200))]
    file = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    train(_recipe(file, "data.language=lang", steps=3), tmp_path / "run", device="cpu")
    translator = Translator.open(Run.open(tmp_path / "run"), device="cpu")
    assert translator.framing.languages == ["de", "fr"]
    assert translator.translate(["a b c"], language="fr")[0].translations
    with pytest.raises(InputError, match="--to: the model translates into several languages"):
        translator.translate(["a b c"])


def test_source_and_target_can_have_separate_vocabularies(tmp_path: Path) -> None:
    pairs = [{"source": pair["source"].upper(), "target": pair["target"]} for pair in reversed_pairs(200)]
    file = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    recipe = _recipe(file, "data.vocabulary=separate", steps=4)
    train(recipe, tmp_path / "run", device="cpu", stop_after=0.0)
    train(recipe, tmp_path / "run", device="cpu", resume=True)
    run = Run.open(tmp_path / "run")
    translator = Translator.open(run, device="cpu")
    assert translator.framing.source_tokenizer.encode("A B") != translator.framing.target_tokenizer.encode("A B")
    assert translator.translate(["A B C"])[0].note is None
    assert evaluate_translator(run, options=TranslationEvaluationOptions(max_pairs=5)).pairs == 5


def test_the_size_of_the_source_vocabulary_cannot_be_set_to_another_number(pairs_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"objective\.source_vocab_size: must be \d+, .* not 500 \(remove it: training sets it\)"):
        train(_recipe(pairs_file, "objective.source_vocab_size=500"), tmp_path / "run", device="cpu")


def test_an_export_for_transformers_can_be_imported_again(marian_run: Run, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    result = export(marian_run, "hf", tmp_path / "hf")
    assert result.architecture == "MarianMTModel"
    assert result.largest_difference < 1e-4
    imported = import_model(tmp_path / "hf", tmp_path / "imported")
    assert imported.largest_difference is not None
    sentences = ["a b c", "f e d c b"]
    found = [Translator.open(each, device="cpu").translate(sentences) for each in (Run.open(tmp_path / "imported"), marian_run)]
    assert found[0] == found[1]


def test_an_export_rejects_parts_that_marian_does_not_have(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"MarianMTModel does not support model\..*norm rmsnorm"):
        export(run, "hf", tmp_path / "hf")


def test_two_translators_are_compared_on_the_same_sentences(run: Run, marian_run: Run) -> None:
    paired = compare_translators(run, marian_run)
    assert paired.difference == pytest.approx(paired.a_bleu - paired.b_bleu)
    assert paired.ci95[0] <= paired.difference <= paired.ci95[1]


def test_overlap_and_duplicates_are_counted(tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", reversed_pairs(300, letters="ab", longest=4))
    recipe = _recipe(pairs, "data.heldout.by=tail", "data.heldout.share=0.3", steps=1)
    reporter = CollectingReporter()
    with pytest.raises(InputError, match="all held-out sentences also occur in the training pairs"):
        train(recipe, tmp_path / "run", device="cpu", reporter=reporter)
    assert any("duplicate training pairs were dropped" in note for note in reporter.notes)
