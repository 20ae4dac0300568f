"""The cache of compiled constraints and of the errors of expressions that cannot be compiled."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc

import pytest

from tinylm.errors import InputError
from tinylm.generation.constraint import Constraint
from tinylm.tokenizer import Tokenizer

constraints = pytest.importorskip("tinylm.serving.constraints")


def _compile(compiler: object, expressions: list[str]) -> None:
    async def compile_all() -> None:
        for expression in expressions:
            await compiler.compile(expression, None, time.monotonic() + 60)  # type: ignore[attr-defined]

    asyncio.run(compile_all())


def test_the_same_expression_is_compiled_once(tokenizer: Tokenizer) -> None:
    compiler = constraints.ConstraintCompiler(tokenizer)

    async def compile_twice() -> list[object]:
        return [await compiler.compile("[0-9]+", None, time.monotonic() + 60) for _ in range(2)]

    first, second = asyncio.run(compile_twice())
    assert first is second


def test_a_cached_error_does_not_keep_the_memory_of_its_compilation(tokenizer: Tokenizer) -> None:
    compiler = constraints.ConstraintCompiler(tokenizer)

    def reject(expression: str) -> None:
        for _ in range(2):  # the second error comes from the cache
            with pytest.raises(InputError, match="anchors inside the expression are not supported"):
                _compile(compiler, [expression])

    reject(r"a{500}\ba")
    tracemalloc.start()
    try:
        for number in range(20):
            reject(rf"a{{500}}\b{number}")
        gc.collect()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak > 100_000
    assert held < 100_000


def test_constraints_leave_the_cache_before_it_exceeds_its_size(tokenizer: Tokenizer) -> None:
    largest = Constraint("[a-f]{30}9", tokenizer).nbytes
    compiler = constraints.ConstraintCompiler(tokenizer, cache_bytes=3 * largest)
    for number in range(5):
        _compile(compiler, [f"[a-f]{{30}}{number}"])
        assert compiler.cached_bytes == min(number + 1, 3) * largest
