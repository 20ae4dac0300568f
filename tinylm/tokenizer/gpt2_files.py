"""Find the tokenizer file in a folder, and read byte-level BPE tokenizers in GPT-2's format (vocab.json and merges.txt)."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from tinylm.errors import InputError

VOCABULARY, MERGES = "vocab.json", "merges.txt"


def tokenizer_file(folder: Path) -> Path:
    """Return the tokenizer file in a folder. Raises `InputError` if there is none in a supported format."""
    if (folder / "tokenizer.json").exists():
        return folder / "tokenizer.json"
    if (folder / VOCABULARY).exists() and (folder / MERGES).exists():
        return folder / VOCABULARY
    others = [*sorted(folder.glob("*.model")), *sorted(folder.glob("*.tiktoken"))]
    if len(others) == 1:
        return others[0]
    if others:
        names = f"{others[0].name} and {others[1].name}"
        raise InputError(f"contains several tokenizers, such as {names}", where=str(folder), hint="pass the path to one of them")
    raise InputError(
        f"found neither tokenizer.json nor {VOCABULARY} and {MERGES}", where=str(folder), hint="pass the path to a tokenizer.json"
    )


def read(folder: Path, end_of_text: str) -> tokenizers.Tokenizer:
    """Read vocab.json and merges.txt. `end_of_text` becomes a control token if the vocabulary contains it.

    Raises `InputError` if a file is missing or damaged.
    """
    for name in (VOCABULARY, MERGES):
        if not (folder / name).is_file():
            raise InputError("no such file", where=str(folder / name), hint=f"both {VOCABULARY} and {MERGES} are required")
    vocabulary = folder / VOCABULARY
    try:
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(folder / MERGES)))
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"not a GPT-2 vocabulary: {error}", where=str(vocabulary)) from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(end_of_text) is not None:
        backend.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    return backend
