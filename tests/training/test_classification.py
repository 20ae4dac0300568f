"""Classifiers can be trained, resumed and evaluated, from scratch or from another run."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import SHAPE, classifier_recipe, masked_recipe
from safetensors.torch import load_file

from tinylm.data import formats
from tinylm.data.framing import Framing
from tinylm.data.labels import read_parts
from tinylm.ensemble import Ensemble, Member
from tinylm.errors import InputError, TinylmWarning
from tinylm.evaluation import classification, confusion_plot
from tinylm.evaluation.classify_texts import TextClassifier
from tinylm.evaluation.evaluate_classifier import _same_texts, evaluate_classifier
from tinylm.evaluation.label_baselines import tfidf_linear_scores
from tinylm.model import lora, registry
from tinylm.model.classifier import SequenceClassifier, pool
from tinylm.model.init_from import load_pretrained
from tinylm.pipeline import train
from tinylm.recipe import RecipeError, load, loads
from tinylm.recipe.labels import ClassificationObjective, LabelsSection
from tinylm.recipe.schema import LoraSection, ModelVariant, Recipe
from tinylm.reporting import SILENT
from tinylm.run import Run
from tinylm.text.labeled import LabeledText
from tinylm.training import objectives
from tinylm.training.classification import Classification, class_weights, without_padding

MODELS = {
    "encoder": f"architecture: encoder, {SHAPE}",
    "decoder": f"architecture: decoder, {SHAPE}",
    "rnn": "architecture: rnn, n_layer: 2, n_embd: 16, context_length: 16, burn_in: 4",
    "lstm": "architecture: lstm, n_layer: 1, n_embd: 16, context_length: 16, burn_in: 4",
    "gru": "architecture: gru, n_layer: 2, n_embd: 16, context_length: 16, burn_in: 4",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classifiers")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    recipe = classifier_recipe(folder, extra="objective: {class_weights: balanced}\nsampling: {every: 3, prompts: [the saw]}\n")
    train(recipe, folder / "run", device="cpu")
    return Run.open(folder / "run")


def _losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.metrics() if line["kind"] == "step"]


def _weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoint("last").path / "model.safetensors")


def _classifier(model: str, **objective: object) -> SequenceClassifier:
    section: ModelVariant = loads(f"data: {{train: x}}\nmodel: {{{model}}}\ntraining: {{steps: 1}}", check_files=False).model
    network = registry.build(section, 60, 0, objective=ClassificationObjective(labels=("a", "b", "c"), **objective))  # type: ignore[arg-type]
    assert isinstance(network, SequenceClassifier)
    return network.eval()


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("how", ["cls", "mean", "last"])
def test_padding_does_not_change_the_logits(model: str, how: str) -> None:
    network = _classifier(model, pool=how, pooler="relu")
    tokens = torch.randint(60, (3, 10), generator=torch.Generator().manual_seed(0))
    segments = torch.zeros_like(tokens)
    segments[1, 4:] = -1
    together = network(tokens, segments=segments)
    torch.testing.assert_close(together[1:2], network(tokens[1:2, :4]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(network.train()(tokens, segments=segments), together, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "layer"), [("rnn", torch.nn.RNN), ("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU)])
def test_a_recurrent_classifier_computes_the_same_logits_and_gradients_as_torch(kind: str, layer: type[torch.nn.RNNBase]) -> None:
    network = _classifier(MODELS[kind], pool="last", pooler="none").double()
    names = dict(network.named_parameters())
    layers = sum(name.endswith(".weight_hh") for name in names)
    theirs = layer(16, 16, layers, batch_first=True).double()
    stored = {name: name.rpartition("_l") for name, _ in theirs.named_parameters()}
    theirs.load_state_dict({name: names[f"body.layers.{i}.{weight}"].detach() for name, (weight, _, i) in stored.items()})
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(60, (length,), generator=generator) for length in (9, 3, 1)]
    embedding, weight, bias = (names[name].detach() for name in ("body.embedding.weight", "output.weight", "output.bias"))
    expected = torch.stack([theirs(embedding[text][None])[0][0, -1] @ weight.T + bias for text in texts])
    tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=7)
    segments = torch.nn.utils.rnn.pad_sequence([torch.zeros_like(text) for text in texts], batch_first=True, padding_value=-1)
    logits = network(tokens, segments=segments)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in theirs.named_parameters():
        own, _, i = stored[name]
        torch.testing.assert_close(names[f"body.layers.{i}.{own}"].grad, parameter.grad, rtol=1e-9, atol=1e-12)


def test_pooling_selects_the_first_or_last_token_or_averages_the_text() -> None:
    hidden = torch.arange(12.0).view(2, 3, 2)
    segments = torch.tensor([[0, 0, 0], [0, 0, -1]])
    assert pool(hidden, segments, "cls").tolist() == [[0, 1], [6, 7]]
    assert pool(hidden, segments, "last").tolist() == [[4, 5], [8, 9]]
    assert pool(hidden, segments, "mean").tolist() == [[2, 3], [7, 8]]


def test_the_loss_applies_class_weights_and_label_smoothing() -> None:
    section = ClassificationObjective(labels=("a", "b", "c"), label_counts=(6, 3, 1), class_weights="balanced", label_smoothing=0.1)
    weights = class_weights(section)
    assert weights is not None
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    objective, network = Classification(section), _classifier(MODELS["encoder"])
    examples = {"tokens": np.array([[1, 2, 3, -1], [4, 5, 6, 7]]), "labels": np.array([[2], [0]])}
    batch = objective.batch(examples, 0, 0)
    assert (batch.target_count, batch.token_count) == (2, 7)
    logits = torch.cat([network(torch.tensor([[1, 2, 3]])), network(torch.tensor([[4, 5, 6, 7]]))])
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([2, 0]), weights, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(objective.loss_sum(network, batch), expected)
    by_label = ClassificationObjective(labels=("a", "b"), class_weights={"b": 2.0})
    assert torch.equal(class_weights(by_label), torch.tensor([1.0, 2.0]))  # type: ignore[arg-type]
    narrow = without_padding(replace(batch, segments=torch.tensor([[0, 0, -1, -1], [0, -1, -1, -1]])))
    assert narrow.inputs.shape == (2, 2)


def test_the_run_stores_labels_and_counts(run: Run) -> None:
    objective = run.recipe.objective
    assert isinstance(objective, ClassificationObjective)
    assert objective.labels == ("color", "fruit", "tool")
    assert sum(objective.label_counts) == 48
    assert load(run.path / "recipe.yaml", check_files=False) == run.recipe
    assert "the saw -> " in (run.path / "samples.md").read_text()


def test_resuming_produces_bit_identical_losses_and_weights(folder: Path, run: Run, tmp_path: Path) -> None:
    recipe = classifier_recipe(folder, extra="objective: {class_weights: balanced}\nsampling: {every: 3, prompts: [the saw]}\n")
    train(recipe, tmp_path / "other", device="cpu")
    other = Run.open(tmp_path / "other")
    for name in ("best", "last"):
        (other.path / "checkpoints" / name).write_text("step-000003\n")
    shutil.rmtree(other.path / "checkpoints" / "step-000006")
    train(recipe, other.path, device="cpu", resume=True)  # This recipe does not contain the labels that the first run filled in.
    assert _losses(other) == _losses(run)
    weights = _weights(run)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in _weights(other).items())


@pytest.mark.parametrize("architecture", ["decoder", "rnn", "lstm", "gru"])
def test_decoders_and_recurrent_networks_can_be_trained_as_classifiers(folder: Path, architecture: str, tmp_path: Path) -> None:
    recipe = classifier_recipe(folder, model=MODELS[architecture])
    result = train(recipe, tmp_path / architecture, device="cpu")
    assert result.metrics["accuracy"] is not None
    network = Run.open(tmp_path / architecture).model(device="cpu")
    assert isinstance(network, SequenceClassifier)
    assert network.pool == "last"


def test_a_classifier_can_be_initialized_from_a_masked_model_or_another_classifier(folder: Path, run: Run, tmp_path: Path) -> None:
    train(masked_recipe(tmp_path), tmp_path / "masked", device="cpu")
    for source in (Run.open(tmp_path / "masked"), run):
        recipe = classifier_recipe(folder, model=f"init_from: {source.path}, architecture: encoder")
        network = registry.build(recipe.model, run.tokenizer.vocab_size, 9, objective=run.recipe.objective)
        new = load_pretrained(network, source.model(device="cpu"), same_tokenizer=True)
        weights = source.model(device="cpu").state_dict()
        for name, tensor in network.state_dict().items():
            if name not in new:
                assert torch.equal(tensor, weights[name if source is run else name.removeprefix("body.")])
        assert new == ([] if source is run else ["output.bias", "output.weight", "pooler.bias", "pooler.weight"])
    train(recipe, tmp_path / "tuned", device="cpu")
    assert Run.open(tmp_path / "tuned").recipe.objective == run.recipe.objective.model_copy(update={"class_weights": "none"})


def test_batched_evaluation_matches_evaluating_one_text_at_a_time(run: Run) -> None:
    result = evaluate_classifier(Ensemble.of([run], ["last"]), baselines=False, device="cpu")
    network = run.model("last", device="cpu")
    prepared = formats.find(run.recipe.data).prepare(run.recipe, SILENT, 1)
    framing = Framing.of(run.tokenizer, run.recipe.model)
    right = 0
    confusion = np.zeros((3, 3), dtype=int)
    for ids, target in zip(prepared.heldout.documents(), prepared.heldout.ids(result.labels), strict=True):
        with torch.no_grad():
            predicted = int(network(torch.from_numpy(framing.frame(ids))[None]).argmax())
        right += predicted == target
        confusion[target, predicted] += 1
    assert result.scores.examples == 12
    assert result.scores.accuracy == pytest.approx(right / 12)
    assert np.array_equal(result.scores.confusion, confusion)
    logged = [line["val_accuracy"] for line in run.metrics() if line["kind"] == "eval"]
    assert logged[-1] == pytest.approx(right / 12)


def test_the_baselines_match_scikit_learn(run: Run) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    result = evaluate_classifier(run, device="cpu", mistakes=3)
    assert result.baselines["tfidf_linear"].accuracy == 1.0  # Texts with different labels share no words.
    assert result.baselines["majority"].accuracy == pytest.approx(1 / 3)  # All three labels are equally frequent.
    document = result.as_dict()
    assert len(document["mistakes"]) <= 3
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(200, 4)), rng.integers(0, 4, 200)
    scores = classification.score(logits, targets)
    assert scores.macro_f1 == pytest.approx(metrics.f1_score(targets, logits.argmax(1), average="macro"))
    assert scores.accuracy == pytest.approx(metrics.accuracy_score(targets, logits.argmax(1)))
    assert scores.loss == pytest.approx(metrics.log_loss(targets, np.exp(classification.log_softmax(logits))))
    assert np.array_equal(scores.confusion, metrics.confusion_matrix(targets, logits.argmax(1)))


def test_texts_without_words_have_no_tfidf_baseline() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(InputError, match="no training text contains a word"):
        tfidf_linear_scores([LabeledText("!", "a"), LabeledText("?!", "b")], ["?"], ["a", "b"])


def test_labels_are_drawn_verbatim_with_a_warning_if_the_font_lacks_characters(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        confusion_plot.draw(np.eye(2), ["$x^2_$", "$100$ off_{"], tmp_path / "a.png")
    with pytest.warns(TinylmWarning, match="lacks characters of some labels") as caught:
        confusion_plot.draw(np.eye(2), ["a", "\ue000"], tmp_path / "b.png")
    assert len(caught) == 1


def test_ties_count_fractionally_and_unknown_labels_count_as_mistakes() -> None:
    scores = classification.score(np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [3.0, 0.0, 0.0]]), np.array([0, 0, -1]))
    assert scores.accuracy == pytest.approx(0.5 / 3)
    assert scores.examples == 3


def test_the_temperature_minimizes_the_loss() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3000, 3)) * 2
    probabilities = np.exp(classification.log_softmax(logits))
    targets = np.array([rng.choice(3, p=row) for row in probabilities])
    assert classification.fit_temperature(logits * 5, targets) == pytest.approx(5, rel=0.1)


def test_the_probabilities_for_a_text_sum_to_one(run: Run) -> None:
    classifier = TextClassifier(Ensemble.of([run]), torch.device("cpu"))
    predictions = list(classifier.classify(["the saw", "", "a very long text about a red apple and a blue plum"]))
    for prediction in predictions:
        assert sum(prediction.probabilities.values()) == pytest.approx(1)
        assert prediction.label == max(prediction.probabilities, key=lambda label: prediction.probabilities[label])
    assert classifier.calibrate() > 0


def test_an_ensemble_predicts_the_mean_of_the_probabilities(run: Run) -> None:
    steps = [checkpoint.step for checkpoint in run.checkpoints()]
    ensemble = Ensemble.of([run], [str(step) for step in (steps[0], steps[-1])])
    members = [TextClassifier(Ensemble((member,)), torch.device("cpu")) for member in ensemble.members]
    texts = ["the saw", "a red apple"]
    each = [[prediction.probabilities["fruit"] for prediction in member.classify(texts)] for member in members]
    together = [prediction.probabilities["fruit"] for prediction in TextClassifier(ensemble, torch.device("cpu")).classify(texts)]
    assert together == pytest.approx(np.mean(each, axis=0))
    document = evaluate_classifier(ensemble, baselines=False, device="cpu").as_dict()
    assert [member["step"] for member in document["members"]] == [steps[0], steps[-1]]
    assert document["step"] is None


@pytest.fixture(scope="module")
def wordpiece_run(folder: Path) -> Run:
    """A classifier for the same texts as `run`, with another tokenizer and a shorter context."""
    shape = MODELS["encoder"].replace("context_length: 16", "context_length: 8")
    recipe = classifier_recipe(folder, model=shape, tokenizer="{kind: wordpiece, vocab_size: 60}")
    train(recipe, folder / "wordpiece", device="cpu")
    return Run.open(folder / "wordpiece")


def test_classifiers_with_different_tokenizers_form_an_ensemble(run: Run, wordpiece_run: Run) -> None:
    runs = [run, wordpiece_run]
    assert run.tokenizer.fingerprint != wordpiece_run.tokenizer.fingerprint
    assert isinstance(run.recipe.data, LabelsSection)
    heldout = read_parts(run.recipe.data, SILENT).texts["heldout"]
    texts = [item.text for item in heldout]
    each = [list(TextClassifier(Ensemble.of([member]), torch.device("cpu")).classify(texts)) for member in runs]
    together = TextClassifier(Ensemble.of(runs), torch.device("cpu"))
    for prediction, *own in zip(together.classify(texts), *each, strict=True):
        for label, probability in prediction.probabilities.items():
            assert probability == pytest.approx(np.mean([member.probabilities[label] for member in own]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the runs have the same texts
        results = [evaluate_classifier(Ensemble.of(order), baselines=False, device="cpu") for order in (runs, runs[::-1])]
    assert results[0].scores.accuracy == results[1].scores.accuracy
    assert results[0].text == f"the held-out texts of {run.path}"
    predicted = together.predict(together.own_texts("heldout")).argmax(axis=1)
    credit = [together.labels[index] == item.label for index, item in zip(predicted, heldout, strict=True)]
    assert results[0].scores.accuracy == pytest.approx(np.mean(credit))
    assert together.calibrate() > 0


def test_an_ensemble_reports_the_network_that_truncates_the_most_texts(run: Run, wordpiece_run: Run) -> None:
    texts = ["apple apple apple apple", "the saw", "plum plum plum", "a"]
    for runs in ([run, wordpiece_run], [wordpiece_run, run]):
        classifier = TextClassifier(Ensemble.of(runs), torch.device("cpu"))
        list(classifier.classify(texts[:2]))
        list(classifier.classify(texts[2:]))
        expected = []
        for member in runs:
            room = Framing.of(member.tokenizer, member.recipe.model).room
            expected.append((sum(len(member.tokenizer.encode(text)) > room for text in texts), room))
        assert expected[0] != expected[1]
        assert (classifier.counts.truncated, classifier.counts.room) == max(expected)


def test_an_ensemble_warns_if_a_member_may_have_been_trained_on_other_texts(run: Run, wordpiece_run: Run, tmp_path: Path) -> None:
    document = (run.path / "recipe.yaml").read_text(encoding="utf-8")
    shutil.copytree(run.path, tmp_path / "moved")
    (tmp_path / "moved" / "recipe.yaml").write_text(document.replace("labeled", "missing"), encoding="utf-8")
    first, second = (Member(each, each.checkpoint()) for each in (Run.open(tmp_path / "moved"), wordpiece_run))
    classifier = TextClassifier(Ensemble((first, second)), torch.device("cpu"))
    assert _same_texts(classifier, first, second) is None
    assert _same_texts(classifier, first, Member(run, run.checkpoint())) is True


def test_an_ensemble_with_different_tokenizers_requires_the_original_texts(run: Run, wordpiece_run: Run, tmp_path: Path) -> None:
    document = (run.path / "recipe.yaml").read_text(encoding="utf-8")
    shutil.copytree(run.path, tmp_path / "moved")
    (tmp_path / "moved" / "recipe.yaml").write_text(document.replace("labeled", "missing"), encoding="utf-8")
    ensemble = Ensemble.of([Run.open(tmp_path / "moved"), wordpiece_run])
    with pytest.raises(InputError, match="missing"):
        evaluate_classifier(ensemble, baselines=False, device="cpu")


def test_cls_pooling_requires_a_bidirectional_model(folder: Path) -> None:
    with pytest.raises(RecipeError, match="cls is the first token"):
        classifier_recipe(folder, model=MODELS["decoder"], extra="objective: {pool: cls}\n")


def test_text_and_labels_need_matching_objectives(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="requires the labels format, not text"):
        masked_recipe(tmp_path, extra="objective: classification\n")
    with pytest.raises(RecipeError, match="requires the text format, not labels"):
        classifier_recipe(tmp_path, extra="objective: masked_lm\n")


def test_wrong_labels_in_the_recipe_are_reported(folder: Path, tmp_path: Path) -> None:
    def prepared(extra: str) -> Recipe:
        recipe = classifier_recipe(folder, extra=extra)
        filled: Recipe = formats.find(recipe.data).prepare(recipe, SILENT, 1).fill_in(recipe)
        return filled

    objective = prepared("objective: {labels: [tool, fruit, color]}\n").objective
    assert objectives.build(objective).name == "classification"
    with pytest.raises(InputError, match="also have 'color'"):
        prepared("objective: {labels: [tool, fruit]}\n")
    with pytest.raises(InputError, match="no training text has the label 'x'"):
        prepared("objective: {labels: [tool, fruit, color, x]}\n")
    with pytest.raises(InputError, match="no training text has the label 'x'"):
        prepared("objective: {class_weights: {x: 2}}\n")
    with pytest.raises(InputError, match="at least one label must have a weight above 0"):
        prepared("objective: {class_weights: {tool: 0, fruit: 0, color: 0}}\n")


@pytest.mark.parametrize("architecture", ["encoder", "decoder"])
def test_lora_trains_adapters_and_the_output_layer(architecture: str) -> None:
    network = _classifier(MODELS[architecture])
    lora.attach(network, LoraSection(rank=2))
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert {"output.weight", "output.bias", "pooler.weight", "pooler.bias"} < trained
    assert "body.blocks.0.attention.qkv.lora_a" in trained
    assert "body.blocks.0.attention.qkv.weight" not in trained
    before = network(torch.tensor([[1, 2, 3]]))
    lora.merge(network)
    torch.testing.assert_close(network(torch.tensor([[1, 2, 3]])), before)
