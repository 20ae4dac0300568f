"""Find code in a network that is not part of tinylm or torch: custom layers, and patched functions and methods.

Such a network cannot be rebuilt from its recipe alone, so the run records the names of this code.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from torch import nn

_PACKAGE = "tinylm.model"
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
"""Methods generated for data classes and named tuples are defined here."""
_COMPILED = "_compiled_call_impl"
"""The attribute that `nn.Module.compile` sets."""


def foreign_code(network: nn.Module) -> list[str]:
    """Return the sorted names of a network's classes, functions and methods that neither tinylm nor torch defines."""
    names = {_name_of(kind) for kind in map(type, network.modules()) if not _is_from(kind.__module__, "tinylm", "torch")}
    for path, module in network.named_modules():
        functions = {name for name, value in vars(module).items() if inspect.isfunction(value)} - {_COMPILED}
        names |= {f"{path or type(network).__name__}.{name}" for name in functions}
    for name, module in list(sys.modules.items()):
        if _is_from(name, _PACKAGE) and getattr(module, "__file__", None):
            names |= set(_patched(module))
    return sorted(names)


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_from(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


@dataclass(frozen=True)
class _Source:
    """What a source file defines at the top level, and what it imports from tinylm."""

    functions: tuple[str, ...]
    classes: dict[str, frozenset[str]]
    """The names of each class's methods."""
    imports: tuple[tuple[str, str, str], ...]
    """For each import: the module, and the name in that module and in this file."""


@functools.cache
def _source(file: str) -> _Source:
    with open(file, encoding="utf-8") as opened:
        body = ast.parse(opened.read()).body
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    imports = [node for node in body if isinstance(node, ast.ImportFrom) and _is_from(node.module or "", "tinylm")]
    return _Source(
        tuple(node.name for node in body if isinstance(node, ast.FunctionDef)),
        {node.name: frozenset(member.name for member in node.body if isinstance(member, ast.FunctionDef)) for node in classes},
        tuple((str(node.module), alias.name, alias.asname or alias.name) for node in imports for alias in node.names),
    )


def _patched(module: ModuleType) -> Iterator[str]:
    """Yield a module's functions, classes, methods and tinylm imports that differ from its source code."""
    source = _source(str(module.__file__))
    for name in source.functions:
        if not _is_defined_in(getattr(module, name, None), module):
            yield f"{module.__name__}.{name}"
    for name, methods in source.classes.items():
        yield from _patched_class(getattr(module, name, None), name, methods, module)
    for imported, original, name in source.imports:
        other = sys.modules.get(imported)
        if other is not None and hasattr(other, original) and getattr(module, name) is not getattr(other, original):
            yield f"{module.__name__}.{name}"


def _patched_class(kind: object, class_name: str, methods: frozenset[str], module: ModuleType) -> Iterator[str]:
    if not isinstance(kind, type) or kind.__module__ != module.__name__:
        yield f"{module.__name__}.{class_name}"
        return
    for name, value in vars(kind).items():
        file = _code_file(value)
        is_generated = name not in methods and (file is None or not os.path.isfile(file) or file.startswith(_STANDARD_LIBRARY))
        if not is_generated and not _is_defined_in(value, module):
            yield f"{module.__name__}.{class_name}.{name}"


def _is_defined_in(value: object, module: ModuleType) -> bool:
    return _code_file(value) == module.__file__


def _code_file(value: object) -> str | None:
    """Return the file that defines a function, after unwrapping decorators, static methods and properties, or None for other
    values."""
    for attribute in ("__func__", "fget", "func", "py_func", "_init_fn"):
        value = getattr(value, attribute, value)
    code = getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None)
    return None if code is None else str(code.co_filename)
