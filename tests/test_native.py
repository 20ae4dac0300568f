"""Machine code is compiled once, saved, and loaded in other processes without numba."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinylm.native import NativeFunction

RECORD = np.dtype([("x", np.float64), ("square", np.float64)])
SOURCE = """
from numba import carray

def square(records):
    record = carray(records, 1)[0]
    record.square = record.x * record.x
"""
LOAD_AND_CALL = """
import ctypes, sys
import numpy as np
from tinylm.native import NativeFunction
record = np.array([(-3.0, 0.0)], dtype=[("x", np.float64), ("square", np.float64)])
ctypes.CFUNCTYPE(None, ctypes.c_void_p)(NativeFunction("squares", "square", record.dtype).address)(record.ctypes.data)
print(record["square"][0], "numba" in sys.modules)
"""


def _function() -> NativeFunction:
    return NativeFunction("squares", "square", RECORD)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module with a function to compile."""
    file = tmp_path / "squares.py"
    file.write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "squares", raising=False)
    (tmp_path / "__pycache__").mkdir()
    return file


def test_saved_code_is_loaded_without_numba_until_the_source_changes(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _function().is_compiled()
    record = np.array([(1.5, 0.0)], dtype=RECORD)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_function().address)(record.ctypes.data)
    assert record["square"][0] == 1.5**2
    assert _function().is_compiled()
    monkeypatch.setenv("PYTHONPATH", str(module.parent))
    loaded = subprocess.run([sys.executable, "-c", LOAD_AND_CALL], capture_output=True, text=True, check=True)
    assert loaded.stdout == "9.0 False\n"
    module.write_text(SOURCE.replace("record.x * record.x", "record.x ** 2"))
    assert not _function().is_compiled()


def test_code_is_saved_in_the_cache_folder_if_the_module_has_no_writable_one(
    module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (module.parent / "__pycache__").rmdir()
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    _function().compile()
    assert _function().is_compiled()
    assert len(list((tmp_path / "cache" / "compiled").glob("squares.square-*.o"))) == 1
