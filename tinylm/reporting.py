"""How the library tells people what it is doing. The command line shows it; a notebook can ignore it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Advance = Callable[[int], None]


class Reporter:
    """Says nothing. Subclass it to show notes, warnings and the progress of long work."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def warn(self, text: str) -> None:
        """Something the user may want to change."""

    @contextmanager
    def progress(self, label: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Work of `total` units; the yielded function is told how many are done so far."""
        yield lambda done: None


@dataclass
class CollectingReporter(Reporter):
    """Keeps notes and warnings in lists."""

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


SILENT = Reporter()
