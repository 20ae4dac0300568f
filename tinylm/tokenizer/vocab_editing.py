"""Add tokens to a tokenizer, or remove tokens. Text that does not contain these tokens is encoded as before.

Added tokens are matched before the rest of the text is encoded. Removing a token from a BPE vocabulary also removes its merge. A
longer token that was merged from the removed token gets another merge if two remaining tokens form it. Otherwise, it is removed
too. This affects only text that contains the removed token.
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
from tinylm.tokenizer.byte_level import bytes_to_unicode, unicode_to_bytes
from tinylm.tokenizer.tokenizer import BYTE_TOKENS, END_OF_TEXT, UNKNOWN, Tokenizer


@dataclass(frozen=True)
class EditedTokenizer:
    """A tokenizer with added or removed tokens."""

    tokenizer: Tokenizer
    sources: list[list[int]]
    """The old ids that each new id replaces: the old id of a kept token, or the old encoding of an added token."""
    also_removed: list[str]
    """Tokens that were removed because they could only be merged from removed tokens."""


@dataclass(frozen=True)
class EncodingCheck:
    """The number of lines in a text that are encoded as before."""

    lines: int
    unaffected: int
    """Number of lines without any of the added or removed tokens."""
    unchanged: int
    """Number of unaffected lines that both tokenizers encode to the same tokens. It should equal `unaffected`."""


def add(tokenizer: Tokenizer, tokens: Sequence[str], *, special: bool = False) -> EditedTokenizer:
    """Append tokens to a vocabulary, as control tokens if `special` is true. Raises `InputError` if one already exists."""
    _check_tokens(tokens)
    for token in tokens:
        spellings = (token, _to_vocabulary(tokenizer, token))
        if any(tokenizer.backend.token_to_id(spelling) is not None for spelling in spellings):
            raise InputError(f"{token!r} is already in the vocabulary", where="TOKEN")
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    old_ids = [tokenizer.encode(token) for token in tokens]
    added_tokens = [AddedToken(token, special=special, normalized=False) for token in tokens]
    if special:
        backend.add_special_tokens(added_tokens)
    else:
        backend.add_tokens(added_tokens)
    edited = Tokenizer(backend)
    sources = {backend.token_to_id(token): ids for token, ids in zip(tokens, old_ids, strict=True)}
    return EditedTokenizer(edited, [sources.get(id, [id]) for id in range(edited.vocab_size)], [])


def extension(before: Tokenizer, after: Tokenizer) -> EditedTokenizer | None:
    """Return `after` as an edit of `before` if they differ only in added control tokens. Otherwise, return None."""
    known = before.backend.get_added_tokens_decoder()
    added = [token.content for id, token in sorted(after.backend.get_added_tokens_decoder().items()) if id not in known]
    if not added:
        return None
    try:
        edited = add(before, added, special=True)
    except InputError:  # one of the tokens was an ordinary token before
        return None
    return edited if edited.tokenizer.fingerprint == after.fingerprint else None


def remove(tokenizer: Tokenizer, tokens: Sequence[str]) -> EditedTokenizer:
    """Remove tokens from a vocabulary and renumber the others. Raises `InputError` if one is missing or cannot be removed."""
    _check_tokens(tokens)
    tokenizer_json: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    added = {token["content"]: token for token in tokenizer_json["added_tokens"]}
    model = tokenizer_json["model"]
    vocabulary = dict(model["vocab"]) if model["type"] != "Unigram" else {piece: id for id, (piece, _) in enumerate(model["vocab"])}
    requested = {_removable(tokenizer, token, added, vocabulary) for token in tokens}
    removed = requested
    if model["type"] == "BPE":
        model["merges"], removed = repair_merges(model["merges"], vocabulary, requested)
    ids = {token: id for token, id in {**vocabulary, **{t: added[t]["id"] for t in added}}.items() if token not in removed}
    old_ids = sorted({*ids.values()})
    new_id = {old: new for new, old in enumerate(old_ids)}
    kept = {token: new_id[id] for token, id in vocabulary.items() if token not in removed}
    if model["type"] == "Unigram":
        scores = dict(model["vocab"])
        model["vocab"] = [[token, scores[token]] for token in sorted(kept, key=kept.__getitem__)]
        model["unk_id"] = new_id[model["unk_id"]] if model["unk_id"] is not None else None
    else:
        model["vocab"] = kept
    tokenizer_json["added_tokens"] = [
        {**token, "id": new_id[token["id"]]} for token in tokenizer_json["added_tokens"] if token["content"] not in removed
    ]
    edited = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json)))
    also_removed = sorted(_to_text(tokenizer, token) for token in removed - requested)
    return EditedTokenizer(edited, [[old] for old in old_ids], also_removed)


def _removable(tokenizer: Tokenizer, token: str, added: dict[str, Any], vocabulary: dict[str, int]) -> str:
    """Return a token as the vocabulary spells it. Raises `InputError` if it is not in the vocabulary or cannot be removed."""
    spelling = token if token in added else _to_vocabulary(tokenizer, token)
    if spelling not in added and spelling not in vocabulary:
        raise InputError(f"{token!r} is not in the vocabulary", where="TOKEN")
    if tokenizer.backend.token_to_id(spelling) in (tokenizer.end_of_text, tokenizer.unknown) or token in (END_OF_TEXT, UNKNOWN):
        raise InputError(f"{token!r} is required and cannot be removed", where="TOKEN")
    if (tokenizer.is_byte_level and len(spelling) == 1) or spelling in BYTE_TOKENS:
        raise InputError(f"{token!r} is a single byte; without it, some text could not be encoded", where="TOKEN")
    return spelling


def check_encoding(before: Tokenizer, edited: EditedTokenizer, tokens: Sequence[str], pieces: Iterable[Piece]) -> EncodingCheck:
    """Compare the tokenizers before and after editing on the lines of a text that do not contain any of the edited `tokens`."""
    n_lines = unaffected = unchanged = 0
    prefix = before.tokenizer_json["model"].get("continuing_subword_prefix") or ""
    changed = [token.removeprefix(prefix) for token in [*tokens, *edited.also_removed]]
    for piece in pieces:
        lines = piece.text.splitlines(keepends=True)
        n_lines += len(lines)
        chosen = [line for line in lines if not any(token in line for token in changed)]
        unaffected += len(chosen)
        for old, new in zip(_encode_lines(before, chosen), _encode_lines(edited.tokenizer, chosen), strict=True):
            unchanged += old == [edited.sources[id][0] for id in new]
    return EncodingCheck(n_lines, unaffected, unchanged)


def _encode_lines(tokenizer: Tokenizer, lines: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.backend.encode_batch_fast(list(lines), add_special_tokens=False)]


def _check_tokens(tokens: Sequence[str]) -> None:
    if not tokens or not all(tokens):
        raise InputError("a token must not be empty", where="TOKEN")
    if len({*tokens}) < len(tokens):
        raise InputError("the same token is listed twice", where="TOKEN")


def _to_vocabulary(tokenizer: Tokenizer, token: str) -> str:
    """Convert a token's text to its spelling in the vocabulary. Byte-level vocabularies represent bytes as characters."""
    if not tokenizer.is_byte_level:
        return token
    character_of = bytes_to_unicode()
    return "".join(character_of[byte] for byte in token.encode("utf-8"))


def _to_text(tokenizer: Tokenizer, spelling: str) -> str:
    """The inverse of `_to_vocabulary`."""
    if not tokenizer.is_byte_level:
        return spelling
    byte_of = unicode_to_bytes()
    return bytes(byte_of[character] for character in spelling).decode("utf-8", "backslashreplace")


def repair_merges(merges: list[Any], vocabulary: dict[str, int], removed: set[str]) -> tuple[list[list[str]], set[str]]:
    """Remove tokens from the merges of a BPE vocabulary. Return the merges and all removed tokens.

    Tokens that are left without a merge are removed too. For example, if `ab` is removed, the merge of `ab` and `c` is replaced
    with the merge of `a` and `bc`. If `bc` is not a token, `abc` is removed.
    """
    removed = set(removed)
    kept: list[list[str]] = []
    reachable = {token for token in vocabulary if token not in removed} - {"".join(_pair(merge)) for merge in merges}
    for left, right in map(_pair, merges):
        token = left + right
        if token in removed:
            continue
        if left in reachable and right in reachable:
            kept.append([left, right])
        elif token not in reachable:
            divisions = ((token[:i], token[i:]) for i in range(len(token) - 1, 0, -1))
            replacement = next((pair for pair in divisions if pair[0] in reachable and pair[1] in reachable), None)
            if replacement is None:
                removed.add(token)
                continue
            kept.append([*replacement])
        reachable.add(token)
    return kept, removed


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge if isinstance(merge, list) else merge.split(" ")
    return left, right
