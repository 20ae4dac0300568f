"""Compile request constraints in a background thread, with a cache and a deadline for each request."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from functools import partial

from tinylm.errors import InputError
from tinylm.generation.automaton import MAX_PATTERN_LENGTH, CompileBudget, CompileTimeout
from tinylm.generation.constraint import Constraint
from tinylm.serving.background import BackgroundThreads
from tinylm.serving.worker import QueueFull
from tinylm.tokenizer import Tokenizer

_CACHE_SIZE = 64
_CACHE_BYTES = 64_000_000
_MAX_PENDING = 64
_MAX_SECONDS = 5.0
"""Maximum compilation time. On an idle machine, an expression within the limits of `CompileBudget` takes a fraction of this."""
_PAUSE = 2.0
_Key = tuple[str | None, tuple[str, ...] | None]


class ConstraintCompiler:
    """Compiles `regex` and `choice` for a tokenizer. Caches recent results and errors.

    All compilations share one thread, so that slow compilations delay only other compilations.
    """

    def __init__(self, tokenizer: Tokenizer, cache_bytes: int = _CACHE_BYTES) -> None:
        self._tokenizer, self._cache_bytes = tokenizer, cache_bytes
        self._threads = BackgroundThreads(1, "tinylm-constraints")
        self._cache: OrderedDict[_Key, Constraint | InputError] = OrderedDict()

    @property
    def pending(self) -> int:
        """Number of constraints that are compiling or waiting."""
        return self._threads.pending

    @property
    def cached_bytes(self) -> int:
        """Size of the cached constraints."""
        return sum(compiled.nbytes for compiled in self._cache.values() if isinstance(compiled, Constraint))

    async def compile(self, regex: str | None, choice: list[str] | None, deadline: float) -> Constraint:
        """Return the constraint.

        Raises `InputError` if it is invalid, `CompileTimeout` if it is not ready in time, or `QueueFull` if too many are waiting.
        """
        key = (regex, None if choice is None else tuple(choice))
        compiled = self._cache.get(key) or await self._compile_in_background(key, deadline)
        if isinstance(compiled, CompileTimeout):
            raise compiled
        self._cache[key] = compiled
        self._cache.move_to_end(key)
        while len(self._cache) > _CACHE_SIZE or self.cached_bytes > self._cache_bytes:
            self._cache.popitem(last=False)
        if isinstance(compiled, InputError):
            raise _without_traceback(compiled)
        return compiled

    async def _compile_in_background(self, key: _Key, deadline: float) -> Constraint | InputError:
        if self._threads.pending >= _MAX_PENDING:
            raise QueueFull
        try:
            return await self._threads.run(partial(self._compile_or_error, key, deadline), deadline)
        except asyncio.TimeoutError:
            raise CompileTimeout("the expression was not compiled in time", where="--regex") from None

    def _compile_or_error(self, key: _Key, deadline: float) -> Constraint | InputError:
        try:
            return self._compile(key, deadline)
        except InputError as error:
            return _without_traceback(error)

    def _compile(self, key: _Key, deadline: float) -> Constraint:
        regex, choice = key
        name = "--choice" if regex is None else "--regex"
        budget = CompileBudget(name, min(deadline, time.monotonic() + _MAX_SECONDS), _PAUSE)
        if regex is not None:
            return Constraint(regex, self._tokenizer, budget=budget)
        if sum(map(len, choice or ())) > MAX_PATTERN_LENGTH:
            raise InputError(f"the choices must have at most {MAX_PATTERN_LENGTH} characters in total", where=name)
        return Constraint.choices(choice or (), self._tokenizer, budget=budget)


def _without_traceback(error: InputError) -> InputError:
    """Return a copy of an error. The traceback of the original keeps all the memory of the compilation alive."""
    return type(error)(error.message, where=error.where, hint=error.hint)
