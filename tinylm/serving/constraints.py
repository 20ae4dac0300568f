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
_MAX_PENDING = 64
_MAX_SECONDS = 5.0
"""Maximum compilation time. On an idle machine, an expression within the limits of `CompileBudget` takes a fraction of this."""
_PAUSE_SECONDS = 0.001
_Key = tuple[str | None, tuple[str, ...] | None]


class ConstraintCompiler:
    """Compiles `regex` and `choice` for a tokenizer. Caches recent results and errors.

    All compilations share one thread, so that slow compilations delay only other compilations.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._threads = BackgroundThreads(1, "tinylm-constraints")
        self._cache: OrderedDict[_Key, Constraint | InputError] = OrderedDict()

    @property
    def pending(self) -> int:
        """Number of constraints that are compiling or waiting."""
        return self._threads.pending

    async def compile(self, regex: str | None, choice: list[str] | None, deadline: float) -> Constraint:
        """Return the constraint.

        Raises `InputError` if it is invalid, `CompileTimeout` if it is not ready in time, or `QueueFull` if too many are waiting.
        """
        key = (regex, None if choice is None else tuple(choice))
        compiled = self._cache.get(key) or await self._compile_in_background(key, deadline)
        self._cache[key] = compiled
        self._cache.move_to_end(key)
        if len(self._cache) > _CACHE_SIZE:
            self._cache.popitem(last=False)
        if isinstance(compiled, InputError):
            raise compiled
        return compiled

    async def _compile_in_background(self, key: _Key, deadline: float) -> Constraint | InputError:
        if self._threads.pending >= _MAX_PENDING:
            raise QueueFull
        try:
            return await self._threads.run(partial(self._compile, key, deadline), deadline)
        except asyncio.TimeoutError:
            raise CompileTimeout("the expression was not compiled in time", where="--regex") from None
        except CompileTimeout:
            raise
        except InputError as error:
            return error

    def _compile(self, key: _Key, deadline: float) -> Constraint:
        regex, choice = key
        name = "--choice" if regex is None else "--regex"
        budget = CompileBudget(name, min(deadline, time.monotonic() + _MAX_SECONDS), _PAUSE_SECONDS)
        if regex is not None:
            return Constraint(regex, self._tokenizer, budget=budget)
        if sum(map(len, choice or ())) > MAX_PATTERN_LENGTH:
            raise InputError(f"the choices must have at most {MAX_PATTERN_LENGTH} characters in total", where=name)
        return Constraint.choices(choice or (), self._tokenizer, budget=budget)
