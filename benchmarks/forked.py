"""Run Python commands in forks of this process, which has already imported torch and tinylm. Imports then take no time.

`gpu_session.sh` uses it for dry runs. (A process that has used a GPU cannot be forked.) A request on standard input consists of
fields that end with a null byte: the number of arguments, the time limit in seconds, the log file, and the arguments of `python`,
which are `-c CODE`, `-m MODULE` or a script, followed by its own arguments. The answer on standard output is a line with the exit
code, which is 124 after a timeout.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress

import torch._dynamo  # noqa: F401

import tinylm.generation.engine
import tinylm.pipeline  # noqa: F401


def fields() -> Iterator[str]:
    rest = b""
    while chunk := os.read(0, 1 << 16):
        *complete, rest = (rest + chunk).split(b"\0")
        yield from map(os.fsdecode, complete)


def run_python(arguments: list[str]) -> int:
    """Run `python ARGUMENTS...` in this process and return its exit code."""
    kind, *rest = arguments
    sys.argv = arguments
    try:
        if kind == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(rest[0], {"__name__": "__main__"})
        else:
            sys.path.insert(0, os.path.dirname(kind))
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run_in_fork(arguments: list[str], log: str, limit: float) -> int:
    """Run a command in a fork and in its own process group, with its output in `log`. Return its exit code."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = run_python(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    end, ended, status = time.monotonic() + limit, 0, 0
    while not ended and time.monotonic() < end:
        time.sleep(0.005)
        ended, status = os.waitpid(child, os.WNOHANG)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # also processes that the command has left behind
    if not ended:
        os.waitpid(child, 0)
        return 124
    return os.waitstatus_to_exitcode(status)


def main() -> None:
    requests = fields()
    for count in requests:
        limit, log = next(requests), next(requests)
        arguments = [next(requests) for _ in range(int(count))]
        print(run_in_fork(arguments, log, float(limit)), flush=True)


if __name__ == "__main__":
    main()
