"""What went wrong, where, and what to do about it: the errors every room raises for people.

An `InputError` means the user can fix it (exit code 2), a `WorkError` that the work itself failed (exit code 1). The
command line shows their one line, never a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TinylmError(Exception):
    """A message for people: `where` names the file, line or option; `hint` says what to do."""

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
    """What was asked for is wrong: a path, an option, a recipe, a text. Exit code 2."""

    exit_code = 2


class WorkError(TinylmError):
    """The request was fine and the work failed: a full disk, a diverging loss. Exit code 1."""

    exit_code = 1


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A hint naming the known word nearest to `word`, or None when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else None


def need_extra(extra: str, purpose: str) -> InputError:
    """The error for a missing optional dependency, with the command that installs it."""
    return InputError(f'{purpose} needs an extra package: pip install "tinylm[{extra}]"')
