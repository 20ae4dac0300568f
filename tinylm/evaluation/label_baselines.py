"""Baselines for classifiers: the most frequent label, and TF-IDF with a linear classifier (scikit-learn)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tinylm.errors import InputError, missing_extra
from tinylm.text.labeled import LabeledText

_WORD = r"(?u)\b\w+\b"


def majority_scores(label_counts: Sequence[int], count: int) -> np.ndarray:
    """Return scores `(count, labels)` that rank the labels by their frequency in the training texts.

    All texts have the same scores, and labels with equal counts have equal scores.
    """
    return np.tile(np.asarray(label_counts, dtype=np.float64), (count, 1))


def tfidf_linear_scores(train: Sequence[LabeledText], texts: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Return scores `(texts, labels)` from a linear support vector machine on TF-IDF features of words and word pairs.

    Raises `InputError` if scikit-learn is not installed, or if no training text contains a word.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.svm import LinearSVC
    except ImportError:
        raise missing_extra("classify", "the TF-IDF baseline") from None
    if not any(re.search(_WORD, item.text) for item in train):
        raise InputError("no training text contains a word")
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=_WORD)
    features = vectorizer.fit_transform([item.text for item in train])
    classifier = LinearSVC(random_state=0).fit(features, [item.label for item in train])
    decisions = classifier.decision_function(vectorizer.transform(texts))
    if decisions.ndim == 1:  # with two labels, scikit-learn returns only the score of the second one
        decisions = np.stack([-decisions, decisions], axis=1)
    columns = {label: column for column, label in enumerate(classifier.classes_)}
    scores = np.full((len(texts), len(labels)), -np.inf)
    for id, label in enumerate(labels):
        scores[:, id] = decisions[:, columns[label]]
    return scores
