"""Error messages identify files from other programs when tinylm expects a model, a tokenizer or vectors."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from tinylm.embedding import formats
from tinylm.errors import InputError
from tinylm.file_kinds import FASTTEXT_MAGIC, identify
from tinylm.interchange.importing import import_model
from tinylm.tokenizer import Tokenizer

CONTENTS = {
    "model.gguf": (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
    "cc.en.bin": (struct.pack("<ii", FASTTEXT_MAGIC, 12), "a fastText model"),
    "words.kv": (pickle.dumps({"vectors": 1}, 4), "a gensim pickle"),
    "model.pkl": (pickle.dumps([1, 2]), "a pickle, which can execute code when it is loaded"),
}
TOKENIZERS = {
    "o200k.tiktoken": (b"IQ== 0\n", "a tiktoken rank file"),
    "spiece.model": (b"\n\x0e\n\x05<unk>", "a sentencepiece model"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_reader_identifies_a_file_from_another_program(name: str, tmp_path: Path) -> None:
    content, expected = CONTENTS[name]
    path = tmp_path / name
    path.write_bytes(content)
    for read in (formats.read, Tokenizer.load, lambda file: import_model(file, tmp_path / "run")):
        with pytest.raises(InputError, match=f"this is {expected}") as error:
            read(path)
        assert error.value.hint


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_is_not_a_model(name: str, tmp_path: Path) -> None:
    content, expected = TOKENIZERS[name]
    (tmp_path / name).write_bytes(content)
    for read in (formats.read, lambda file: import_model(file, tmp_path / "run")):
        with pytest.raises(InputError, match=f"this is {expected}") as error:
            read(tmp_path / name)
        assert "tokenizer.path" in str(error.value.hint)


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    for path in (tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.safetensors"):
        with pytest.raises(InputError, match="this is a PEFT adapter, which is not a whole model"):
            import_model(path, tmp_path / "run")


def test_files_that_are_supported_or_empty_or_missing_are_not_identified(tmp_path: Path) -> None:
    (tmp_path / "words.vec").write_text("1 2\na 1 2\n")
    (tmp_path / "empty").write_bytes(b"")
    assert [identify(tmp_path / name) for name in ("words.vec", "empty", "missing", "")] == [None] * 4


@pytest.mark.parametrize("suffix", [".vec", ".bin", ".txt"])
def test_compressed_vectors_are_read(suffix: str, tmp_path: Path) -> None:
    vectors = formats.Vectors(["cat", "dog"], np.array([[1, 2.5], [-3, 4]], dtype=np.float32))
    formats.write(vectors, tmp_path / f"words{suffix}")
    compressed = tmp_path / f"words{suffix}.gz"
    compressed.write_bytes(gzip.compress((tmp_path / f"words{suffix}").read_bytes()))
    read = formats.read(compressed)
    assert list(read.names) == ["cat", "dog"]
    assert np.array_equal(read.matrix, vectors.matrix)


def test_a_tokenizer_is_found_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found neither tokenizer\.json nor vocab\.json and merges\.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"\n")
    with pytest.raises(InputError, match=r"spiece\.model: not a sentencepiece model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "a.tiktoken").write_bytes(b"\n")
    with pytest.raises(InputError, match=r"contains several tokenizers, such as spiece\.model and a\.tiktoken"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    with pytest.raises(InputError, match="no such file"):
        Tokenizer.load(tmp_path / "vocab.json")
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    for path in (tmp_path, tmp_path / "vocab.json", tmp_path / "merges.txt"):
        tokenizer = Tokenizer.load(path)
        assert tokenizer.encode("abab") == [2, 2]
        assert tokenizer.end_of_text == 3
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
