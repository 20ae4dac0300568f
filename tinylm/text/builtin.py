"""Texts that come with every Python installation (`builtin:NAME`), so that a first model can be trained offline.

`python-docs` contains one document for each language reference topic in pydoc, followed by one document for each standard library
module with its docstrings. Both are sorted, and repeated docstrings are dropped. Modules are parsed with `ast` and never imported.
The text depends only on the Python version.

`python-docstrings` contains one labeled document for each docstring of the larger packages. The label is the name of the package.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from tinylm.errors import InputError, did_you_mean
from tinylm.paths import cache_folder, cached_file

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
_FORMAT = 1
"""Version of the cached files. Increase it when their contents change."""


def path_of(name: str) -> Path:
    """Return the path of the cached .jsonl file for `builtin:NAME`. Raises `InputError` if there is no such text."""
    if name not in BUILTINS:
        raise InputError(
            f"unknown builtin text; available: {', '.join(BUILTINS)}", where=f"builtin:{name}", hint=did_you_mean(name, BUILTINS)
        )
    version = ".".join(map(str, sys.version_info[:3]))

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for title, text in BUILTINS[name]():
                file.write(json.dumps({_TITLE_FIELDS.get(name, "title"): title, "text": text}) + "\n")

    return cached_file(cache_folder("builtin") / f"{name}-{sys.implementation.name}-{version}-{_FORMAT}.jsonl", write)


def python_docs() -> Iterator[tuple[str, str]]:
    """Yield (title, text) for each document of `builtin:python-docs`."""
    for title, text in sorted(_topics().items()):
        yield title, text.strip() + "\n"
    seen: set[str] = set()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _modules(root):
        new = list(dict.fromkeys(text for text in _docstrings(path) if text not in seen))
        seen.update(new)
        if new:
            yield path.relative_to(root).as_posix(), "\n\n".join(new) + "\n"


def _topics() -> dict[str, str]:
    """Return the dictionary literal in pydoc_data/topics.py."""
    spec = importlib.util.find_spec("pydoc_data.topics")
    if spec is None or spec.origin is None:
        raise InputError(
            "this Python installation has no pydoc_data", where="builtin:python-docs", hint="use a text file of your own"
        )
    tree = ast.parse(Path(spec.origin).read_bytes())
    topics: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            topics |= ast.literal_eval(node)
            break
    return topics


def _modules(root: Path) -> list[Path]:
    modules = [path for path in root.rglob("*.py") if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)]
    return sorted(modules, key=lambda path: path.relative_to(root).as_posix())


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a module in file order."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return  # for example, the Python 2 files in lib2to3
    nodes = [node for node in _statements(tree) if isinstance(node, _DOCUMENTED)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        text = ast.get_docstring(node)
        if text and text.strip():
            yield text.strip()


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the module and all statements in it, breadth-first. Unlike `ast.walk`, skip the many nodes inside expressions."""
    pending = deque[ast.AST]([tree])
    while pending:
        node = pending.popleft()
        yield node
        pending.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, _STATEMENTS))


def python_docstrings() -> Iterator[tuple[str, str]]:
    """Yield (label, text) for each document of `builtin:python-docstrings`: a package or module, and one of its docstrings."""
    root = Path(sysconfig.get_paths()["stdlib"])
    by_package: dict[str, list[str]] = {}
    seen: set[str] = set()
    for path in _modules(root):
        package = path.relative_to(root).parts[0].removesuffix(".py")
        for text in _docstrings(path):
            if text not in seen and len(text) >= _SHORTEST_DOCSTRING:
                by_package.setdefault(package, []).append(text)
            seen.add(text)
    for package, texts in sorted(by_package.items()):
        if len(texts) >= _FEWEST_DOCSTRINGS:
            yield from ((package, text) for text in texts)


_SHORTEST_DOCSTRING = 30
_FEWEST_DOCSTRINGS = 60
"""Packages with fewer docstrings are skipped."""
_TITLE_FIELDS = {"python-docstrings": "label"}
"""The name of the first record field in each built-in text, if it is not `title`."""
BUILTINS: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "python-docs": python_docs,
    "python-docstrings": python_docstrings,
}
