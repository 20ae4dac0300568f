"""Recognize other programs' files and folders by their first bytes and names, so that error messages can identify them."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

FASTTEXT_MAGIC = 793712314
"""The first 4 bytes of a fastText .bin model, as a little-endian integer."""


@dataclass(frozen=True)
class FileKind:
    """What a file is, and how to use it with tinylm."""

    name: str
    hint: str


_ADAPTER = FileKind(
    "a PEFT adapter, which is not a whole model",
    "merge it first: `PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(FOLDER)`",
)
_GGUF = FileKind("a GGUF file", "import the Hugging Face folder that it was made from")
_FASTTEXT = FileKind(
    "a fastText model, which contains more than vectors",
    "use the .vec file next to it, or write one with fastText's `print-word-vectors`",
)
_GENSIM = FileKind(
    "a gensim pickle", "convert it in Python: `KeyedVectors.load(FILE).save_word2vec_format('vectors.bin', binary=True)`"
)
_PICKLE = FileKind("a pickle, which can execute code when it is loaded", "save it in another format, such as safetensors")
_TIKTOKEN = FileKind("a tiktoken rank file", "set `tokenizer.path` or --tokenizer to it")
_SENTENCEPIECE = FileKind("a sentencepiece model", "set `tokenizer.path` or --tokenizer to it")


PREPARED_FORMAT = "tinylm-prepared-text"
"""The value of `format` in the manifest.json of a folder that `tinylm prepare` wrote."""


def is_prepared_text(path: str | Path) -> bool:
    """Whether a path is a folder that `tinylm prepare` wrote."""
    file = Path(path, "manifest.json")
    try:
        return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get("format") == PREPARED_FORMAT)
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def identify(path: Path) -> FileKind | None:
    """Return the kind of a file or folder that another program wrote, or None if the kind is not recognized."""
    if path.is_dir():
        return _ADAPTER if (path / "adapter_config.json").exists() and not (path / "config.json").exists() else None
    if not path.is_file():
        return None
    with open(path, "rb") as opened:
        start = opened.read(4096)
    if start.startswith(b"GGUF"):
        return _GGUF
    if len(start) >= 4 and struct.unpack("<i", start[:4])[0] == FASTTEXT_MAGIC:
        return _FASTTEXT
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _GENSIM if b"gensim" in start or path.suffix == ".kv" else _PICKLE
    if path.name.startswith("adapter_model."):
        return _ADAPTER
    if path.suffix == ".tiktoken":
        return _TIKTOKEN
    if path.suffix == ".model":
        return _SENTENCEPIECE
    return None
