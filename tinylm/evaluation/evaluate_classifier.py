"""Evaluate a classifier on the run's held-out or test texts, or on other labeled texts, and compare it with simple baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinylm import device as devices
from tinylm.data.framing import TextCounts
from tinylm.data.labels import UNSEEN
from tinylm.ensemble import Ensemble, Member
from tinylm.errors import InputError
from tinylm.evaluation import classification
from tinylm.evaluation.classification import ClassifierScores
from tinylm.evaluation.classify_texts import (
    EncodedTexts,
    TextClassifier,
    heldout_texts,
    mean_log_probabilities,
    require_classifier,
)
from tinylm.evaluation.intervals import PairedDifference, bootstrap_ratio, paired_difference
from tinylm.evaluation.label_baselines import majority_scores, tfidf_linear_scores
from tinylm.recipe.labels import LabelsSection
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Run
from tinylm.text.labeled import LabeledText, read_labeled
from tinylm.text.sources import describe

MAJORITY, TFIDF = "majority", "tfidf_linear"


@dataclass(frozen=True)
class Mistake:
    """A misclassified text."""

    text: str
    label: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class Baseline:
    """A baseline's accuracy on the same texts. `difference_ci95` is the interval of the model's accuracy minus the baseline's."""

    accuracy: float
    accuracy_ci95: tuple[float, float]
    difference_ci95: tuple[float, float]


@dataclass(frozen=True)
class MemberAccuracy:
    """The accuracy of one classifier in an ensemble. `difference_ci95` is the interval of the ensemble's accuracy minus it."""

    member: Member
    accuracy: float
    difference_ci95: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        return {**self.member.as_dict(), "accuracy": self.accuracy, "difference_ci95": list(self.difference_ci95)}


@dataclass(frozen=True)
class ClassifierEvaluation:
    """The evaluation of a classifier or of an ensemble of classifiers."""

    run: str
    checkpoint: str
    step: int | None
    text: str
    split: str | None
    labels: tuple[str, ...]
    scores: ClassifierScores
    unseen: int
    """Number of texts whose label the model does not have. They count as mistakes."""
    calibration: float
    """The temperature that calibrates the probabilities on these texts. It is above 1 if the model is overconfident."""
    mistakes: list[Mistake] = field(default_factory=list)
    baselines: dict[str, Baseline] = field(default_factory=dict)
    members: list[MemberAccuracy] = field(default_factory=list)
    """The members of an ensemble. Empty for a single model."""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document of `tinylm eval --json`. The rows of `confusion` are true labels, in the order of `labels`."""
        scores = self.scores
        return {
            "run": self.run,
            "checkpoint": self.checkpoint,
            "step": self.step,
            "text": self.text,
            "split": self.split,
            "examples": scores.examples,
            "accuracy": scores.accuracy,
            "accuracy_ci95": list(scores.accuracy_ci95),
            "macro_f1": scores.macro_f1,
            "loss": scores.loss,
            "unseen_labels": self.unseen,
            "labels": list(self.labels),
            "per_label": {label: vars(row) for label, row in zip(self.labels, scores.per_label, strict=True)},
            "confusion": scores.confusion.tolist(),
            "temperature": self.calibration,
            "mistakes": [vars(mistake) for mistake in self.mistakes],
            "baselines": {name: baseline.accuracy for name, baseline in self.baselines.items()},
            "baselines_ci95": {name: list(baseline.accuracy_ci95) for name, baseline in self.baselines.items()},
            "difference_ci95": {name: list(baseline.difference_ci95) for name, baseline in self.baselines.items()},
            **({"members": [member.as_dict() for member in self.members]} if self.members else {}),
        }


def evaluate_classifier(
    model: Run | Ensemble,
    sources: Sequence[str] = (),
    *,
    split: str = "heldout",
    text_field: str | None = None,
    label_field: str | None = None,
    baselines: bool = True,
    mistakes: int = 10,
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> ClassifierEvaluation:
    """Classify the labeled texts in `sources`, or the run's own texts if there are no sources.

    An ensemble predicts the mean of its members' probabilities. Without sources, it uses the texts of the first member.
    `text_field` and `label_field` are the fields of the records in `sources`. By default, they are those of the run's own texts.
    `mistakes` is the number of misclassified texts to list. With `baselines`, also train baselines on the run's training texts.
    If those texts have changed or scikit-learn is missing, warn and skip the TF-IDF baseline. Raises `InputError` if the run is
    not a classifier, or if a source cannot be read.
    """
    ensemble = model if isinstance(model, Ensemble) else Ensemble.of([model])
    first = ensemble.members[0]
    labels = require_classifier(first.run).labels
    classifier = TextClassifier(ensemble, devices.resolve(device))
    counts = TextCounts()
    items = _read(first.run, sources, counts, text_field, label_field) if sources else []
    texts, names = _encoded(classifier, first.run, items, split)
    if sources:
        classifier.count(texts, counts)
        counts.report(reporter)
    targets = _ids(names, labels)
    with reporter.progress("classifying", None, "tokens") as advance:
        each = classifier.predict_each(texts, advance)
    logits = each[0] if ensemble.is_single else mean_log_probabilities(each)
    scores = classification.score(logits, targets)
    for member in ensemble.members[1:] if not sources else ():
        is_same = _same_texts(classifier, first, member)
        if not is_same:
            problem = "may have been" if is_same is None else "was"
            reporter.warn(f"{member.path} {problem} trained on other texts than {first.path}, so it may know some of these texts")
    return ClassifierEvaluation(
        run=ensemble.name,
        checkpoint=ensemble.checkpoint,
        step=first.checkpoint.step if ensemble.is_single else None,
        text=describe(sources) if sources else _own_texts(ensemble, split),
        split=None if sources else split,
        labels=labels,
        scores=scores,
        unseen=int((targets == UNSEEN).sum()),
        calibration=classification.fit_temperature(logits, targets) if (targets >= 0).any() else float("nan"),
        mistakes=_mistakes(first.run, texts, names, labels, logits, mistakes),
        baselines=_baselines(classifier, first, items, split, logits, targets, reporter) if baselines else {},
        members=[] if ensemble.is_single else _members(ensemble, each, logits, targets),
    )


def compare_classifiers(
    models: Sequence[Ensemble],
    sources: Sequence[str] = (),
    *,
    split: str = "heldout",
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> list[PairedDifference]:
    """Compare the accuracy of the first classifier with that of each of the others on the same labeled texts.

    The texts are those in `sources`, or the runs' own texts if there are no sources. Raises `InputError` if a run is not a
    classifier, if a source cannot be read, or if the runs' own texts have different labels.
    """
    counts = TextCounts()
    items = _read(models[0].members[0].run, sources, counts) if sources else []
    credits: list[np.ndarray] = []
    expected: list[str] | None = None
    for model in models:
        run = model.members[0].run
        labels = require_classifier(run).labels
        classifier = TextClassifier(model, devices.resolve(device))
        texts, names = _encoded(classifier, run, items, split)
        if names != (expected or names):
            raise InputError(
                "its texts have other labels than those of the first run", where=model.name, hint="choose texts with --on"
            )
        expected = names
        if sources and model is models[0]:
            classifier.count(texts, counts)
            counts.report(reporter)
        with reporter.progress("classifying", None, "tokens") as advance:
            logits = classifier.predict(texts, advance)
        credits.append(classification.credits(logits, _ids(names, labels)))
    return [paired_difference(credits[0], other, np.ones(len(other))) for other in credits[1:]]


def _members(ensemble: Ensemble, each: Sequence[np.ndarray], logits: np.ndarray, targets: np.ndarray) -> list[MemberAccuracy]:
    """Compare the ensemble, which predicts `logits`, with each of its members."""
    credits, rows = classification.credits(logits, targets), []
    for member, own in zip(ensemble.members, each, strict=True):
        own_credits = classification.credits(own, targets)
        difference = bootstrap_ratio(credits - own_credits, np.ones(len(credits)))
        rows.append(MemberAccuracy(member, float(own_credits.mean()), difference))
    return rows


def _read(
    run: Run,
    sources: Sequence[str],
    counts: TextCounts,
    text_field: str | None = None,
    label_field: str | None = None,
) -> list[LabeledText]:
    """Read the labeled texts in `sources`. Empty texts are skipped and counted in `counts`."""
    data = run.recipe.data
    section = data if isinstance(data, LabelsSection) else LabelsSection.model_validate({"train": list(sources)})
    texts = read_labeled(sources, text_field or section.text, label_field or section.label, section.errors)
    items = []
    for item in texts:
        if item.text.strip():
            items.append(item)
        else:
            counts.empty += 1
    if not items:
        raise InputError("there are no labeled texts", where=describe(sources))
    return items


def _encoded(classifier: TextClassifier, run: Run, items: Sequence[LabeledText], split: str) -> tuple[EncodedTexts, list[str]]:
    """Return the token ids and the labels of `items`, or of the run's own texts if there are none."""
    if items:
        return classifier.encode([item.text for item in items]), [item.label for item in items]
    shard = heldout_texts(run, split)
    return classifier.own_texts(split), [shard.names[id] for id in shard.labels]


def _own_texts(ensemble: Ensemble, split: str) -> str:
    """Describe the texts of the first run."""
    kind = "test" if split == "test" else "held-out"
    return f"the run's {kind} texts" if ensemble.is_single else f"the {kind} texts of {ensemble.members[0].path}"


def _same_texts(classifier: TextClassifier, first: Member, second: Member) -> bool | None:
    """Whether two members were trained and evaluated on the same texts, or None if this cannot be determined."""
    expected, found = (member.checkpoint.state.get("fingerprints", {}).get("data") for member in (first, second))
    if first.run.tokenizer.fingerprint != second.run.tokenizer.fingerprint:
        try:
            expected = classifier.original_parts.encoded_fingerprint(second.run.tokenizer)
        except InputError:
            return None
    return None if expected is None or found is None else bool(expected == found)


def _ids(names: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Return the index of each name in `labels`, or `UNSEEN`, (texts,)."""
    index = {label: id for id, label in enumerate(labels)}
    return np.array([index.get(name, UNSEEN) for name in names], dtype=np.int64)


def _mistakes(
    run: Run, texts: EncodedTexts, names: Sequence[str], labels: Sequence[str], logits: np.ndarray, count: int
) -> list[Mistake]:
    """Return the `count` incorrect predictions with the highest probabilities."""
    probabilities = np.exp(classification.log_softmax(logits))
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    wrong = [index for index in np.argsort(-confidence, kind="stable") if labels[predicted[index]] != names[index]]
    documents = texts[run.tokenizer.fingerprint]
    return [
        Mistake(run.tokenizer.decode(documents[i].tolist()), names[i], labels[predicted[i]], float(confidence[i]))
        for i in wrong[:count]
    ]


def _baselines(
    classifier: TextClassifier,
    member: Member,
    items: Sequence[LabeledText],
    split: str,
    logits: np.ndarray,
    targets: np.ndarray,
    reporter: Reporter,
) -> dict[str, Baseline]:
    """Evaluate the baselines on the same texts as the model. `items` is empty for the run's own texts."""
    objective = require_classifier(member.run)
    credits = classification.credits(logits, targets)
    scores = {}
    if objective.label_counts:
        scores[MAJORITY] = majority_scores(objective.label_counts, len(targets))
    try:
        parts = classifier.original_parts.texts
        texts = [item.text for item in (items or parts[split])]
        scores[TFIDF] = tfidf_linear_scores(parts["train"], texts, objective.labels)
    except InputError as error:
        reporter.warn(f"no {TFIDF} baseline: {error}")
    return {name: _baseline(values, credits, targets) for name, values in scores.items()}


def _baseline(values: np.ndarray, model_credits: np.ndarray, targets: np.ndarray) -> Baseline:
    scores, credits = classification.score(values, targets), classification.credits(values, targets)
    return Baseline(scores.accuracy, scores.accuracy_ci95, bootstrap_ratio(model_credits - credits, np.ones(len(credits))))
