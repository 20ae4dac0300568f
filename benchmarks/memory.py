"""Check that the peak memory of data preparation does not grow with the size of the text.

    python benchmarks/memory.py [--megabytes 32 256]

Each text is prepared in a separate process.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PREPARE = """
import resource, sys
from tinylm.data.prepare import prepare
from tinylm.recipe import loads
from tinylm.reporting import SILENT
recipe = loads("data: {train: %s}\\ntraining: {steps: 1}" % sys.argv[1])
tokens = len(prepare(recipe.data, recipe.tokenizer, SILENT).train)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, tokens)
"""


def write_text(path: Path, megabytes: int) -> None:
    """Write words from Python's language reference in random order.

    Each line also contains a new random word, because new words keep appearing in real text.
    """
    import pydoc_data.topics

    words = " ".join(pydoc_data.topics.topics.values()).split()
    generator = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1_000_000:
            line = generator.choices(words, k=12)
            line.append("".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=8)))
            file.write(" ".join(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[32, 256])
    peaks = []
    for megabytes in parser.parse_args().megabytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "text.txt")
            write_text(path, megabytes)
            environment = {**os.environ, "TINYLM_CACHE": str(Path(folder, "cache"))}
            start = time.perf_counter()
            process = subprocess.run(
                [sys.executable, "-c", PREPARE, str(path)], env=environment, check=True, capture_output=True, text=True
            )
            peak, tokens = map(int, process.stdout.split())
            peaks.append(peak)
            print(f"{megabytes:5} MB of text, {tokens:,} tokens: peak {peak} MiB, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"peak memory ratio (last text / first text): {peaks[-1] / peaks[0]:.2f}")


if __name__ == "__main__":
    main()
