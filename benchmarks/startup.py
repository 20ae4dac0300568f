"""Compare the startup time of `tinylm --help` with that of an empty Python process, and check whether the command imports torch."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time


def measure_seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - start


HELP = "import sys; sys.argv = ['tinylm', '--help']; from tinylm_cli.app import main; main()"
HELP_AND_CHECK_TORCH = """
import sys
sys.argv = ['tinylm', '--help']
from tinylm_cli.app import main
try:
    main()
finally:
    print('torch' in sys.modules, file=sys.stderr)
"""


def main() -> None:
    measure_seconds(HELP)
    pairs = [(measure_seconds(HELP), measure_seconds("pass")) for _ in range(15)]
    help_seconds, empty_seconds = (statistics.median(times) for times in zip(*pairs, strict=True))
    check = [sys.executable, "-c", HELP_AND_CHECK_TORCH]
    torch_imported = subprocess.run(check, capture_output=True, text=True, check=True).stderr.split()[-1]
    ratio = f"ratio (tinylm / python) {help_seconds / empty_seconds:.1f}"
    print(f"tinylm --help {help_seconds:.3f} s, python -c pass {empty_seconds:.3f} s, {ratio}, torch imported: {torch_imported}")


if __name__ == "__main__":
    main()
