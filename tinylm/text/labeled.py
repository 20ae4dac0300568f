"""Read texts that have one label each, and divide them into stratified splits.

A labeled text is a record in a .jsonl, .csv, .tsv or .parquet file, or a text file in a subfolder that is named after its label.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tinylm.errors import InputError
from tinylm.text.records import RecordFormat
from tinylm.text.sources import Corpus

_HINT = "choose the fields with --field and --label; in a recipe, with data.text and data.label"


@dataclass(frozen=True, slots=True)
class LabeledText:
    """A text and its label."""

    text: str
    label: str


@dataclass(frozen=True)
class LabeledRecordFormat(RecordFormat):
    """Converts a record to a document: the label as JSON on the first line, then the text.

    Labels have no whitespace at the beginning and end.
    """

    label: str = "label"

    @property
    def is_default(self) -> bool:
        return True  # a plain file has no fields; its folder determines its label

    @property
    def _hint(self) -> str:
        return _HINT

    @cached_property
    def fields(self) -> list[str]:
        return list(dict.fromkeys((self.field, self.label)))

    def text(self, record: object, where: str) -> str:
        text = super().text(record, where)
        assert isinstance(record, Mapping)
        value = record[self.label]
        if isinstance(value, bytes):  # a column of a Parquet file
            value = value.decode("utf-8", "replace")
        if not isinstance(value, (str, bool, int, float)) or value != value:
            shown = json.dumps(value, default=str)[:40]
            raise InputError(f"field {self.label!r} must be a label, not {shown}", where=where, hint=_HINT)
        label = value.strip() if isinstance(value, str) else json.dumps(value)
        if not label:
            raise InputError(f"field {self.label!r} is empty", where=where, hint="add a label or remove the record")
        return f"{json.dumps(label)}\n{text}"


def read_labeled(sources: Sequence[str], text: str, label: str, errors: str) -> Iterator[LabeledText]:
    """Yield the labeled texts in `sources` in order. `text` and `label` are the names of the record fields.

    Raises `InputError` if a source cannot be read, or if a text has no label.
    """
    record_format = LabeledRecordFormat(text, None, errors, label)
    for source in sources:
        with Corpus([source], errors=errors, record_format=record_format) as corpus:
            for name, is_record, document in corpus.documents():
                if is_record:
                    first, _, rest = document.partition("\n")
                    yield LabeledText(rest, json.loads(first))
                else:
                    yield LabeledText(document, _label_of_file(source, name))


def _label_of_file(source: str, name: str) -> str:
    """Return the label of a text file: the name of its subfolder in the folder `source`."""
    folder = os.path.expanduser(source)
    parts = os.path.relpath(name, folder).split(os.sep) if os.path.isdir(folder) else []
    if len(parts) < 2:
        hint = "use a folder with a subfolder for each label, or a .jsonl, .csv, .tsv or .parquet file with a label field"
        raise InputError("a text file has no label", where=name, hint=hint)
    return parts[0]


def stratified(texts: Sequence[LabeledText], shares: Mapping[str, float]) -> dict[str, list[int]]:
    """Divide texts into splits with the same fraction of each label's texts. Return sorted indices into `texts` for each split.

    `shares` maps each split to its fraction of each label's texts. The rest is the split `train`. The choice depends only on a hash
    of the text, and identical texts are in the same split. At least one text with each label, and its duplicates, remains for
    training, so the other splits may contain no text with a rare label.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(texts):
        groups[item.text].append(index)
    by_label: dict[str, list[list[int]]] = defaultdict(list)
    for members in groups.values():
        by_label[texts[members[0]].label].append(members)
    chosen: dict[str, list[int]] = {part: [] for part in (*shares, "train")}
    for label_groups in by_label.values():
        total = sum(map(len, label_groups))
        remaining = deque(sorted(label_groups, key=lambda members: _hash(texts[members[0]].text)))
        for part, share in shares.items():
            count, wanted = 0, round(share * total)
            while count < wanted and len(remaining) > 1:
                members = remaining.popleft()
                chosen[part] += members
                count += len(members)
        chosen["train"] += [index for members in remaining for index in members]
    return {part: sorted(indexes) for part, indexes in chosen.items()}


def subset(texts: Sequence[LabeledText], share: float) -> list[int]:
    """Return the indices of a fraction of each label's texts, at least one per label. A smaller fraction selects a subset."""
    by_label: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(texts):
        by_label[item.label].append(index)
    chosen = []
    for indexes in by_label.values():
        ordered = sorted(indexes, key=lambda index: _hash(texts[index].text))
        chosen += ordered[: max(1, round(share * len(ordered)))]
    return sorted(chosen)


def fingerprint(texts: Iterable[LabeledText]) -> str:
    """Return a hash of the texts and labels in order."""
    digest = hashlib.sha256()
    for item in texts:
        digest.update(f"{json.dumps([item.label, item.text])}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
