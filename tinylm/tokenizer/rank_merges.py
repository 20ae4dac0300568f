"""Find the merges of a BPE vocabulary that stores a rank for each token instead of merges, as tiktoken and sentencepiece do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Token = TypeVar("Token", str, bytes)
_NO_RANK = 1 << 32


def find_merges(ranks: Mapping[Token, int]) -> tuple[list[tuple[Token, Token]], bool]:
    """Return the merge that produces each token of two or more units, lowest rank first. A unit is a byte or a character.

    The encoder merges the adjacent tokens whose concatenation has the lowest rank. The merges of the units inside a token do not
    depend on the units around it, so each token is produced by a single merge. The second result is whether there is a merge for
    every token. No text is merged to a token without one. `ranks` may omit tokens of a single unit.
    """
    merges: dict[Token, tuple[Token, Token]] = {}
    ordered = sorted((token for token in ranks if len(token) > 1), key=lambda token: ranks[token])
    for token in ordered:
        parts = _last_merge(token, ranks)
        if parts is not None:
            merges[token] = parts
    return list(merges.values()), len(merges) == len(ordered)


def _last_merge(token: Token, ranks: Mapping[Token, int]) -> tuple[Token, Token] | None:
    """Return the two tokens into which the units of `token` are merged before the last merge, or None if more than two remain."""
    bounds = list(range(len(token) + 1))
    pairs = [ranks.get(token[index : index + 2], _NO_RANK) for index in range(len(token) - 1)]  # the rank of each adjacent pair
    while len(pairs) > 1:
        lowest = min(pairs)
        if lowest == _NO_RANK:
            return None
        index = pairs.index(lowest)
        del bounds[index + 1], pairs[index]
        if index:
            pairs[index - 1] = ranks.get(token[bounds[index - 1] : bounds[index + 1]], _NO_RANK)
        if index < len(pairs):
            pairs[index] = ranks.get(token[bounds[index] : bounds[index + 2]], _NO_RANK)
    return token[: bounds[1]], token[bounds[1] :]
