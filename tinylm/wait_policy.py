"""Control how torch's idle CPU threads wait for work: they keep their cores busy (spin) or soon release them (sleep).

Between two parallel regions, a thread of libgomp (the OpenMP runtime in torch's Linux packages) spins for about 3 ms before it
sleeps. On an idle machine, this saves the time that waking the thread would take. On a busy machine, the spinning thread takes the
core away from the thread that it is waiting for, and training becomes several times slower (`benchmarks/busy_machine.py`). The
policy does not affect results.

The policy depends on the measured load. Environment variables that the user has set take precedence: OMP_WAIT_POLICY,
GOMP_SPINCOUNT, KMP_BLOCKTIME and KMP_LIBRARY.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Literal

import torch

from tinylm.cpu_load import MIN_CPU_SHARE, available_cores, cpu_share

Policy = Literal["spin", "sleep"]
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Environment variables for setting the policy. The OpenMP runtimes read them when they are loaded."""
_SPIN_MILLISECONDS = 200
"""The default of KMP_BLOCKTIME."""


class WaitPolicy:
    """Sets the policy of this process. `spin` is the default in every OpenMP runtime."""

    def __init__(self) -> None:
        self.current: Policy = "spin"
        self._teams: list[_IdleTeam] = []

    def choose(self) -> Policy:
        """Measure the load for 0.06 s, set the policy that suits it, and return the policy.

        With a single thread, or if the user has set a policy, nothing is measured and the policy is `spin`.
        """
        threads = torch.get_num_threads()
        if threads > 1 and not set_by_user():
            self.set("sleep" if cpu_share(threads) < MIN_CPU_SHARE else "spin")
        elif self.current != "spin":
            self.set("spin")
        return self.current

    def set(self, policy: Policy) -> None:
        set_blocktime = _kmp_set_blocktime()
        if set_blocktime is not None:  # LLVM's or Intel's runtime
            set_blocktime(0 if policy == "sleep" else _SPIN_MILLISECONDS)
        elif policy == "spin":
            while self._teams:
                self._teams.pop().close()
        elif not self._teams:
            self._teams = _exceed_cores()
        self.current = policy


def set_by_user() -> bool:
    """Whether an environment variable sets the policy."""
    return any(os.environ.get(name) for name in VARIABLES)


def _exceed_cores() -> list[_IdleTeam]:
    """Start idle teams until libgomp manages more threads than there are cores, and return the teams.

    According to its manual (GOMP_SPINCOUNT), libgomp then spins for at most 100 iterations instead of 300,000. This is the only way
    to change its policy after it has been loaded.
    """
    threads = torch.get_num_threads()
    count = (available_cores() - threads) // max(1, threads - 1) + 1
    return [_IdleTeam() for _ in range(count)]


class _IdleTeam:
    """A team of sleeping OpenMP threads. It exists as long as the Python thread that started it."""

    def __init__(self) -> None:
        started = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True, name="idle OpenMP team")
        self._thread.start()
        started.wait()

    def _run(self, started: threading.Event) -> None:
        torch.zeros(1 << 15, torch.get_num_threads()).add_(1)  # large enough for one chunk per thread
        started.set()
        self._closed.wait()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()


def _kmp_set_blocktime() -> ctypes._CFuncPtr | None:  # type: ignore[name-defined]  # a class without a public name
    """Return the function in LLVM's and Intel's runtimes that sets how long threads spin, or None if neither is loaded."""
    try:
        return getattr(ctypes.CDLL(None), "kmp_set_blocktime", None)
    except (OSError, TypeError):  # on Windows, None is not a valid library name
        return None


WAIT_POLICY = WaitPolicy()
"""The policy of this process."""
