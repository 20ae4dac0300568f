"""Start-up time of `tinylm --help` compared with an empty Python process. Also checks whether it imports torch."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time


def seconds_of(code: str) -> float:
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
    seconds_of(HELP)
    pairs = [(seconds_of(HELP), seconds_of("pass")) for _ in range(15)]
    ours, empty = (statistics.median(times) for times in zip(*pairs, strict=True))
    check = [sys.executable, "-c", HELP_AND_CHECK_TORCH]
    torch_imported = subprocess.run(check, capture_output=True, text=True, check=True).stderr.split()[-1]
    print(f"tinylm --help {ours:.3f} s, python -c pass {empty:.3f} s, ratio {ours / empty:.1f}, torch imported: {torch_imported}")


if __name__ == "__main__":
    main()
