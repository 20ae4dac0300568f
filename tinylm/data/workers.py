"""Encode text with several processes.

The text is divided only at split points, which no token crosses. Segments are sent to the workers in order, and the ids are yielded
in the same order. The result therefore does not depend on the number of workers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from tinylm.errors import WorkError
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.encoding import segments

BATCH_BYTES = 1 << 21
_PENDING_PER_WORKER = 3
"""Maximum number of pending batches per worker. It limits memory use but keeps all workers busy while results wait for the slowest
batch."""

Segment = tuple[bytes, bool]
"""(UTF-8 text, whether it starts a document)"""
Encoded = tuple[np.ndarray, bool]
"""(ids, whether they start a document)"""
_tokenizer: Tokenizer | None = None


def encode_in_parallel(tokenizer: Tokenizer, pieces: Iterable[Piece], workers: int) -> Iterator[Encoded]:
    """Encode a text and yield (ids, whether they start a document). Raises `WorkError` if a worker dies."""
    if workers == 1:
        yield from tokenizer.encode_pieces(pieces)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initialize_worker, (tokenizer.backend.to_str(),))
    pending: deque[Future[list[Encoded]]] = deque()
    try:
        for batch in _batches(segments(pieces, tokenizer.split_points)):
            pending.append(pool.submit(_encode, batch))
            if len(pending) >= _PENDING_PER_WORKER * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        hint = "it may have run out of memory; reduce --workers"
        raise WorkError("a tokenization worker was killed", hint=hint) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(all_segments: Iterable[Segment]) -> Iterator[list[Segment]]:
    batch: list[Segment] = []
    size = 0
    for text, starts_document in all_segments:
        batch.append((text, starts_document))
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def initialize_worker(tokenizer_json: str) -> None:
    """Load a tokenizer.json in a worker. The worker uses one thread, ignores Ctrl-C, and exits when its parent process ends."""
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    _tokenizer = Tokenizer.from_text(tokenizer_json)


def _encode(batch: list[Segment]) -> list[Encoded]:
    assert _tokenizer is not None
    return [(_tokenizer.encoder.encode(text), starts_document) for text, starts_document in batch]
