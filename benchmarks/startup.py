"""Measure how soon a command does something useful, from the start of its process.

    python benchmarks/startup.py [--run runs/quickstart] [--before FOLDER] [--rounds 5]

The script always compares `tinylm --help` with an empty Python process, and checks whether the command imports torch. With `--run`,
it also measures the time until `tinylm sample` has printed its first token, and until `tinylm train quickstart` has finished its
first step. One uncounted round fills the caches. With `--before`, a folder that contains another revision of the packages (tinylm,
tinylm_cli and tinylm_recipes), the runs of both revisions alternate, and the script prints the median ratio of their times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAIN = "from tinylm_cli.app import main; main()"
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


def measure_seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - start


def compare_help() -> None:
    measure_seconds(HELP)
    pairs = [(measure_seconds(HELP), measure_seconds("pass")) for _ in range(15)]
    help_seconds, empty_seconds = (statistics.median(times) for times in zip(*pairs, strict=True))
    check = [sys.executable, "-c", HELP_AND_CHECK_TORCH]
    torch_imported = subprocess.run(check, capture_output=True, text=True, check=True).stderr.split()[-1]
    ratio = f"ratio (tinylm / python) {help_seconds / empty_seconds:.1f}"
    print(f"tinylm --help {help_seconds:.3f} s, python -c pass {empty_seconds:.3f} s, {ratio}, torch imported: {torch_imported}")


def seconds_until(marker: bytes, arguments: list[str], packages: str | None) -> float:
    """Start tinylm and return the seconds until a line of its output starts with `marker`, or until its first output if it is
    empty."""
    environment = os.environ | ({"PYTHONPATH": packages} if packages else {})
    start = time.perf_counter()
    command = [sys.executable, "-c", MAIN, *arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        output = b""
        while not (output if not marker else any(line.startswith(marker) for line in output.splitlines())):
            part = os.read(process.stdout.fileno(), 1 << 16)
            assert part, f"tinylm ended without the expected output: {output.decode()}"
            output += part
        seconds = time.perf_counter() - start
        process.kill()
    return seconds


def compare_first_outputs(run: str, before: str | None, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        quickstart = ["train", "quickstart", "--out", str(Path(folder, "run")), "--overwrite", "--set", "training.log_every=1"]
        cases = {
            "tinylm sample, first token": (b"", ["sample", "-r", run, "--prompt", "The", "--seed", "1", "-q"]),
            "tinylm train quickstart, first step": (b"step", quickstart),
        }
        for name, case in cases.items():
            versions = [None] if before is None else [before, None]
            times = [[seconds_until(*case, version) for version in versions] for _ in range(rounds + 1)][1:]
            line = f"{name}: {statistics.median(seconds[-1] for seconds in times):.2f} s"
            if before is not None:
                line += f", after / before {statistics.median(after / old for old, after in times):.2f}"
            print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run")
    parser.add_argument("--before", metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    compare_help()
    if options.run:
        compare_first_outputs(options.run, options.before, options.rounds)


if __name__ == "__main__":
    main()
