"""Record the texts that a model was trained on, in order to measure how much of another text also occurs in them.

The folder `training_text` in a run folder contains index.json and a sample of the n-grams in each text. It also contains the
tokenizer of a text if it differs from the run's tokenizer. The first text is the run's own training text. If the model was
fine-tuned, the training texts of the original run follow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.data.ngrams import NgramSample, Overlap, open_ngrams, save_ngrams
from tinylm.data.shards import Counts, Shard
from tinylm.errors import InputError
from tinylm.paths import atomic_folder
from tinylm.reporting import Reporter
from tinylm.tokenizer import Tokenizer

FOLDER = "training_text"
WARN_ABOVE = 0.03
"""Warn if more than this fraction of a text also occurs in a training text."""
_INDEX = "index.json"


@dataclass(frozen=True)
class TrainingText:
    """A text that a model was trained on."""

    sources: tuple[str, ...]
    ngrams: NgramSample | None
    """The sampled n-grams, or None if they were not recorded, as in an imported model."""
    tokenizer: Tokenizer
    """The tokenizer that was used for the n-grams."""
    run: str | None = None
    """The earlier run that was trained on this text, or None for the run's own text."""

    @property
    def name(self) -> str:
        return "the training text" if self.run is None else f"the training text of {self.run}"


@dataclass(frozen=True)
class MeasuredOverlap:
    """How much of a text also occurs in one of the texts that the model was trained on."""

    text: TrainingText
    overlap: Overlap | None
    """The measured overlap, or None if it is unknown."""

    @property
    def share(self) -> float | None:
        return None if self.overlap is None else self.overlap.share

    @property
    def is_large(self) -> bool:
        return self.share is not None and self.share > WARN_ABOVE

    def describe(self) -> str:
        """Describe the overlap, for example as `0.2% of the text's 13-token sequences also occur in the training text`."""
        if self.overlap is not None:
            share, length = percent(self.overlap.share), self.overlap.length
            return f"{share} of the text's {length}-token sequences also occur in {self.text.name}"
        reason = "that text was not recorded" if self.text.ngrams is None else "this text is too short"
        return f"the overlap with {self.text.name} is unknown, because {reason}"

    def as_dict(self) -> dict[str, Any]:
        """Return the entry in the JSON output. `share` is None if the overlap is unknown."""
        overlap = self.overlap
        return {
            "run": self.text.run,
            "sources": list(self.text.sources),
            "share": self.share,
            "ngram_tokens": None if overlap is None else overlap.length,
            "sampled": None if overlap is None else overlap.sampled,
        }


def percent(share: float) -> str:
    """Format a fraction as a percentage, with one decimal below 10%. Only exactly 0 and 1 are shown as 0% and 100%."""
    if 0 < share < 0.0005:
        return "less than 0.1%"
    if 0.995 <= share < 1:
        return "more than 99%"
    return f"{share:.1%}" if 0 < share < 0.1 else f"{share:.0%}"


def measure(texts: Iterable[TrainingText], shard: Shard, tokenizer: Tokenizer) -> list[MeasuredOverlap]:
    """Measure how much of a text, encoded with `tokenizer`, occurs in each training text."""
    measured = []
    for text in texts:
        same = text.tokenizer.fingerprint == tokenizer.fingerprint
        overlap = None
        if text.ngrams is not None:
            overlap = text.ngrams.overlap(shard if same else _encode_again(shard, tokenizer, text.tokenizer))
        measured.append(MeasuredOverlap(text, overlap))
    return measured


def warn(measured: Iterable[MeasuredOverlap], name: str, reporter: Reporter) -> None:
    """Warn about each training text that contains much of the measured text. `name` is a name for the measured text."""
    for item in measured:
        overlap = item.overlap
        if overlap is not None and item.is_large:
            reporter.warn(
                f"{percent(overlap.share)} of {name} also occurs in {item.text.name} "
                f"(sequences of {overlap.length} tokens), so the scores are better than on new text"
            )
        elif overlap is None and item.text.ngrams is None:
            reporter.note(f"it is not known how much of {name} occurs in {item.text.name}, which was not recorded")


def largest_share(overlaps: Iterable[MeasuredOverlap]) -> float | None:
    """Return the largest known fraction of a text that occurs in any one training text, or None if no fraction is known."""
    return max((overlap.share for overlap in overlaps if overlap.share is not None), default=None)


def _encode_again(shard: Shard, tokenizer: Tokenizer, other: Tokenizer) -> Shard:
    """Encode the text in a shard with another tokenizer, in memory."""
    end_of_text = other.end_of_text or 0
    token_bytes = tokenizer.token_bytes
    parts, size = [np.array([end_of_text])], 0
    for start, end in shard.documents():
        text = b"".join(token_bytes[id] for id in shard.tokens[start:end].tolist())
        size += len(text)
        parts += [np.array(other.encode(text.decode("utf-8", "replace")), dtype=np.int64), parts[0]]
    tokens = np.concatenate(parts)
    documents = len(parts) // 2
    return Shard(tokens, Counts(documents, size, shard.counts.characters, len(tokens) - documents - 1, 0), end_of_text)


def inherited(texts: Sequence[TrainingText], run: str) -> list[TrainingText]:
    """Return the training texts of a run for a model that is initialized from it."""
    return [text if text.run is not None else replace(text, run=run) for text in texts]


def save_training_texts(folder: Path, texts: Sequence[TrainingText], tokenizer: Tokenizer) -> None:
    """Write the record to `folder`. `tokenizer` is the run's tokenizer."""
    entries = []
    with atomic_folder(folder) as temporary:
        for number, text in enumerate(texts):
            entry: dict[str, Any] = {"run": text.run, "sources": list(text.sources), "ngrams": None, "tokenizer": None}
            if text.ngrams is not None:
                entry["ngrams"] = f"ngrams-{number}.safetensors"
                save_ngrams(text.ngrams, temporary / entry["ngrams"])
                if text.tokenizer.fingerprint != tokenizer.fingerprint:
                    entry["tokenizer"] = f"tokenizer-{number}.json"
                    text.tokenizer.save(temporary / entry["tokenizer"])
            entries.append(entry)
        (temporary / _INDEX).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def open_training_texts(folder: Path, tokenizer: Tokenizer) -> list[TrainingText]:
    """Read the record that `save_training_texts` wrote. Raises `InputError` if it is missing or damaged."""
    try:
        entries = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return [_open_text(folder, entry, tokenizer) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"the record of the training text is missing or damaged: {error}", where=str(folder)) from None


def _open_text(folder: Path, entry: dict[str, Any], tokenizer: Tokenizer) -> TrainingText:
    names = {key: entry[key] for key in ("ngrams", "tokenizer")}
    run, sources = entry["run"], entry["sources"]
    if not all(name is None or (isinstance(name, str) and Path(name).name == name) for name in names.values()):
        raise ValueError("a file name is invalid")
    if not (run is None or isinstance(run, str)) or not all(isinstance(source, str) for source in sources):
        raise ValueError("a name is not a string")
    ngrams = None if names["ngrams"] is None else open_ngrams(folder / names["ngrams"])
    own = tokenizer if names["tokenizer"] is None else Tokenizer.load(folder / names["tokenizer"])
    return TrainingText(tuple(sources), ngrams, own, run)
