"""`tinylm` as a user runs it, off a terminal, and what an answer of it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-m", "tinylm")


def environment() -> dict[str, str]:
    return {**os.environ, "NO_COLOR": "1", "COLUMNS": "100"}


def tinylm(*arguments: str | Path, cwd: Path | None = None, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run in a process of its own, to the end."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, timeout=300, env=environment(), check=False)


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.out)


Here = Callable[..., Answer]


def complaint(answer: Answer, code: int = 2) -> str:
    """The one line on stderr of a command that failed as it should: nothing on stdout, no traceback."""
    assert answer.code == code, answer
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert "a mistake in tinylm" not in answer.err
    *before, last = answer.err.splitlines()
    assert not any(line.startswith("error:") for line in before)
    assert last.startswith("error: "), answer.err
    return last.removeprefix("error: ")
