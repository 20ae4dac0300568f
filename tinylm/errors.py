"""Errors reported to the user: what is wrong, where, and what to do about it.

The command line prints each error on one line, without a traceback, and exits with `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TinylmError(Exception):
    """Base class of errors, printed as `where: message (hint)`. `where` is a file, line or option; `hint` says what to do."""

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.message = message
        self.where = where
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text} ({self.hint})" if self.hint else text


class InputError(TinylmError):
    """An invalid path, option, recipe or text. Exit code 2."""

    exit_code = 2


class WorkError(TinylmError):
    """A valid request that failed, for example because of a full disk or a diverging loss. Exit code 1."""

    exit_code = 1


class TinylmWarning(Warning):
    """A warning for the user, issued with `warnings.warn`. The command line prints it on one line."""


_OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED", "bad_alloc", "can't start new thread")
"""Excerpts from error messages of libraries that do not raise `MemoryError`. A thread cannot start without memory for its stack."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory ran out. Not all libraries raise `MemoryError`, so this also checks the message."""
    return isinstance(error, MemoryError) or any(message in str(error) for message in _OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return a hint that suggests the known word most similar to `word`, ignoring case, or None if no word is similar."""
    by_lower_case = {name.lower(): name for name in known}
    similar = difflib.get_close_matches(word.lower(), by_lower_case, n=1, cutoff=0.6)
    return f"did you mean {by_lower_case[similar[0]]}?" if similar else None


def missing_extra(extra: str, purpose: str, *, where: str | None = None) -> InputError:
    """Return the error for an optional dependency that is not installed, with the command that installs it."""
    return InputError(f'{purpose} needs an extra package: pip install "tinylm[{extra}]"', where=where)


_FILESYSTEM_EXTRAS = {"hf": "hf", "http": "remote", "https": "remote", "s3": "s3", "s3a": "s3"}


def missing_filesystem(url: str, error: ImportError, *, where: str | None = None) -> InputError:
    """Return the error for a URL whose protocol needs a package that is not installed.

    `error` is fsspec's exception. Its message names the package, which is shown for a protocol without an extra.
    """
    protocol = url.partition("://")[0].rpartition("::")[2]
    if protocol in _FILESYSTEM_EXTRAS:
        return missing_extra(_FILESYSTEM_EXTRAS[protocol], f"opening {protocol}:// URLs", where=where)
    return InputError(f"cannot open {url}: {error}", where=where)
