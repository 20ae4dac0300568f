"""Detect whether other programs are using this machine's CPU cores. This module does not import torch."""

from __future__ import annotations

import hashlib
import os
import threading
import time

MIN_CPU_SHARE = 0.8
"""The machine counts as busy if a thread runs for less than this fraction of the time. On an idle machine, the fraction is close
to 1. It is about one half for a thread that shares its core with one other process."""
_BUFFER = bytes(1 << 20)


def available_cores() -> int:
    """Return the number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_share(threads: int | None = None, seconds: float = 0.06) -> float:
    """Keep `threads` threads busy (one per core by default), and return the fraction of the time that the slowest one ran.

    The result is about 1 on an idle machine. It is lower if other programs use the cores or if a container limits the CPU time.
    """
    shares: list[float] = []

    def run() -> None:
        start, cpu_start = time.perf_counter(), time.thread_time()
        while time.perf_counter() - start < seconds:
            hashlib.sha256(_BUFFER)  # releases the GIL
        shares.append((time.thread_time() - cpu_start) / (time.perf_counter() - start))

    workers = [threading.Thread(target=run) for _ in range(threads or available_cores())]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return min(1.0, *shares)
