"""A JSON Lines log of a training run. New lines are appended. Old lines are removed only when a run resumes or rolls back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from tinylm.paths import atomic_write_text


class JsonLinesLog:
    """A file with one JSON object per line. Each object has an integer `step`. Every line is flushed after it is written.

    Use it as a context manager, or call `close`. Every method can raise `OSError`.
    """

    def __init__(self, path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
        """Remove the lines for which `keep` is false, and open `path` for appending."""
        self._path = path
        self._file = self._rewrite_and_open(keep)

    def __enter__(self) -> JsonLinesLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, record: Mapping[str, object]) -> None:
        """Append a record. NaN and infinity, which JSON cannot represent, become null.

        If this raises `OSError` (for example because the disk is full), the line stays buffered, and the next call writes it.
        """
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def records(self) -> list[dict[str, Any]]:
        """Return all records. Lines that are not objects with an integer `step`, such as a partial last line, are skipped."""
        return [record for _, record in self._lines()]

    def remove_unless(self, keep: Callable[[Mapping[str, Any]], bool]) -> None:
        """Remove the lines for which `keep` is false. If this raises `OSError`, the log is unchanged and stays open."""
        self._file.flush()
        replaced, self._file = self._file, self._rewrite_and_open(keep)
        replaced.close()

    def close(self) -> None:
        self._file.close()

    def _rewrite_and_open(self, keep: Callable[[Mapping[str, Any]], bool]) -> IO[str]:
        kept = [line for line, record in self._lines() if keep(record)]
        atomic_write_text(self._path, "".join(line + "\n" for line in kept))
        return open(self._path, "a", encoding="utf-8", newline="\n")

    def _lines(self) -> list[tuple[str, dict[str, Any]]]:
        if not self._path.exists():
            return []
        parsed = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # a partial line, left by a crash
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                parsed.append((line, record))
        return parsed


def _finite(value: Any) -> Any:
    """Replace NaN and infinity with None at every level."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
