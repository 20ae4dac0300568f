"""Measure whether other programs use this machine's CPU cores. Does not import torch."""

from __future__ import annotations

import hashlib
import os
import threading
import time

MIN_CPU_SHARE = 0.8
"""If a thread has a core for a smaller fraction of the time, the machine counts as busy. On an idle machine, it is close to 1. A
thread that shares its core with one other process has it for about half of the time."""
_BUFFER = bytes(1 << 20)


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_share(threads: int | None = None, seconds: float = 0.06) -> float:
    """Keep `threads` threads busy, by default one per core, and return the fraction of the time for which the slowest one ran.

    It is about 1 on an idle machine. It is lower if other programs use the cores, or if a container limits CPU time.
    """
    shares: list[float] = []

    def run() -> None:
        start, cpu_start = time.perf_counter(), time.thread_time()
        while time.perf_counter() - start < seconds:
            hashlib.sha256(_BUFFER)  # releases the interpreter lock
        shares.append((time.thread_time() - cpu_start) / (time.perf_counter() - start))

    workers = [threading.Thread(target=run) for _ in range(threads or available_cores())]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return min(1.0, *shares)
