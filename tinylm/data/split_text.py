"""Open a recipe's text, scan it, and split it into `train`, `heldout` and optionally `test`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np

from tinylm.data.prepared import PART_ADJECTIVES
from tinylm.errors import InputError
from tinylm.recipe.schema import DataSection, HeldoutShare, HeldoutSources, TestShare
from tinylm.reporting import Reporter
from tinylm.text import split
from tinylm.text.sources import Corpus, Piece, describe, require_used_format
from tinylm.text.split import Scan, Split

_MAX_SKIPPED_NOTES = 3
PART_NAMES = {part: f"{adjective} text" for part, adjective in PART_ADJECTIVES.items()}


@dataclass(frozen=True)
class ScannedCorpus:
    """A corpus that has been read once."""

    corpus: Corpus
    scan: Scan

    def pieces(self) -> Iterator[Piece]:
        """Yield the text. Raises `InputError` at the end if the text has changed since it was scanned."""
        return split.unchanged(self.corpus.pieces(), self.scan, describe(self.corpus.sources))


@dataclass(frozen=True)
class SplitSource:
    """A text from `data.train` that has been scanned and split."""

    text: ScannedCorpus
    split: Split

    def pieces(self, part: str) -> Iterator[Piece]:
        """Yield the text of a split. Raises `InputError` if the text has changed since the scan."""
        return self.split.select(self.text.pieces(), part)

    def sizes(self, part: str) -> tuple[int, int]:
        """Return the number of documents and characters in a split."""
        return int(self.split.contains(part).sum()), self.split.characters(part)

    @property
    def fingerprint(self) -> list[str]:
        """Hashes of the content and of the boundaries between the splits."""
        boundaries = [self.split.boundaries] if self.split.test_boundaries is None else [*self.split.spans("heldout")]
        return [self.text.scan.fingerprint, *(hashlib.sha256(array.astype("<i8").tobytes()).hexdigest() for array in boundaries)]


@dataclass(frozen=True)
class SplitText:
    """A text that has been opened, scanned and split into `train`, `heldout` and optionally `test`."""

    texts: tuple[SplitSource, ...]
    """The text from `data.train`, which contains all splits that have no separate sources. A mixture has several, which are split
    separately; each split then contains the text of all sources, in order."""
    others: Mapping[str, ScannedCorpus] = field(default_factory=dict)
    """The splits with separate sources."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources in `data.train`."""
        return tuple(source for text in self.texts for source in text.text.corpus.sources)

    @property
    def train_bytes(self) -> int:
        """The size of the text from `data.train` in bytes."""
        return sum(text.text.scan.bytes for text in self.texts)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the splits."""
        has_test = "test" in self.others or self.texts[0].split.test_boundaries is not None
        return split.PARTS if has_test else split.PARTS[:2]

    def pieces(self, part: str) -> Iterator[Piece]:
        """Yield the text of a split. Raises `InputError` if its source has changed since the scan."""
        if part in self.others:
            return self.others[part].pieces()
        return chain.from_iterable(text.pieces(part) for text in self.texts)

    @property
    def fingerprint(self) -> str:
        """A hash of the content of all splits and the boundaries between them."""
        hashes = [item for text in self.texts for item in text.fingerprint]
        others = [f"{part} {scanned.scan.fingerprint}" for part, scanned in sorted(self.others.items())]
        return hashlib.sha256(json.dumps([*hashes, *others]).encode()).hexdigest()[:32]

    def sizes(self, part: str) -> tuple[int, int]:
        """Return the number of documents and characters in a split."""
        if part in self.others:
            scan = self.others[part].scan
            return scan.documents, scan.characters
        sizes = [text.sizes(part) for text in self.texts]
        return sum(documents for documents, _ in sizes), sum(characters for _, characters in sizes)

    def documents_by_source(self, part: str) -> dict[str, int]:
        """Return the number of documents of each source of a mixture in a split. Empty if the split has separate sources."""
        return {} if part in self.others else {", ".join(text.text.corpus.sources): text.sizes(part)[0] for text in self.texts}

    def hashes(self, part: str) -> np.ndarray:
        """Return the hashes of the documents that are entirely in a split."""
        if part in self.others:
            return self.others[part].scan.hashes
        hashes = []
        for text in self.texts:
            starts, ends = text.split.spans(part)
            hashes.append(text.text.scan.hashes[ends - starts == text.split.lengths])
        return np.concatenate(hashes)


def open_text(data: DataSection, reporter: Reporter, stack: ExitStack) -> SplitText:
    """Open, scan and split a text, and report its sizes. Closing `stack` closes the text.

    Raises `InputError` if the text is empty or cannot be split.
    """
    sections = {"heldout": data.heldout, "test": data.test}
    sources = {part: section.sources for part, section in sections.items() if isinstance(section, HeldoutSources)}
    groups = [item.source for item in data.mixture] or [data.sources()["train"]]
    open_corpus = partial(Corpus, field=data.field, template=data.template, errors=data.errors, allow_unused_format=True)
    corpora = [stack.enter_context(open_corpus(names)) for names in groups]
    others = {part: stack.enter_context(open_corpus(names)) for part, names in sources.items()}
    require_used_format([*corpora, *others.values()])
    texts = tuple(_split_source(corpus, data, reporter) for corpus in corpora)
    text = SplitText(texts, {part: ScannedCorpus(other, _scan(other, reporter)) for part, other in others.items()})
    _report_sizes(text, data, reporter)
    _report_problems(text, data, reporter)
    return text


def _split_source(corpus: Corpus, data: DataSection, reporter: Reporter) -> SplitSource:
    scanned = ScannedCorpus(corpus, _scan(corpus, reporter))
    try:
        return SplitSource(scanned, _split(scanned, data))
    except InputError as error:
        if not data.mixture:
            raise
        raise InputError(f"{describe(corpus.sources)}: {error.message}", where=error.where, hint=error.hint) from None


def _split(text: ScannedCorpus, data: DataSection) -> Split:
    """Split the text from `data.train`."""
    by = data.heldout.by if isinstance(data.heldout, HeldoutShare) else "tail"
    share = data.heldout.share if isinstance(data.heldout, HeldoutShare) else 0.0
    test_share = data.test.share if isinstance(data.test, TestShare) else 0.0
    scan = text.scan
    if not share and not test_share:
        return Split(scan.lengths, scan.lengths)
    if by == "document":
        return split.by_document(scan, share, test_share)
    return split.move_cuts_to_lines(split.by_tail(scan, share, test_share), text.corpus.pieces())


def _scan(corpus: Corpus, reporter: Reporter) -> Scan:
    """Read a corpus once, and report the files that were skipped."""
    for path in corpus.skipped[:_MAX_SKIPPED_NOTES]:
        reporter.note(f"skipped {path}: not text")
    if len(corpus.skipped) > _MAX_SKIPPED_NOTES:
        reporter.note(f"skipped {len(corpus.skipped) - _MAX_SKIPPED_NOTES} more files that are not text")
    with reporter.progress("reading", None, "B") as advance:
        scan = split.scan(corpus.pieces(), advance)
    if not scan.characters:
        raise InputError("the text is empty", where=describe(corpus.sources))
    return scan


def _report_sizes(text: SplitText, data: DataSection, reporter: Reporter) -> None:
    """Report the sizes of all splits. Raises `InputError` if one is empty."""
    for part in text.parts:
        if not text.sizes(part)[1]:
            hint = "use more text or a different share"
            where = "data.test" if part == "test" else "data.heldout"
            raise InputError(f"the split leaves no {PART_NAMES[part]}", where=where, hint=hint)
    documents, characters = text.sizes("train")
    message = f"text: {characters:,} characters in {_count_documents(documents)} for training"
    for part, verb in (("heldout", "held out"), ("test", "for testing")):
        if part in text.parts:
            documents, characters = text.sizes(part)
            message += f", {characters:,} in {_count_documents(documents)} {verb} ({_describe_part(data, part)})"
    reporter.note(message)


def _describe_part(data: DataSection, part: str) -> str:
    section = data.heldout if part == "heldout" else data.test
    if isinstance(section, HeldoutSources):
        return describe(section.sources)
    by = data.heldout.by if isinstance(data.heldout, HeldoutShare) else "tail"
    assert section is not None
    return f"{section.share:.0%} by {by}" if section.share >= 0.01 else f"{section.share:g} by {by}"


def _report_problems(text: SplitText, data: DataSection, reporter: Reporter) -> None:
    """Report what makes held-out results less reliable: a document cut in two, repeated documents, and splits of unexpected
    size."""
    for source in text.texts:
        if source.split.cuts_a_document:
            where = f"{describe(source.text.corpus.sources)}: " if len(text.texts) > 1 else ""
            reporter.note(f"{where}the split cuts a document in two; the held-out text starts inside it")
    for part in text.parts[1:]:
        adjective = PART_ADJECTIVES[part]
        documents = text.sizes(part)[0]
        repeated = split.repeated_documents(text.hashes("train"), text.hashes(part))
        if repeated:
            reporter.warn(
                f"{repeated:,} of {documents:,} {adjective} documents also occur in the training text, "
                f"so the {adjective} scores will be too optimistic"
            )
        if isinstance(data.heldout, HeldoutShare) and data.heldout.by == "document" and part not in text.others:
            section = data.heldout if part == "heldout" else data.test
            assert isinstance(section, HeldoutShare | TestShare)
            for source in text.texts:
                _check_share(source, part, section.share, reporter)


def _check_share(text: SplitSource, part: str, share: float, reporter: Reporter) -> None:
    """Warn if a split by document holds out much less or much more text than requested."""
    (documents, characters), scan = text.sizes(part), text.text.scan
    actual = characters / scan.characters
    if not 0.5 <= actual / share <= 2:
        reporter.warn(
            f"data.{part}: `by: document` holds out {documents:,} of {_count_documents(scan.documents)} with {actual:.1%} of the "
            f"text instead of {share:.1%}, because there are too few documents or their lengths differ too much "
            "(use `by: tail` for the requested share)"
        )


def _count_documents(count: int) -> str:
    return f"{count:,} document{'' if count == 1 else 's'}"
