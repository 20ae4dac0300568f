"""How long `tinylm --help` takes against an empty Python, in turn, and whether torch was loaded."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - start


HELP = "import sys; sys.argv = ['tinylm', '--help']; from tinylm_cli.app import main; main()"
SPY = """
import sys
sys.argv = ['tinylm', '--help']
from tinylm_cli.app import main
try:
    main()
finally:
    print('torch' in sys.modules, file=sys.stderr)
"""


def main() -> None:
    seconds(HELP)
    pairs = [(seconds(HELP), seconds("pass")) for _ in range(15)]
    ours, empty = (statistics.median(side) for side in zip(*pairs, strict=True))
    loaded = subprocess.run([sys.executable, "-c", SPY], capture_output=True, text=True, check=True).stderr.split()[-1]
    print(f"tinylm --help {ours:.3f} s, python -c pass {empty:.3f} s, ratio {ours / empty:.1f}, torch loaded: {loaded}")


if __name__ == "__main__":
    main()
