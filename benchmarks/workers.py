"""Preparing a text on one process, whose tokenizer uses threads, and on several: seconds and bytes of the tokens, in turn.

python benchmarks/workers.py TEXT [WORKERS]...
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from pathlib import Path

from tinylm.data.prepare import encode
from tinylm.recipe.schema import BpeTokenizer
from tinylm.text.sources import Corpus
from tinylm.tokenizer import training


def main() -> None:
    text, *counts = sys.argv[1:]
    with Corpus([text]) as corpus, tempfile.TemporaryDirectory() as folder:
        tokenizer = training.train(BpeTokenizer(kind="bpe", vocab_size=4096), corpus.pieces(), print)
        best: dict[int, float] = {}
        for _ in range(2):
            for workers in map(int, counts or ("1", "2")):
                began = time.perf_counter()
                shard = encode(Path(folder), f"with-{workers}", corpus.pieces(), tokenizer, lambda done: None, workers)
                best[workers] = min(best.get(workers, 1e9), time.perf_counter() - began)
                file = Path(folder) / f"with-{workers}.npy"
                tokens = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
                speed = shard.counts.bytes / best[workers] / 1e6
                print(f"{workers} workers: {best[workers]:.2f} s, {speed:.1f} MB/s, tokens {tokens}")


if __name__ == "__main__":
    main()
