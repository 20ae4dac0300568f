"""Compare the encoding speed of one process, whose tokenizer uses threads, with that of several processes.

    python benchmarks/workers.py TEXT [WORKERS]...

Every line of output must show the same token hash.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from functools import partial
from pathlib import Path

from tinylm.data.prepare import encode_to_shard
from tinylm.data.workers import encode_in_parallel
from tinylm.recipe.schema import BpeTokenizer
from tinylm.text.sources import Corpus
from tinylm.tokenizer import training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("workers", type=int, nargs="*", default=[1, 2])
    arguments = parser.parse_args()
    with Corpus([arguments.text]) as corpus, tempfile.TemporaryDirectory() as folder:
        tokenizer = training.train(BpeTokenizer(kind="bpe", vocab_size=4096), corpus.pieces(), print)
        best: dict[int, float] = {}
        for _ in range(2):
            for workers in arguments.workers:
                start = time.perf_counter()
                encoder = partial(encode_in_parallel, tokenizer, workers=workers)
                name = f"with-{workers}"
                shard = encode_to_shard(Path(folder), name, corpus.pieces(), tokenizer, lambda done: None, encoder)
                best[workers] = min(best.get(workers, 1e9), time.perf_counter() - start)
                file = Path(folder) / f"{name}.npy"
                fingerprint = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
                speed = shard.counts.bytes / best[workers] / 1e6
                print(f"{workers} workers: {best[workers]:.2f} s, {speed:.1f} MB/s, token hash {fingerprint}")


if __name__ == "__main__":
    main()
