"""Run the `tinylm` command in a subprocess without a terminal, and check its output."""

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
    """Run a command in a subprocess and wait for it."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, timeout=600, env=environment(), check=False)


@dataclass(frozen=True)
class CommandResult:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The JSON document on stdout."""
        return json.loads(self.out)


RunCli = Callable[..., CommandResult]


def error_of(result: CommandResult, code: int = 2) -> str:
    """Check that a command failed with exit code `code`, without output or a traceback, and return its error message."""
    assert result.code == code, result
    assert result.out == ""
    assert "Traceback" not in result.err
    assert "a bug in tinylm" not in result.err
    *before, last = result.err.splitlines()
    assert not any(line.startswith("error:") for line in before)
    assert last.startswith("error: "), result.err
    return last.removeprefix("error: ")
