"""Apply a function with several processes and keep the order of the results. This is how text is encoded.

A text is divided only at split points, which no token crosses. Segments are sent to the workers in order, and the ids are yielded
in the same order. The result therefore does not depend on the number of workers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import numpy as np

from tinylm.errors import WorkError
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.encoding import segments

BATCH_BYTES = 1 << 21
_PENDING_PER_WORKER = 3
"""Maximum number of pending batches per worker. It limits memory use but keeps all workers busy while results wait for the slowest
batch."""

Item = TypeVar("Item")
Result = TypeVar("Result")
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
    batches = _batches(segments(pieces, tokenizer.split_points))
    for encoded in map_in_order(_encode, batches, workers, initialize_worker, (tokenizer.backend.to_str(),)):
        yield from encoded


def map_in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    initialize: Callable[..., None],
    arguments: tuple[Any, ...] = (),
    *,
    option: str = "--workers",
) -> Iterator[Result]:
    """Apply a function in worker processes, and yield the results in the order of the items.

    Each worker first calls `initialize(*arguments)`. Raises `WorkError` if a worker dies; the hint names `option`.
    """
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initialize, arguments)
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= _PENDING_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        hint = f"it may have run out of memory; reduce {option}"
        raise WorkError("a worker process was killed", hint=hint) from None
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
    """Load a tokenizer.json in a worker."""
    global _tokenizer
    isolate_worker()
    _tokenizer = Tokenizer.from_text(tokenizer_json)


def isolate_worker() -> None:
    """Set up a worker process, which uses one thread, ignores Ctrl-C, and exits when its parent process ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _encode(batch: list[Segment]) -> list[Encoded]:
    assert _tokenizer is not None
    return [(_tokenizer.encoder.encode(text), starts_document) for text, starts_document in batch]
