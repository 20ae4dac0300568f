"""Compile the code for decoding and sampling in a background process, so that later processes find it on disk.

Compiling takes longer than a few hundred tokens. A short generation therefore runs without compiled code the first time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress

from tinylm.generation.fast_sampling import CHOICE
from tinylm.model.step_records import DECODING_STEP
from tinylm.reporting import Reporter


def compile_in_background(reporter: Reporter) -> None:
    """Start a process with low priority that compiles the code. It continues after this process ends."""
    reporter.note("compiling the decoding step for this CPU in the background (once); later calls use it")
    subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def main() -> None:
    with suppress(AttributeError, OSError):  # not available on Windows
        os.nice(19)
    for function in (CHOICE, DECODING_STEP):
        function.compile()


if __name__ == "__main__":
    main()
