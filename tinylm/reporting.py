"""Report notes, warnings and progress from library code. The command line shows them. By default, they are ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Advance = Callable[[int], None]
"""Called with the number of units completed so far."""


class Reporter:
    """Ignores everything. Override the methods to show notes, warnings and progress."""

    def note(self, text: str) -> None:
        """Report something that does not need action."""

    def warn(self, text: str) -> None:
        """Report a problem that the user may want to fix."""

    @contextmanager
    def progress(self, label: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Report progress toward `total` units (None: unknown). Yields an `Advance`."""
        yield lambda done: None


@dataclass
class CollectingReporter(Reporter):
    """Collects notes and warnings in lists."""

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


SILENT = Reporter()
