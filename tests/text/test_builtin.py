"""The text that every Python has is real, the same each time, and made without importing what it documents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinylm.errors import InputError
from tinylm.text import builtin
from tinylm.text.sources import Corpus
from tinylm.text.split import scan


def test_python_docs_hold_the_language_reference_and_docstrings() -> None:
    with Corpus(["builtin:python-docs"]) as corpus:
        found = scan(corpus.pieces())
        text = "".join(piece.text for piece in corpus.pieces())
    assert found.documents > 200
    assert found.characters > 1_000_000
    assert 'The "for" statement' in text
    assert json.dumps.__doc__ is not None
    assert json.dumps.__doc__.strip().splitlines()[0] in text


def test_python_docs_are_made_once() -> None:
    path = builtin.path_of("python-docs")
    made = path.stat().st_mtime_ns
    assert builtin.path_of("python-docs") == path
    assert path.stat().st_mtime_ns == made


def test_python_docs_are_the_same_each_time_and_made_without_importing_what_they_document(tmp_path: Path) -> None:
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


def test_each_docstring_stands_once() -> None:
    records = [json.loads(line) for line in builtin.path_of("python-docs").read_text(encoding="utf-8").splitlines()]
    titles = [record["title"] for record in records]
    assert len(set(titles)) == len(titles)
    assert all(record["text"].strip() for record in records)
    modules = [record["text"] for record in records if record["title"].endswith(".py")]
    assert len(set(modules)) == len(modules) > 100


def test_an_unknown_builtin_lists_the_known_ones() -> None:
    with pytest.raises(
        InputError, match=r"builtin:pyhton-docs: no such builtin text \(python-docs\) \(did you mean python-docs\?\)"
    ):
        builtin.path_of("pyhton-docs")
