"""Read sentence pairs from records, tables, aligned files and message catalogs, clean them, and split them by document."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tinylm.errors import InputError, did_you_mean
from tinylm.recipe.pairs import CATALOG, TOY, AlignedFiles, PairSources, PairsSection
from tinylm.reporting import Reporter
from tinylm.text import catalogs, toy_pairs
from tinylm.text.catalogs import CatalogCounts
from tinylm.text.files import TextFile, format_suffix, open_bytes, read_text, refuse_binary
from tinylm.text.records import RECORD_SUFFIXES, RecordFormat
from tinylm.text.sources import Corpus, files_of

_HINT = "choose other fields with data.source and data.target"
_SHORT_SIDE = 20
_PAIRS_PER_DOCUMENT = 100
"""If pairs have no document, blocks of this many consecutive pairs stay together in a split."""


@dataclass(frozen=True, slots=True)
class SentencePair:
    """A sentence and its translation."""

    source: str
    target: str
    document: str
    """The document that the pair belongs to. A split by document does not divide it."""
    language: str = ""
    """The target language. Empty if there is only one."""


@dataclass(frozen=True)
class PairRecordFormat(RecordFormat):
    """Converts a record to a JSON list: source, target, document and language."""

    names: tuple[str, str, str, str | None] = ("source", "target", "document", None)
    """The names of the fields for the source, the target, the document and the language."""

    @property
    def is_default(self) -> bool:
        return False

    @property
    def _hint(self) -> str:
        return _HINT

    @cached_property
    def fields(self) -> list[str]:
        source, target, _, language = self.names
        return list(dict.fromkeys(name for name in (source, target, language) if name is not None))

    def text(self, record: object, where: str) -> str:
        if not isinstance(record, Mapping):
            raise InputError("not a JSON object", where=where)
        for name in self.fields:
            if name not in record:
                hint = did_you_mean(name, map(str, record)) or self._hint
                raise InputError(f"no field {name!r}; fields: {', '.join(map(str, record))}", where=where, hint=hint)
        source, target, document, language = self.names
        values = [self._value(record, source, where), self._value(record, target, where)]
        named = record.get(document)
        values.append("" if named is None else str(named))
        values.append("" if language is None else self._value(record, language, where))
        if language is not None and not values[-1]:
            raise InputError(f"field {language!r} is empty, but it must be the target language", where=where)
        return json.dumps(values)


def read_pairs(section: PairsSection, part: AlignedFiles | PairSources, reporter: Reporter) -> list[SentencePair]:
    """Read the pairs of a part in order, with each run of whitespace replaced with one space, as in `Translator`.

    Pairs with an empty side or with very different lengths are skipped and reported.

    Raises `InputError` if a source cannot be read, if aligned files have different numbers of lines, or if no pairs remain.
    """
    counts = CatalogCounts()
    found = _aligned_pairs(part, section.errors) if isinstance(part, AlignedFiles) else _pairs(section, part.sources, counts)
    skipped: Counter[str] = Counter()
    kept, total = [], 0
    for pair in found:
        total += 1
        pair = replace(pair, source=" ".join(pair.source.split()), target=" ".join(pair.target.split()))
        reason = _reason_to_skip(pair, section.max_length_ratio)
        if reason is None:
            kept.append(pair)
        else:
            skipped[reason] += 1
    _report(part, counts, skipped, total, reporter)
    if section.language is not None and not all(pair.language for pair in kept):
        hint = "use records with a language field, or remove data.language"
        raise InputError("aligned files and generated pairs have no target language", where=_describe(part), hint=hint)
    if not kept:
        raise InputError("there are no sentence pairs", where=_describe(part))
    return kept


def _pairs(section: PairsSection, sources: Sequence[str], counts: CatalogCounts) -> Iterator[SentencePair]:
    names = (section.source, section.target, section.document, section.language)
    record_format = PairRecordFormat("text", None, section.errors, names)
    for source in sources:
        if source.startswith(CATALOG):
            messages = catalogs.installed_messages(source.removeprefix(CATALOG), counts)
            yield from _from_messages(messages, record_format, source)
        elif source.startswith(TOY):
            yield from _toy_pairs(source)
        else:
            files = [] if "://" in source else files_of(source)
            found = [file for file in files if format_suffix(file) in catalogs.SUFFIXES]
            for file in found:
                yield from _from_messages(catalogs.read_catalog(file, counts), record_format, file)
            if found and os.path.isdir(os.path.expanduser(source)):  # such a folder often contains scripts and lists of catalogs
                others = [file for file in files if format_suffix(file) in RECORD_SUFFIXES]
            elif found:
                others = [file for file in files if file not in found]
            else:
                others = [source]
            if others:
                yield from _from_records(others, section.errors, record_format)


def _from_messages(messages: Iterable[catalogs.Message], record_format: PairRecordFormat, where: str) -> Iterator[SentencePair]:
    for message in messages:
        yield SentencePair(*json.loads(record_format.text(message.fields(), where)))


def _toy_pairs(source: str) -> Iterator[SentencePair]:
    name = source.removeprefix(TOY)
    if name not in toy_pairs.NAMES:
        raise InputError(f"unknown generated pairs {name!r}", where=source, hint=f"use {TOY}{toy_pairs.NAMES[0]}")
    for number, (text, translation) in enumerate(toy_pairs.reversed_sequences()):
        yield _in_block(SentencePair(text, translation, ""), source, number)


def _from_records(sources: Sequence[str], errors: str, record_format: PairRecordFormat) -> Iterator[SentencePair]:
    with Corpus(sources, errors=errors, record_format=record_format, allow_unused_format=True) as corpus:
        for number, (name, is_record, document) in enumerate(corpus.documents()):
            if not is_record:
                suffixes = ", ".join((*RECORD_SUFFIXES, *catalogs.SUFFIXES))
                hint = f"use {suffixes} files, catalog:LANGUAGE, or {{source: FILE, target: FILE}}"
                raise InputError("has no sentence pairs", where=name, hint=hint)
            pair = SentencePair(*json.loads(document))
            yield pair if pair.document else _in_block(pair, name, number)


def _in_block(pair: SentencePair, name: str, number: int) -> SentencePair:
    block = f"{os.path.basename(name)}#{number // _PAIRS_PER_DOCUMENT}"
    return SentencePair(pair.source, pair.target, block, pair.language)


def _aligned_pairs(part: AlignedFiles, errors: str) -> Iterator[SentencePair]:
    sources, targets = (_lines(path, errors) for path in (part.source, part.target))
    if len(sources) != len(targets):
        raise InputError(
            f"{part.source} has {len(sources):,} lines and {part.target} has {len(targets):,}",
            where="aligned files",
            hint="line n of one file must be the translation of line n of the other",
        )
    for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
        yield _in_block(SentencePair(source, target, ""), part.source, number)


def _lines(path: str, errors: str) -> list[str]:
    file = TextFile.at(os.path.expanduser(path), path)
    if not os.path.isfile(file.path):
        problem = "is a folder, not a file" if os.path.isdir(file.path) else "no such file"
        raise InputError(problem, where=path)
    refuse_binary(file)
    with open_bytes(file) as stream:
        text = "".join(read_text(path, stream, errors))
    return text.removeprefix("\ufeff").removesuffix("\n").split("\n")


def _reason_to_skip(pair: SentencePair, max_ratio: float) -> str | None:
    lengths = sorted((len(pair.source), len(pair.target)))
    if not lengths[0]:
        return "an empty side"
    if lengths[1] > _SHORT_SIDE and lengths[1] > max_ratio * lengths[0]:
        return f"a length ratio above {max_ratio:g}"
    return None


def _report(part: AlignedFiles | PairSources, counts: CatalogCounts, skipped: Counter[str], total: int, reporter: Reporter) -> None:
    if counts.catalogs:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.skipped.most_common())
        reporter.note(f"{counts.catalogs:,} catalogs, {counts.messages:,} messages" + (f"; skipped {reasons}" if reasons else ""))
    if counts.unreadable:
        reporter.warn(f"skipped {len(counts.unreadable):,} unreadable catalogs, such as {counts.unreadable[0]}")
    if skipped:
        reasons = ", ".join(f"{count:,} with {reason}" for reason, count in skipped.most_common())
        reporter.warn(f"{_describe(part)}: skipped {sum(skipped.values()):,} of {total:,} pairs: {reasons}")


def _describe(part: AlignedFiles | PairSources) -> str:
    paths = (part.source, part.target) if isinstance(part, AlignedFiles) else part.sources
    return ", ".join(paths)


def split(pairs: Sequence[SentencePair], shares: Mapping[str, tuple[float, str]]) -> dict[str, list[SentencePair]]:
    """Divide pairs into `train` and the parts in `shares`, which maps each part to (share, `document` or `tail`).

    With `document`, whole documents are added to a part until it has its share, in the order of a hash of their names. With
    `tail`, a part is the end of the remaining pairs. Raises `InputError` if no pairs remain for training.
    """
    rest, parts = list(pairs), {}
    for part, (share, by) in shares.items():
        wanted = max(1, round(share * len(pairs)))
        if by == "tail":
            parts[part], rest = rest[-wanted:], rest[:-wanted]
        else:
            chosen = _choose_documents(rest, wanted)
            parts[part] = [pair for pair in rest if pair.document in chosen]
            rest = [pair for pair in rest if pair.document not in chosen]
        if not rest:
            documents = len({pair.document for pair in pairs})
            hint = "set data.heldout.by to tail, or use separate held-out files"
            problem = f"all pairs belong to {documents} documents, so none are left for training"
            raise InputError(problem, where="data.heldout", hint=hint)
    return {"train": rest, **parts}


def _choose_documents(pairs: Sequence[SentencePair], wanted: int) -> set[str]:
    sizes = Counter(pair.document for pair in pairs)
    chosen: set[str] = set()
    count = 0
    for document in sorted(sizes, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()):
        if count >= wanted:
            break
        # A document that would make the part more than twice as large as requested stays in the training part.
        if count and count + sizes[document] > 2 * wanted:
            continue
        chosen.add(document)
        count += sizes[document]
    return chosen


def normalized(text: str) -> str:
    """Return a sentence with normalized case and whitespace. Used to find repeated sentences."""
    return " ".join(text.casefold().split())


def fingerprint(parts: Mapping[str, Sequence[SentencePair]]) -> str:
    """Return a hash of the pairs of all parts in order."""
    digest = hashlib.sha256()
    for part, pairs in parts.items():
        digest.update(f"{part} {len(pairs)}\n".encode())
        for pair in pairs:
            line = json.dumps([pair.source, pair.target, pair.document, pair.language])
            digest.update(f"{line}\n".encode())
    return digest.hexdigest()
