"""Record which tokens of a split belong to which source of a mixture, in the file `sources.json` next to the tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from tinylm.data.shards import Counts, Shard
from tinylm.errors import InputError
from tinylm.paths import atomic_write_text

FILE = "sources.json"
_BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True)
class Span:
    """The documents of one source in a shard. The tokens [start, end) begin and end with the end-of-text token."""

    source: str
    documents: int
    start: int
    end: int
    bytes: int
    """The size of the text that the tokens decode to."""

    @property
    def tokens(self) -> int:
        """The number of tokens without the end-of-text tokens."""
        return self.end - self.start - self.documents - 1

    def of(self, shard: Shard) -> Shard:
        """Return the tokens of the source. Its characters and unknown tokens are not known and counted as 0."""
        counts = Counts(self.documents, self.bytes, characters=0, tokens=self.tokens, unknown_tokens=0)
        return Shard(shard.tokens[self.start : self.end], counts, shard.end_of_text)


def find_spans(shard: Shard, documents: Mapping[str, int], token_byte_lengths: np.ndarray) -> tuple[Span, ...]:
    """Return the span of each source, given the number of documents of each source in the shard, in order."""
    edges = [0, *accumulate(documents.values())]
    places: dict[int, int] = {}
    sizes: dict[int, int] = {}  # the number of bytes before each place
    seen = size = 0
    for start in range(0, len(shard), _BLOCK_TOKENS):
        block = np.asarray(shard.tokens[start : start + _BLOCK_TOKENS])
        ends = np.flatnonzero(block == shard.end_of_text)
        totals = np.cumsum(token_byte_lengths[block])
        for edge in edges:
            if seen <= edge < seen + len(ends):
                places[edge] = start + int(ends[edge - seen])
                sizes[edge] = size + int(totals[ends[edge - seen]])
        seen, size = seen + len(ends), size + int(totals[-1])
    spans = zip(documents.items(), pairwise(edges), strict=True)
    return tuple(Span(name, number, places[a], places[b] + 1, sizes[b] - sizes[a]) for (name, number), (a, b) in spans)


def write_spans(folder: Path, spans: Mapping[str, Sequence[Span]]) -> None:
    """Write `sources.json`. `spans` maps the name of each split to the span of each source."""
    document = {part: [astuple(span) for span in of_part] for part, of_part in spans.items()}
    atomic_write_text(folder / FILE, json.dumps(document) + "\n")


def open_spans(folder: Path, part: str, shard: Shard) -> tuple[Span, ...]:
    """Read the spans of a split, or return an empty tuple if it does not consist of the sources of a mixture.

    Raises `InputError` if the file is damaged or does not match the tokens.
    """
    file = folder / FILE
    if not file.exists():
        return ()
    try:
        rows = json.loads(file.read_text(encoding="utf-8")).get(part, [])
        spans = tuple(Span(*row) for row in rows)
        if not all(isinstance(span.source, str) and all(type(number) is int for number in astuple(span)[1:]) for span in spans):
            raise ValueError("a span is not a name and four whole numbers")
        if problem := next(_problems(spans, shard), None):
            raise ValueError(problem)
        return spans
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"the record of the sources is damaged: {error}", where=str(file)) from None


def _problems(spans: Sequence[Span], shard: Shard) -> Iterator[str]:
    if spans and (spans[0].start, spans[-1].end) != (0, len(shard)):
        yield "the spans do not cover all tokens"
    for span in spans:
        if not 0 <= span.start < span.end <= len(shard) or min(span.documents, span.tokens, span.bytes) < 0:
            yield "a span is outside the tokens"
        elif not shard.tokens[span.start] == shard.tokens[span.end - 1] == shard.end_of_text:
            yield "a span does not begin and end with the end-of-text token"
    if any(before.end - 1 != after.start for before, after in pairwise(spans)):
        yield "the spans are not consecutive"
    if spans and sum(span.documents for span in spans) != shard.counts.documents:
        yield f"the spans do not contain {shard.counts.documents:,} documents"
