"""The builtin text has the expected content, is reproducible, and is created without importing the documented modules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinylm.errors import InputError
from tinylm.text import builtin
from tinylm.text.sources import Corpus
from tinylm.text.split import scan


def test_python_docs_contain_the_language_reference_and_docstrings() -> None:
    with Corpus(["builtin:python-docs"]) as corpus:
        scanned = scan(corpus.pieces())
        text = "".join(piece.text for piece in corpus.pieces())
    assert scanned.documents > 200
    assert scanned.characters > 1_000_000
    assert 'The "for" statement' in text
    assert json.dumps.__doc__ is not None
    assert json.dumps.__doc__.strip().splitlines()[0] in text


def test_a_builtin_text_is_created_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    created = []

    def documents() -> Iterator[tuple[str, str]]:
        created.append("python-docs")
        yield "title", "text"

    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path))
    monkeypatch.setitem(builtin.BUILTINS, "python-docs", documents)
    path = builtin.path_of("python-docs")
    assert json.loads(path.read_text()) == {"title": "title", "text": "text"}
    assert builtin.path_of("python-docs") == path
    assert created == ["python-docs"]


def test_python_docs_are_reproducible_and_created_without_importing_the_documented_modules(tmp_path: Path) -> None:
    program = """
import sys
from tinylm.text import builtin
print(builtin.path_of("python-docs"))
print(sorted({"antigravity", "this", "tkinter", "turtle", "idlelib", "lib2to3"} & set(sys.modules)))
"""
    environment = {**os.environ, "TINYLM_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    path, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert Path(path).is_relative_to(tmp_path)
    assert Path(path).read_bytes() == builtin.path_of("python-docs").read_bytes()


def test_each_docstring_occurs_once() -> None:
    records = [json.loads(line) for line in builtin.path_of("python-docs").read_text(encoding="utf-8").splitlines()]
    titles = [record["title"] for record in records]
    assert len(set(titles)) == len(titles)
    assert all(record["text"].strip() for record in records)
    modules = [record["text"] for record in records if record["title"].endswith(".py")]
    assert len(set(modules)) == len(modules) > 100


def test_the_error_for_an_unknown_builtin_lists_the_available_names() -> None:
    with pytest.raises(
        InputError, match=r"builtin:pyhton-docs: unknown builtin text; available: python-docs, .* \(did you mean python-docs\?\)"
    ):
        builtin.path_of("pyhton-docs")
