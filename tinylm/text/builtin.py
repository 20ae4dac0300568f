"""Text that every Python installation already has, so that the first model needs no download.

`python-docs`: the language reference topics that pydoc ships, then the docstrings of the standard library, one document
per topic and per module, in sorted order, each docstring once. Modules are read with `ast` and never imported. The result
depends on the Python version alone and is kept in the cache.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from tinylm.errors import InputError, did_you_mean
from tinylm.paths import cache_folder, whole_file

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
_REVISION = 1


def path_of(name: str) -> Path:
    """The .jsonl file of builtin `name`, made on first use. Raises `InputError` for an unknown name."""
    if name not in BUILTINS:
        raise InputError(
            f"no such builtin text ({', '.join(BUILTINS)})", where=f"builtin:{name}", hint=did_you_mean(name, BUILTINS)
        )
    version = ".".join(map(str, sys.version_info[:3]))
    path = cache_folder("builtin") / f"{name}-{sys.implementation.name}-{version}-{_REVISION}.jsonl"
    if not path.exists():
        with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for title, text in BUILTINS[name]():
                file.write(json.dumps({"title": title, "text": text}) + "\n")
    return path


def python_docs() -> Iterator[tuple[str, str]]:
    """(title, text) of each document of `builtin:python-docs`."""
    for title, text in sorted(_topics().items()):
        yield title, text.strip() + "\n"
    seen: set[str] = set()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _modules(root):
        fresh = [text for text in _docstrings(path) if text not in seen]
        fresh = list(dict.fromkeys(fresh))
        seen.update(fresh)
        if fresh:
            yield path.relative_to(root).as_posix(), "\n\n".join(fresh) + "\n"


def _topics() -> dict[str, str]:
    """The literal dictionary in pydoc_data/topics.py."""
    spec = importlib.util.find_spec("pydoc_data.topics")
    if spec is None or spec.origin is None:
        raise InputError("this Python has no pydoc_data", where="builtin:python-docs", hint="name a text file of your own")
    tree = ast.parse(Path(spec.origin).read_bytes())
    topics: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            topics |= ast.literal_eval(node)
            break
    return topics


def _modules(root: Path) -> list[Path]:
    found = [path for path in root.rglob("*.py") if not _LEFT_OUT.intersection(path.relative_to(root).parts)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a module, in the order in which they stand in the file."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return  # templates such as lib2to3's hold Python 2
    nodes = [node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        text = ast.get_docstring(node)
        if text and text.strip():
            yield text.strip()


BUILTINS: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {"python-docs": python_docs}
