"""The `labels` data format: labeled texts are divided into stratified splits, encoded, and read in a pseudo-random order."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.cost.examples import ExampleSize
from tinylm.data.bucketing import BucketedOrder
from tinylm.data.datasets import Examples
from tinylm.data.framing import Framing, with_control_tokens
from tinylm.data.order import uniform
from tinylm.data.prepare import EncodePieces, digest, load_or_train_tokenizer, open_or_encode
from tinylm.data.prepared import PART_ADJECTIVES, PreparedData
from tinylm.data.shards import Shard, open_shard
from tinylm.data.workers import encode_in_parallel
from tinylm.errors import InputError
from tinylm.paths import atomic_write_text, cache_folder
from tinylm.recipe import Recipe
from tinylm.recipe.labels import ClassificationObjective, LabeledSources, LabelsSection, StratifiedShare
from tinylm.reporting import Reporter
from tinylm.text.cutting import cut_into_pieces
from tinylm.text.labeled import LabeledText, fingerprint, read_labeled, stratified, subset
from tinylm.text.sources import Piece, describe
from tinylm.tokenizer import Tokenizer

_CACHE_VERSION = 1
UNSEEN = -1
"""The id of labels that do not occur in the training texts."""
_MAX_NAMED = 5


@dataclass(frozen=True)
class LabeledShard:
    """Labeled texts as tokens, with one document per text, and their labels."""

    shard: Shard
    names: tuple[str, ...]
    """The distinct labels in sorted order."""
    labels: np.ndarray
    """The index of each text's label in `names`, (texts,)."""

    def __len__(self) -> int:
        return len(self.labels)

    def ids(self, labels: Sequence[str]) -> np.ndarray:
        """Return the index of each text's label in `labels`, or `UNSEEN`, (texts,)."""
        index = {label: id for id, label in enumerate(labels)}
        ids: np.ndarray = np.array([index.get(name, UNSEEN) for name in self.names], dtype=np.int64)[self.labels]
        return ids

    def documents(self) -> list[np.ndarray]:
        """Return the token ids of each text."""
        return [np.asarray(self.shard.tokens[start:end]) for start, end in self.shard.documents()]


@dataclass(frozen=True)
class PreparedLabels(PreparedData):
    """A tokenizer and the labeled texts in all splits."""

    train: LabeledShard
    heldout: LabeledShard
    test: LabeledShard | None
    truncate: str
    """The value of `data.truncate`."""

    @property
    def heldout_files(self) -> tuple[str, ...]:
        parts = ("heldout",) if self.test is None else ("heldout", "test")
        return tuple(name for part in parts for name in (f"{part}.npy", f"{part}.json", labels_file(part)))

    def fill_in(self, recipe: Recipe) -> Recipe:
        """Fill in `objective.labels` and `objective.label_counts`. Raises `InputError` if they do not match the training texts."""
        objective = recipe.objective
        assert isinstance(objective, ClassificationObjective)
        counts = Counter(self.train.names[id] for id in self.train.labels)
        labels = objective.labels or tuple(sorted(counts))
        unknown, unused = sorted({*counts} - {*labels}), [label for label in labels if not counts[label]]
        if unknown:
            raise InputError(
                f"the training texts also have {_listed(unknown)}", where="objective.labels", hint="add it, or remove the key"
            )
        if unused:
            raise InputError(f"no training text has the label {_listed(unused)}", where="objective.labels", hint="remove it")
        if len(labels) < 2:
            hint = "a classifier needs texts with at least two labels"
            raise InputError(f"all training texts have the label {labels[0]!r}", where="data.label", hint=hint)
        if isinstance(objective.class_weights, dict):
            weights = objective.class_weights
            if extra := sorted({*weights} - {*labels}):
                raise InputError(f"no training text has the label {_listed(extra)}", where="objective.class_weights")
            if not any(weights.get(label, 1.0) for label in labels):
                raise InputError("at least one label must have a weight above 0", where="objective.class_weights")
        label_counts = tuple(counts[label] for label in labels)
        if objective.label_counts not in ((), label_counts):
            raise InputError(
                "does not match the label counts in the training texts", where="objective.label_counts", hint="remove this key"
            )
        update = {"labels": labels, "label_counts": label_counts}
        return recipe.model_copy(update={"objective": objective.model_copy(update=update)})


def labels_file(part: str) -> str:
    """Return the name of the file that contains the labels of a split."""
    return f"{part}-labels.json"


def open_labeled(folder: Path, part: str, vocab_size: int) -> LabeledShard:
    """Open the texts and labels of a split. Raises `InputError` if they are missing or damaged."""
    shard, file = open_shard(folder, part), folder / labels_file(part)
    problem = shard.problem(vocab_size)
    if problem is not None:
        raise InputError(f"the tokens are damaged: {problem}", where=str(folder / f"{part}.npy"))
    try:
        if not file.is_file():
            raise ValueError("no such file")
        document = json.loads(file.read_text(encoding="utf-8"))
        names, ids = document["names"], document["labels"]
        if document["sha256"] != _labels_hash(names, ids):
            raise ValueError("they have changed since they were saved")
        if not all(isinstance(name, str) for name in names) or not all(type(id) is int and 0 <= id < len(names) for id in ids):
            raise ValueError("a label is not one of the names")
        if len(ids) != shard.counts.documents:
            raise ValueError(f"{len(ids):,} labels for {shard.counts.documents:,} texts")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"the labels are missing or damaged: {error}", where=str(file)) from None
    return LabeledShard(shard, tuple(names), np.array(ids, dtype=np.int64))


def write_labels(folder: Path, part: str, texts: Sequence[LabeledText]) -> None:
    """Write the labels of a split next to its tokens."""
    names = sorted({item.label for item in texts})
    index = {name: id for id, name in enumerate(names)}
    ids = [index[item.label] for item in texts]
    document = {"names": names, "labels": ids, "sha256": _labels_hash(names, ids)}
    atomic_write_text(folder / labels_file(part), json.dumps(document) + "\n")


def _labels_hash(names: Any, ids: Any) -> str:
    return hashlib.sha256(json.dumps([names, ids]).encode()).hexdigest()


@dataclass(frozen=True)
class LabeledParts:
    """The labeled texts in each split, in memory."""

    texts: dict[str, list[LabeledText]]

    @property
    def fingerprint(self) -> str:
        return digest(*(f"{part} {fingerprint(texts)}" for part, texts in self.texts.items()))

    def encoded_fingerprint(self, tokenizer: Tokenizer) -> str:
        """Return a hash of the content, the split and the tokenizer."""
        return digest("labels", self.fingerprint, tokenizer.fingerprint, str(_CACHE_VERSION))

    @property
    def train_bytes(self) -> int:
        return sum(len(item.text.encode("utf-8", "surrogatepass")) for item in self.texts["train"])

    def pieces(self, part: str) -> Iterator[Piece]:
        for item in self.texts[part]:
            for number, text in enumerate(cut_into_pieces([item.text])):
                yield Piece(text, number == 0)

    def sizes(self, part: str) -> tuple[int, int]:
        return len(self.texts[part]), sum(len(item.text) for item in self.texts[part])


class LabelsFormat:
    """The data format for texts with one label each."""

    def prepare(self, recipe: Recipe, reporter: Reporter, workers: int) -> PreparedLabels:
        data = recipe.data
        assert isinstance(data, LabelsSection)
        parts = read_parts(data, reporter)
        tokenizer = load_or_train_tokenizer(parts, with_control_tokens(recipe.tokenizer, recipe.model), reporter)
        tokenizer.encoder.note = reporter.note
        key = parts.encoded_fingerprint(tokenizer)
        folder = cache_folder("tokens", key)
        encode: EncodePieces = partial(encode_in_parallel, tokenizer, workers=workers)
        for part, texts in reversed(parts.texts.items()):
            write_labels(folder, part, texts)
            open_or_encode(folder, part, parts, tokenizer, encode, reporter)
        prepared = _open(folder, key, tokenizer, data)
        _report_lengths(prepared, Framing.of(tokenizer, recipe.model, data.truncate), reporter)
        return prepared

    def open(self, recipe: Recipe, folder: Path, fingerprint: str, tokenizer_json: str) -> PreparedLabels:
        assert isinstance(recipe.data, LabelsSection)
        return _open(folder, fingerprint, Tokenizer.from_text(tokenizer_json), recipe.data)

    def dataset(self, recipe: Recipe, prepared: PreparedLabels) -> LabeledDocuments:
        data, objective = recipe.data, prepared.fill_in(recipe).objective
        assert isinstance(data, LabelsSection)
        assert isinstance(objective, ClassificationObjective)
        framing = Framing.of(prepared.tokenizer, recipe.model, data.truncate)
        return LabeledDocuments(
            prepared.train,
            objective.labels,
            framing,
            batch_size=recipe.training.global_batch_size,
            seed=recipe.seed,
            token_dropout=objective.token_dropout,
        )


def _open(folder: Path, key: str, tokenizer: Tokenizer, data: LabelsSection) -> PreparedLabels:
    opened = partial(open_labeled, folder, vocab_size=tokenizer.vocab_size)
    test = opened("test") if (folder / labels_file("test")).exists() else None
    return PreparedLabels(tokenizer, folder, key, opened("train"), opened("heldout"), test, data.truncate)


def read_parts(data: LabelsSection, reporter: Reporter) -> LabeledParts:
    """Read and split the labeled texts, and report the size of each split. Raises `InputError` if a split is empty."""
    sections = {"heldout": data.heldout, "test": data.test}
    shares = {part: section.share for part, section in sections.items() if isinstance(section, StratifiedShare)}
    texts = _read(data, data.train, reporter)
    _report_conflicts(texts, reporter)
    chosen = stratified(texts, shares)
    parts = {part: [texts[index] for index in indexes] for part, indexes in chosen.items()}
    for part, section in sections.items():
        if isinstance(section, LabeledSources):
            parts[part] = _read(data, section.sources, reporter)
    if data.train_share < 1:
        parts["train"] = [parts["train"][index] for index in subset(parts["train"], data.train_share)]
    ordered: dict[str, list[LabeledText]] = {part: parts[part] for part in ("train", "heldout", "test") if part in parts}
    for part, members in ordered.items():
        if not members:
            problem = f"the split leaves no {PART_ADJECTIVES[part]} texts"
            raise InputError(problem, where=f"data.{part}", hint="use more texts or a different share")
    _report_parts(ordered, reporter)
    return LabeledParts(ordered)


def _read(data: LabelsSection, sources: Sequence[str], reporter: Reporter) -> list[LabeledText]:
    texts = list(read_labeled(sources, data.text, data.label, data.errors))
    kept = [item for item in texts if item.text.strip()]
    if not kept:
        raise InputError("there are no labeled texts", where=describe(sources))
    if len(kept) < len(texts):
        reporter.warn(f"{describe(sources)}: skipped {_count(len(texts) - len(kept), 'empty text')}")
    return kept


def _report_conflicts(texts: Sequence[LabeledText], reporter: Reporter) -> None:
    labels: dict[str, set[str]] = {}
    for item in texts:
        labels.setdefault(item.text, set()).add(item.label)
    conflicts = sum(len(found) > 1 for found in labels.values())
    if conflicts:
        reporter.warn(f"{_count(conflicts, 'text')} with more than one label: no classifier can predict all of these labels")


def _report_parts(parts: dict[str, list[LabeledText]], reporter: Reporter) -> None:
    known = {item.label for item in parts["train"]}
    sizes = ", ".join(
        f"{len(texts):,} {name}" for name, texts in zip(("for training", "held out", "for testing"), parts.values(), strict=False)
    )
    reporter.note(f"labeled texts: {sizes}; {_count(len(known), 'label')}")
    trained = {item.text for item in parts["train"]}
    for part, texts in list(parts.items())[1:]:
        adjective = PART_ADJECTIVES[part]
        unseen = sorted({item.label for item in texts} - known)
        if unseen:
            count = sum(item.label in unseen for item in texts)
            reporter.warn(
                f"{_count(count, f'{adjective} text')} with labels that do not occur in the training texts ({_listed(unseen)}) "
                "will count as mistakes"
            )
        if repeated := sum(item.text in trained for item in texts):
            reporter.warn(
                f"{repeated:,} of {_count(len(texts), f'{adjective} text')} also occur in the training texts, "
                "so the scores will be too optimistic"
            )
        if missing := known - {item.label for item in texts}:
            reporter.note(f"{_count(len(missing), 'label')} without {adjective} texts: {_listed(sorted(missing))}")


def _report_lengths(prepared: PreparedLabels, framing: Framing, reporter: Reporter) -> None:
    first, last = (prepared.tokenizer.backend.id_to_token(id) for id in (framing.first, framing.last))
    added = f"two {first}" if first == last else f"{first} and {last}"
    for part, texts in (("train", prepared.train), ("heldout", prepared.heldout), ("test", prepared.test)):
        lengths = [] if texts is None else [end - start for start, end in texts.shard.documents()]
        longer = sum(length > framing.room for length in lengths)
        if longer:
            kept = "first" if framing.truncate == "head" else "first and last"
            reporter.note(
                f"{longer:,} of {_count(len(lengths), f'{PART_ADJECTIVES[part]} text')} have more than {framing.room} tokens "
                f"(up to {max(lengths):,}); only their {kept} {framing.room} tokens are used (data.truncate: {framing.truncate}; "
                f"the {framing.context_length} tokens of model.context_length include {added})"
            )


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MAX_NAMED])
    return shown if len(names) <= _MAX_NAMED else f"{shown} and {len(names) - _MAX_NAMED} more"


class LabeledDocuments:
    """A dataset of labeled texts in a pseudo-random order in which the texts in each batch have similar lengths.

    Examples have `tokens` (count, length), padded with negative ids, and `labels` (count, 1).
    """

    def __init__(
        self,
        texts: LabeledShard,
        labels: Sequence[str],
        framing: Framing,
        *,
        batch_size: int,
        seed: int,
        token_dropout: float = 0.0,
    ) -> None:
        self._shard, self._framing = texts.shard, framing
        self._token_dropout, self._seed = token_dropout, seed
        self._spans = np.array(texts.shard.documents(), dtype=np.int64)
        self._labels = texts.ids(labels)
        lengths = np.minimum(self._spans[:, 1] - self._spans[:, 0], framing.room) + 2
        self._order = BucketedOrder(lengths[:, None], batch_size, seed)
        self.examples_per_epoch = self._order.examples_per_epoch
        self.tokens_per_example = float(lengths.mean())
        (length,) = self._order.padded_lengths()
        self.example_size = ExampleSize(self.tokens_per_example, float(length), int(lengths.max()))

    def examples(self, start: int, count: int) -> Examples:
        """Return the texts at positions [start, start + count)."""
        chosen = self._order.indexes(start, count)
        texts = [np.asarray(self._shard.tokens[first:last]) for first, last in self._spans[chosen]]
        if self._token_dropout:
            random = uniform(self._seed, np.arange(start, start + count, dtype=np.int64), max(map(len, texts)), stream=0)
            texts = [_drop(text, numbers, self._token_dropout) for text, numbers in zip(texts, random, strict=True)]
        framed = [self._framing.frame(text) for text in texts]
        tokens, _ = replace(self._framing, pad=-1).rows(framed)
        return {"tokens": tokens, "labels": self._labels[chosen][:, None]}


def _drop(text: np.ndarray, random: np.ndarray, rate: float) -> np.ndarray:
    """Remove the tokens whose random number in [0, 1) is below `rate`. The token with the largest number always remains."""
    if not len(text):
        return text
    numbers = random[: len(text)]
    kept: np.ndarray = text[numbers >= min(rate, numbers.max())]
    return kept
