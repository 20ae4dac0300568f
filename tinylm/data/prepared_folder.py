"""Use a folder that `tinylm prepare` wrote as the training text of a recipe.

The folder contains the tokens of the training and held-out text, so the recipe must name the same tokenizer and cannot change how
the text is read or split.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tinylm.errors import InputError
from tinylm.file_kinds import is_prepared_text
from tinylm.recipe.schema import BpeTokenizer, DataSection, FileTokenizer, HeldoutShare, HeldoutSources, TokenizerSection
from tinylm.tokenizer import Tokenizer

_FIXED_KEYS = ("test", "field", "template", "errors")


def find(data: DataSection) -> Path | None:
    """Return the folder if `data.train` is one that `tinylm prepare` wrote, or None.

    Raises `InputError` if the section sets a key that cannot have an effect on such a folder. `data.heldout` may be left out, or
    repeat how the text was prepared.
    """
    source = data.train[0]
    if len(data.train) != 1 or not isinstance(source, str) or not is_prepared_text(os.path.expanduser(source)):
        return None
    folder = Path(os.path.expanduser(source))
    changed = [key for key in _FIXED_KEYS if getattr(data, key) != DataSection.model_fields[key].default]
    if data.heldout not in (DataSection.model_fields["heldout"].default, _heldout_section(read_manifest(folder))):
        changed.append("heldout")
    for key in changed:
        hint = "remove the key, or run `tinylm prepare` with the option for it"
        raise InputError(f"cannot be changed for {source}, a prepared text", where=f"data.{key}", hint=hint)
    return folder


def _heldout_section(manifest: dict[str, Any]) -> HeldoutShare | HeldoutSources:
    """Return the section `data.heldout` that holds out the same documents from the text itself."""
    if manifest["heldout"]:
        return HeldoutSources(sources=tuple(manifest["heldout"]))
    return HeldoutShare(share=manifest["settings"]["heldout_share"], by="document")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a prepared text. Raises `InputError` if it is damaged."""
    file = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        tokenizer = manifest["tokenizer"]
        strings = (manifest["fingerprint"], tokenizer["fingerprint"], tokenizer["kind"])
        if not all(isinstance(value, str) for value in strings) or not isinstance(tokenizer["vocab_size"], int):
            raise ValueError("a value has the wrong type")
        if "learned" not in tokenizer:
            raise KeyError("learned")
        _heldout_section(manifest)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"the manifest is damaged: {error!r}", where=str(file)) from None
    return manifest


def learned_settings(section: TokenizerSection) -> dict[str, Any] | None:
    """Return the settings of a tokenizer that is learned from the text, as in the manifest, or None for a file."""
    if isinstance(section, FileTokenizer):
        return None
    settings: dict[str, Any] = json.loads(json.dumps(section.model_dump(exclude={"allow_smaller"})))
    return settings


def load_tokenizer(folder: Path, section: TokenizerSection) -> Tokenizer:
    """Load the tokenizer of a prepared text. Raises `InputError` if the recipe's tokenizer is another one."""
    listed = read_manifest(folder)["tokenizer"]
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.fingerprint != listed["fingerprint"]:
        raise InputError("the tokenizer has changed since the text was prepared", where=str(folder / "tokenizer.json"))
    hint = f"set `tokenizer: {{path: {folder / 'tokenizer.json'}}}`, or prepare the text with the recipe's tokenizer"
    name = f"{listed['kind']}, {listed['vocab_size']:,} tokens"
    if isinstance(section, FileTokenizer):
        if Tokenizer.load(section.path).fingerprint != tokenizer.fingerprint:
            raise InputError(f"not the tokenizer of {folder} ({name})", where="tokenizer.path", hint=hint)
        return tokenizer
    if isinstance(section, BpeTokenizer) and section.dropout:
        hint = "remove the key, or train on the text itself"
        raise InputError(f"{folder} contains tokens that were encoded without dropout", where="tokenizer.dropout", hint=hint)
    if learned_settings(section) != listed["learned"]:
        raise InputError(f"{folder} was encoded with another tokenizer ({name})", where="tokenizer", hint=hint)
    return tokenizer
