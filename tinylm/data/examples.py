"""Show training examples as text, and mark which parts are training targets and which are only context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

from tinylm.data.datasets import Examples
from tinylm.data.framing import PADDING
from tinylm.data.preferences import ANSWER
from tinylm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Part:
    """Consecutive tokens in an example that are either all training targets or all context."""

    text: str
    learned: bool
    tokens: int


@dataclass(frozen=True)
class ShownExample:
    """One training sequence, divided into segments that do not attend to each other."""

    segments: list[list[Part]]
    padding: int
    """Number of padding positions."""
    labels: tuple[str, ...] = ()
    """The name of each segment, or empty if the segments have no names."""

    @property
    def tokens(self) -> int:
        return sum(part.tokens for parts in self.segments for part in parts)

    @property
    def learned(self) -> int:
        return sum(part.tokens for parts in self.segments for part in parts if part.learned)


def shown_examples(examples: Examples, tokenizer: Tokenizer) -> Iterator[ShownExample]:
    """Convert next-token prediction examples to text. The first token in a segment is only context.

    Control tokens are shown by name.
    """
    tokens = examples["tokens"]
    targets = examples.get("targets", tokens[:, 1:])
    segments = examples.get("segments", np.zeros_like(tokens))
    for row in range(len(tokens)):
        count = int((tokens[row] >= 0).sum())
        runs = [_segment(tokens[row], targets[row], start, end, tokenizer) for start, end in _spans(segments[row][:count])]
        yield ShownExample(runs, tokens.shape[1] - 1 - count if count < tokens.shape[1] else 0)


def shown_preferences(examples: Examples, tokenizer: Tokenizer) -> Iterator[ShownExample]:
    """Convert pairs of conversations to text. The training targets are the tokens of the two answers."""
    for tokens, segments in zip(examples["tokens"], examples["segments"], strict=True):
        sides = zip(tokens.reshape(2, -1).tolist(), segments.reshape(2, -1).tolist(), strict=True)
        parts = [
            _parts([(id, segment == ANSWER) for id, segment in zip(*side, strict=True) if segment != PADDING], tokenizer)
            for side in sides
        ]
        yield ShownExample(parts, int((segments == PADDING).sum()), ("chosen", "rejected"))


def _spans(segments: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each run of positions with the same segment number."""
    edges = np.flatnonzero(np.diff(segments)) + 1
    bounds = [0, *edges.tolist(), len(segments)]
    yield from pairwise(bounds)


def _segment(tokens: np.ndarray, targets: np.ndarray, start: int, end: int, tokenizer: Tokenizer) -> list[Part]:
    """Return the parts of the segment [start, end), including a last target that is not an input."""
    ids, learned = [int(tokens[start])], [False]
    for position in range(start, min(end, len(targets))):
        target = int(targets[position])
        if position + 1 < end:
            ids.append(int(tokens[position + 1]))
        elif target >= 0:
            ids.append(target)
        else:
            break
        learned.append(target >= 0)
    return _parts(list(zip(ids, learned, strict=True)), tokenizer)


def _parts(tokens: list[tuple[int, bool]], tokenizer: Tokenizer) -> list[Part]:
    """Group consecutive tokens that are all training targets or all context."""
    parts = []
    for flag, members in groupby(tokens, key=lambda pair: pair[1]):
        group = [id for id, _ in members]
        parts.append(Part(_text(group, tokenizer), flag, len(group)))
    return parts


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    """Decode ids. Control tokens are replaced with their names."""
    added = tokenizer.backend.get_added_tokens_decoder()
    control = {id for id, token in added.items() if token.special} | {tokenizer.end_of_text}
    text = ""
    for is_control, members in groupby(ids, key=lambda id: id in control):
        group = list(members)
        text += "".join(str(tokenizer.backend.id_to_token(id)) for id in group) if is_control else tokenizer.decode(group)
    return text
