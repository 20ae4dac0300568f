"""Read and write byte-level BPE tokenizers as tiktoken rank files.

Each line of a rank file contains a token in base64 and its id. The file contains neither the split pattern nor special tokens.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from tinylm.errors import InputError
from tinylm.paths import atomic_write_text
from tinylm.tokenizer.byte_level import bytes_to_unicode, unicode_to_bytes
from tinylm.tokenizer.pretokenizer import byte_level_pattern, split_steps
from tinylm.tokenizer.rank_merges import find_merges

SUFFIX = ".tiktoken"
DEFAULT_SPLIT = "llama3"
"""The split pattern of cl100k_base, which most rank files were made for."""
_MAX_ID = 1 << 24


def parse_path(path: str) -> tuple[str, str] | None:
    """Divide `FILE.tiktoken` or `FILE.tiktoken:SPLIT` into the file and the split. Return None for other files."""
    file, colon, split = path.partition(f"{SUFFIX}:")
    if colon:
        return file + SUFFIX, split
    return (path, DEFAULT_SPLIT) if path.endswith(SUFFIX) else None


def read(file: str, split: str, end_of_text: str) -> tokenizers.Tokenizer:
    """Read a rank file. The ids are tiktoken's. `end_of_text` is added as a control token with the next id.

    `split` is the name of a split or a regular expression. Raises `InputError` if the file is missing or damaged, or if `split` is
    not valid.
    """
    if not Path(file).is_file():
        raise InputError("no such tokenizer file", where=file)
    ranks = _read_ranks(file)
    if missing := 256 - sum(bytes([byte]) in ranks for byte in range(256)):
        raise InputError(f"not a byte-level vocabulary: {missing} of the 256 bytes are not tokens", where=file)
    steps = split_steps(split, None)
    character_of = bytes_to_unicode()
    text = {token: "".join(character_of[byte] for byte in token) for token in ranks}
    vocabulary = {text[token]: id for token, id in ranks.items()}
    vocabulary[end_of_text] = max(ranks.values()) + 1
    merges, is_complete = find_merges(ranks)
    # tiktoken encodes a word that equals a token to this token, even if no merge produces it.
    model = models.BPE(vocabulary, [(text[left], text[right]) for left, right in merges], ignore_merges=not is_complete)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    return backend


def _read_ranks(file: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(Path(file).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token, id = b"" if encoded == b"=" else base64.b64decode(encoded, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise InputError("not a token in base64 and its id, separated by a space", where=f"{file}:{number}") from None
        if not 0 <= id < _MAX_ID or token in ranks:
            problem = "the token is repeated" if token in ranks else f"the id {id} is invalid"
            raise InputError(problem, where=f"{file}:{number}")
        if not token:  # a placeholder for an id that no text is encoded to
            continue
        ranks[token] = id
    if len(set(ranks.values())) < len(ranks):
        raise InputError("two tokens have the same id", where=file)
    return ranks


def representation(tokenizer_json: Mapping[str, Any]) -> tuple[str, dict[bytes, int]]:
    """Return the split pattern and the id of each token of a parsed tokenizer.json, without its special tokens.

    Raises `InputError` if tiktoken would produce different ids.
    """
    pattern, model = byte_level_pattern(tokenizer_json), tokenizer_json["model"]
    if model["type"] != "BPE" or (tokenizer_json.get("decoder") or {}).get("type") != "ByteLevel" or model["byte_fallback"]:
        raise InputError("only byte-level BPE tokenizers can be represented", hint="use kind: bpe with alphabet: bytes")
    if pattern is None:
        raise InputError("the text must be split into words by a single regular expression")
    if tokenizer_json.get("normalizer") is not None:
        raise InputError("tiktoken does not normalize text")
    if any(not token["special"] for token in tokenizer_json["added_tokens"]):
        raise InputError("tiktoken has no added tokens except special tokens")
    byte_of = unicode_to_bytes()
    special = {token["content"] for token in tokenizer_json["added_tokens"]}
    vocabulary = {token: id for token, id in model["vocab"].items() if token not in special}
    if not all(character in byte_of for token in vocabulary for character in token):
        raise InputError("a token is not a sequence of bytes")
    ranks = {bytes(byte_of[character] for character in token): id for token, id in vocabulary.items()}
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise InputError("not every byte is a token")
    pairs = [tuple(merge if isinstance(merge, list) else merge.split(" ")) for merge in model["merges"]]
    if model["ignore_merges"]:
        merges = [tuple(bytes(byte_of[character] for character in part) for part in pair) for pair in pairs]
        if merges != find_merges(ranks)[0]:
            raise InputError("the merges are not in the order of the ids, which is the order that tiktoken uses")
        return pattern, ranks
    merged_ids = [vocabulary.get("".join(pair), -1) for pair in pairs]
    if any(after <= before for before, after in pairwise([255, *merged_ids])) or len(ranks) != len(merged_ids) + 256:
        raise InputError("the ids of the tokens are not in the order of the merges, which is the order that tiktoken uses")
    return pattern, ranks


def write(file: Path, ranks: Mapping[bytes, int]) -> None:
    """Write a rank file, lowest id first."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    atomic_write_text(file, "".join(f"{base64.b64encode(token).decode()} {id}\n" for token, id in ordered))
