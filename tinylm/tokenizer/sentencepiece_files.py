"""Read sentencepiece models (.model files) of the types unigram and bpe. The ids are those of sentencepiece."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from tinylm.errors import InputError, TinylmWarning, missing_extra
from tinylm.tokenizer.rank_merges import find_merges

SUFFIX = ".model"
SPACE = "\u2581"
"""The character that stands for a space in the tokens."""
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNUSED_PREFIX = "\0"
"""Makes a token unusable for encoding, because normalized texts do not contain this character."""
_NEVER = -1e6
"""The score of tokens that no text is encoded to, so that the unigram model never chooses them."""


def read(file: str, end_of_text: str) -> tokenizers.Tokenizer:
    """Read a sentencepiece model. `end_of_text` is added as a control token if the model has no `</s>`.

    Raises `InputError` if the file is missing or damaged, if it uses a feature that a tokenizer.json cannot express, or if the
    package sentencepiece is not installed.
    """
    if not Path(file).is_file():
        raise InputError("no such tokenizer file", where=file)
    proto = _parse(file)
    try:
        return _build(proto, end_of_text)
    except InputError as error:
        raise InputError(error.message, where=file, hint=error.hint) from None


def read_with_ids(file: str, ids: Mapping[str, int], control: Sequence[str], *, encodes_only: bool) -> tokenizers.Tokenizer:
    """Read a unigram model for a vocabulary that assigns other ids to its pieces, and can contain other tokens.

    `ids` must contain the ids 0, 1, 2, ..., and `control` lists its control tokens. No text is encoded to a token that the model
    does not have, except for single characters. With `encodes_only`, such tokens are also not decoded. A piece that the vocabulary
    does not have is divided into smaller ones. Raises `InputError` as `read` does.
    """
    if not Path(file).is_file():
        raise InputError("no such tokenizer file", where=file)
    proto = _parse(file)
    try:
        _check_supported(proto)
        if proto.trainer_spec.model_type != _UNIGRAM:
            raise InputError("only unigram models are supported here")
        unknown = next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN)
        if unknown not in ids:
            raise InputError(f"the vocabulary has no token {unknown!r}")
    except InputError as error:
        raise InputError(error.message, where=file, hint=error.hint) from None
    scores = dict(_unigram_scores(proto.pieces))
    entries = []
    for token in sorted(ids, key=ids.__getitem__):
        unusable = encodes_only and token not in scores and token not in control and len(token) > 1
        entries.append((_UNUSED_PREFIX + token if unusable else token, scores.get(token, _NEVER)))
    backend = tokenizers.Tokenizer(models.Unigram(entries, unk_id=ids[unknown], byte_fallback=False))
    _add_steps(backend, proto, byte_fallback=False)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return backend


def _parse(file: str) -> Any:
    try:
        from google.protobuf.message import DecodeError

        format_module: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError:
        raise missing_extra("compare", "reading sentencepiece models") from None
    proto = format_module.ModelProto()
    try:
        proto.ParseFromString(Path(file).read_bytes())
    except DecodeError as error:
        raise InputError(f"not a sentencepiece model: {error}", where=file) from None
    if not proto.pieces:
        raise InputError("not a sentencepiece model: it has no pieces", where=file)
    return proto


def _build(proto: Any, end_of_text: str) -> tokenizers.Tokenizer:
    trainer, pieces = proto.trainer_spec, proto.pieces
    unknown = _check_supported(proto)
    byte_fallback = any(piece.type == _BYTE for piece in pieces)
    backend = tokenizers.Tokenizer((_unigram if trainer.model_type == _UNIGRAM else _bpe)(pieces, unknown, byte_fallback))
    _add_steps(backend, proto, byte_fallback)
    _add_user_defined(backend, proto)
    control = [piece.piece for piece in pieces if piece.type in (_CONTROL, _UNKNOWN)]
    missing = [] if {"</s>", end_of_text} & set(control) else [end_of_text]
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in [*control, *missing]])
    return backend


def _check_supported(proto: Any) -> int:
    """Return the id of the unknown piece. Raises `InputError` if a tokenizer.json cannot express the model."""
    trainer, pieces = proto.trainer_spec, proto.pieces
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise InputError("only models of the types unigram and bpe are supported", hint="use kind: word or kind: char")
    if trainer.treat_whitespace_as_suffix or not proto.normalizer_spec.escape_whitespaces:
        option = "treat_whitespace_as_suffix" if trainer.treat_whitespace_as_suffix else "escape_whitespaces: false"
        raise InputError(f"{option} is not supported")
    if any(piece.type == _UNUSED for piece in pieces):
        raise InputError("models with unused pieces are not supported")
    unknown = next((id for id, piece in enumerate(pieces) if piece.type == _UNKNOWN), None)
    if unknown is None:
        raise InputError("not a sentencepiece model: it has no unknown piece")
    return unknown


def _add_steps(backend: tokenizers.Tokenizer, proto: Any, byte_fallback: bool) -> None:
    """Add the normalizer, the pre-tokenizer and the decoder."""
    normalizer = proto.normalizer_spec
    backend.normalizer = _normalizer(normalizer)
    backend.pre_tokenizer = _pretokenizer(proto.pieces)
    steps = [decoders.Replace(SPACE, " "), *([decoders.ByteFallback()] if byte_fallback else []), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else steps)


def _add_user_defined(backend: tokenizers.Tokenizer, proto: Any) -> None:
    """Make the user-defined symbols of a bpe model added tokens. In a unigram model, their scores suffice.

    Raises `InputError` if the ids would differ for many texts. Warns if they differ only for texts that contain such a symbol.
    """
    spec, symbols = proto.normalizer_spec, [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    if not symbols:
        return
    if proto.trainer_spec.model_type == _UNIGRAM:
        steps = _normalizer(spec, prefix=False)
        changed = [symbol for symbol in symbols if steps.normalize_str(symbol) != symbol]
        if changed:
            raise InputError(f"the model normalizes its user-defined symbol {changed[0]!r}, which is not supported")
        return
    if spec.remove_extra_whitespaces:
        raise InputError("bpe models with user-defined symbols and remove_extra_whitespaces are not supported")
    if spec.add_dummy_prefix:
        text = (
            f"if a text contains one of the {len(symbols)} user-defined symbols, the text after the symbol is encoded with a space"
        )
        warnings.warn(f"{text} before it, unlike in sentencepiece", TinylmWarning, stacklevel=5)
    backend.add_tokens([AddedToken(symbol, normalized=False, special=False) for symbol in symbols])


def _unigram(pieces: Any, unknown: int, byte_fallback: bool) -> models.Model:
    return models.Unigram(_unigram_scores(pieces), unk_id=unknown, byte_fallback=byte_fallback)


def _unigram_scores(pieces: Any) -> list[tuple[str, float]]:
    """Return all pieces with their scores, in the order of their ids."""
    highest = max((piece.score for piece in pieces if piece.type == _NORMAL), default=0.0)

    def score(piece: Any) -> float:
        if piece.type == _USER_DEFINED:  # as in sentencepiece, where the score depends on the number of bytes
            return float(len(piece.piece.encode()) * highest - 0.1)
        return float(piece.score) if piece.type == _NORMAL else _NEVER

    return [(piece.piece, score(piece)) for piece in pieces]


def _bpe(pieces: Any, unknown: int, byte_fallback: bool) -> models.Model:
    return models.BPE(
        vocab={piece.piece: id for id, piece in enumerate(pieces)},
        merges=_merges({piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}),
        unk_token=pieces[unknown].piece,
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return the merges of the pieces, highest score first.

    If pieces have the same score, sentencepiece merges from left to right. Merges with ranks can express this for runs of one
    character, such as spaces, if the longest run comes first. Raises `InputError` for other pieces with the same score.
    """
    ranks: dict[str, int] = {}
    ordered = sorted((piece for piece in scores if len(piece) > 1), key=lambda piece: (-scores[piece], -len(piece)))
    for rank, (_, group) in enumerate(groupby(ordered, key=lambda piece: scores[piece])):
        tied = list(group)
        if len(tied) > 1 and len(set("".join(tied))) > 1:
            raise InputError(f"the pieces {tied[0]!r} and {tied[1]!r} have the same score, which is not supported")
        ranks |= dict.fromkeys(tied, rank)
    return find_merges(ranks)[0]


def _normalizer(spec: Any, *, prefix: bool = True) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(bytes(spec.precompiled_charsmap)))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A +| +\z"), "")]
    if prefix and spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _pretokenizer(pieces: Any) -> pre_tokenizers.PreTokenizer | None:
    """Split the text before each run of spaces if no piece contains a space after another character.

    The ids are the same without this step, but encoding is slower.
    """
    texts = [piece.piece for piece in pieces if piece.type in (_NORMAL, _USER_DEFINED)]
    if SPACE not in texts or any(SPACE in text.lstrip(SPACE) for text in texts):
        return None
    return pre_tokenizers.Split(Regex(f"{SPACE}*[^{SPACE}]+|{SPACE}+"), "isolated")
