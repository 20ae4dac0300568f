"""A tokenizer.json is validated before memory is allocated for it, and errors from the `tokenizers` library are reported."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import COMMAND, environment

from tinylm.errors import InputError, TinylmWarning
from tinylm.tokenizer import Tokenizer

WORDS = {"<unk>": 0, "a": 1, "b": 2}


def _file(folder: Path, **changes: Any) -> Path:
    document = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "<unk>"},
    }
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**document, **changes}))
    return path


def _model(**changes: Any) -> dict[str, Any]:
    return {"model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "<unk>", **changes}}


def _doubling(count: int) -> list[dict[str, Any]]:
    return [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * count


REJECTED = {
    "an id of a billion": (_model(vocab={**WORDS, "c": 10**9}), "the id 1,000,000,000 does not fit a vocabulary of 4 tokens"),
    "the same id for all tokens": (_model(vocab=dict.fromkeys(WORDS, 0)), "have the same id 0"),
    "a missing unknown token": (_model(unk_token="<none>"), "the unknown token '<none>' is not in the vocabulary"),
    "zero-length chunks": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "cannot encode this text"),
    "a growing normalizer": ({"normalizer": {"type": "Sequence", "normalizers": _doubling(30)}}, "64 times longer"),
    "a growing decoder": ({"decoder": {"type": "Sequence", "decoders": _doubling(30)}}, "64 times longer"),
}


@pytest.mark.parametrize(("changes", "problem"), REJECTED.values(), ids=REJECTED)
def test_an_invalid_file_is_rejected(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = _file(tmp_path, **changes)
    with pytest.raises(InputError, match=problem) as error:
        Tokenizer.load(path)
    assert error.value.where == str(path)


def test_the_unchanged_file_is_accepted(tmp_path: Path) -> None:
    assert Tokenizer.load(_file(tmp_path)).encode("a b c") == [1, 2, 0]


def _bpe(**changes: Any) -> dict[str, Any]:
    vocabulary = {"a": 0, "b": 1, "ab": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(255)}}
    return {"pre_tokenizer": None, "model": {"type": "BPE", "vocab": vocabulary, "merges": ["a b"], **changes}}


@pytest.mark.parametrize("changes", [{}, {"unk_token": None}, {"unk_token": None, "byte_fallback": False}])
def test_a_bpe_tokenizer_that_drops_characters_is_rejected(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no unknown token, so it would drop characters"):
        Tokenizer.load(_file(tmp_path, **_bpe(**changes)))


def test_a_bpe_tokenizer_that_drops_some_bytes_is_loaded_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(TinylmWarning, match="drops 1 of the 256 bytes"):
        Tokenizer.load(_file(tmp_path, **_bpe(byte_fallback=True)))
    for byte_level in (
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True}},
    ):
        with pytest.warns(TinylmWarning, match="drops 254 of the 256 bytes"):
            Tokenizer.load(_file(tmp_path, **{**_bpe(), **byte_level}))


def test_a_panic_in_the_tokenizers_library_does_not_print_a_backtrace(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    path = _file(tmp_path, pre_tokenizer=split)
    variables = {**environment(), "RUST_BACKTRACE": "full"}
    command = [*COMMAND, "tokenize", "encode", "-t", str(path), "-"]
    result = subprocess.run(command, input=b"x" * 60, capture_output=True, env=variables, check=False)
    assert result.returncode == 2
    assert b"backtrace:" not in result.stderr
    assert result.stderr.decode().splitlines()[-1].startswith("error: the tokenizer cannot encode this text")


@pytest.mark.parametrize("encode", [lambda t, text: t.encode(text), lambda t, text: t.encoder.encode(text.encode())])
def test_a_pattern_that_backtracks_for_too_long_is_an_error(encode: Callable[[Tokenizer, str], object], tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    tokenizer = Tokenizer.load(_file(tmp_path, pre_tokenizer=split))
    with pytest.raises(InputError, match="cannot encode this text"):
        encode(tokenizer, "x" * 60)
