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
from tinylm.model.translation_records import TRANSLATION_STEP
from tinylm.reporting import Reporter

_FUNCTIONS = {"sampling": (CHOICE, DECODING_STEP), "translation": (TRANSLATION_STEP,)}


def compile_in_background(reporter: Reporter, purpose: str = "sampling") -> None:
    """Start a process with low priority that compiles the code for a purpose. It continues after this process ends."""
    reporter.note("compiling the decoding step for this CPU in the background (once); later calls use it")
    subprocess.Popen(
        [sys.executable, "-m", __name__, purpose],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def main(purpose: str) -> None:
    with suppress(AttributeError, OSError):  # not available on Windows
        os.nice(19)
    for function in _FUNCTIONS[purpose]:
        function.compile()


if __name__ == "__main__":
    main(sys.argv[1])
