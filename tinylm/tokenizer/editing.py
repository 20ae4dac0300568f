"""Tokens added to a tokenizer or taken out of one, so that text without them is encoded as before.

An added token is looked for in the text before anything else, so nothing else changes. A token taken out of a BPE vocabulary
takes its merge with it; a longer token that was made from it is made from two other tokens where the vocabulary has them, and goes
too where it has not. Both only concern text that spells the token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken

from tinylm.errors import InputError
from tinylm.text.sources import Piece
from tinylm.tokenizer.splits import byte_level_table
from tinylm.tokenizer.tokenizer import BYTE_TOKENS, END_OF_TEXT, UNKNOWN, Tokenizer


@dataclass(frozen=True)
class Edited:
    """A changed tokenizer. `sources[id]`: the old ids that the new id stands for; several for an added token: its pieces."""

    tokenizer: Tokenizer
    sources: list[list[int]]
    also_removed: list[str]
    """Tokens that could only be made from removed ones."""


@dataclass(frozen=True)
class Proof:
    """Lines of a text encoded with both: those without the tokens in question, and of them those with the same tokens."""

    lines: int
    without: int
    same: int


def add(tokenizer: Tokenizer, tokens: Sequence[str], *, special: bool = False) -> Edited:
    """Append tokens; special ones are control tokens. Raises `InputError` for one that is there."""
    _check(tokens)
    for token in tokens:
        if (
            tokenizer.backend.token_to_id(_written(tokenizer, token)) is not None
            or tokenizer.backend.token_to_id(token) is not None
        ):
            raise InputError(f"{token!r} is a token already", where="TOKEN")
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    before = [tokenizer.encode(token) for token in tokens]
    listed = [AddedToken(token, special=special, normalized=False) for token in tokens]
    _ = backend.add_special_tokens(listed) if special else backend.add_tokens(listed)
    edited = Tokenizer(backend)
    added = {backend.token_to_id(token): pieces for token, pieces in zip(tokens, before, strict=True)}
    return Edited(edited, [added.get(id, [id]) for id in range(edited.vocab_size)], [])


def remove(tokenizer: Tokenizer, tokens: Sequence[str]) -> Edited:
    """Take tokens out and close the gaps in the ids. Raises `InputError` for one that is not there or cannot be missed."""
    _check(tokens)
    described: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    added = {token["content"]: token for token in described["added_tokens"]}
    model = described["model"]
    vocabulary = dict(model["vocab"]) if model["type"] != "Unigram" else {piece: id for id, (piece, _) in enumerate(model["vocab"])}
    gone: set[str] = set()
    for token in tokens:
        written = token if token in added else _written(tokenizer, token)
        if written not in added and written not in vocabulary:
            raise InputError(f"{token!r} is no token", where="TOKEN")
        _check_dispensable(tokenizer, token, written)
        gone.add(written)
    asked = set(gone)
    if model["type"] == "BPE":
        model["merges"], gone = _repaired(model["merges"], vocabulary, gone)
    ids = {token: id for token, id in {**vocabulary, **{t: added[t]["id"] for t in added}}.items() if token not in gone}
    order = sorted({*ids.values()})
    renumbered = {old: new for new, old in enumerate(order)}
    kept = {token: renumbered[id] for token, id in vocabulary.items() if token not in gone}
    if model["type"] == "Unigram":
        scores = dict(model["vocab"])
        model["vocab"] = [[token, scores[token]] for token in sorted(kept, key=kept.__getitem__)]
        model["unk_id"] = renumbered[model["unk_id"]] if model["unk_id"] is not None else None
    else:
        model["vocab"] = kept
    described["added_tokens"] = [{**t, "id": renumbered[t["id"]]} for t in described["added_tokens"] if t["content"] not in gone]
    edited = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(described)))
    return Edited(edited, [[old] for old in order], sorted(_text(tokenizer, token) for token in gone - asked))


def prove(before: Tokenizer, edited: Edited, tokens: Sequence[str], pieces: Iterable[Piece]) -> Proof:
    """Encode every line of a text with both tokenizers. A line is without a token when it does not spell it."""
    lines = without = same = 0
    prefix = before.described["model"].get("continuing_subword_prefix") or ""
    spelled = [token.removeprefix(prefix) for token in [*tokens, *edited.also_removed]]
    for piece in pieces:
        listed = piece.text.splitlines(keepends=True)
        lines += len(listed)
        chosen = [line for line in listed if not any(token in line for token in spelled)]
        without += len(chosen)
        for old, new in zip(_ids(before, chosen), _ids(edited.tokenizer, chosen), strict=True):
            same += old == [edited.sources[id][0] for id in new]
    return Proof(lines, without, same)


def _ids(tokenizer: Tokenizer, lines: Sequence[str]) -> list[list[int]]:
    return [found.ids for found in tokenizer.backend.encode_batch_fast(list(lines), add_special_tokens=False)]


def _check(tokens: Sequence[str]) -> None:
    if not tokens or not all(tokens):
        raise InputError("an empty token", where="TOKEN")
    if len({*tokens}) < len(tokens):
        raise InputError("a token is named twice", where="TOKEN")


def _written(tokenizer: Tokenizer, token: str) -> str:
    """How a tokenizer's file writes a token of this text."""
    if not tokenizer.is_byte_level:
        return token
    letters = {byte: letter for letter, byte in byte_level_table().items()}
    return "".join(letters[byte] for byte in token.encode("utf-8"))


def _text(tokenizer: Tokenizer, written: str) -> str:
    table = byte_level_table()
    if not tokenizer.is_byte_level:
        return written
    return bytes(table[letter] for letter in written).decode("utf-8", "backslashreplace")


def _check_dispensable(tokenizer: Tokenizer, token: str, written: str) -> None:
    if tokenizer.backend.token_to_id(written) in (tokenizer.end_of_text, tokenizer.unknown) or token in (END_OF_TEXT, UNKNOWN):
        raise InputError(f"{token!r} cannot be missed", where="TOKEN")
    if (tokenizer.is_byte_level and len(written) == 1) or written in BYTE_TOKENS:
        raise InputError(f"{token!r} is a single byte: without it some text could not be encoded", where="TOKEN")


def _repaired(merges: list[Any], vocabulary: dict[str, int], gone: set[str]) -> tuple[list[list[str]], set[str]]:
    """The merges that are left, and all tokens that go: those in `gone`, and those that nothing can make any more."""
    gone = set(gone)
    kept: list[list[str]] = []
    made = {token for token in vocabulary if token not in gone} - {"".join(_pair(merge)) for merge in merges}
    for left, right in map(_pair, merges):
        token = left + right
        if token in gone:
            continue
        if left in made and right in made:
            kept.append([left, right])
        elif token not in made:
            splits = ((token[:at], token[at:]) for at in range(len(token) - 1, 0, -1))
            other = next((pair for pair in splits if pair[0] in made and pair[1] in made), None)
            if other is None:
                gone.add(token)
                continue
            kept.append([*other])
        made.add(token)
    return kept, gone


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge if isinstance(merge, list) else merge.split(" ")
    return left, right
