"""Encoding text on several processes.

Units of text, which no word crosses, go out in order and ids come back in order: the tokens are the same bytes whatever the number
of workers.
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
from tinylm.tokenizer.encoding import units

_BATCH_BYTES = 1 << 21
_AHEAD = 3
"""Batches under way for each worker: they bound the memory, and keep everybody busy while the slowest is waited for."""

Unit = tuple[bytes, bool]
Encoded = tuple[np.ndarray, bool]
_tokenizer: Tokenizer | None = None


def encoded(tokenizer: Tokenizer, pieces: Iterable[Piece], workers: int) -> Iterator[Encoded]:
    """(ids, whether they begin a document) for each piece, in order. Raises `WorkError` when a worker dies."""
    if workers == 1:
        yield from tokenizer.encode_pieces(pieces)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _begin, (tokenizer.backend.to_str(),))
    under_way: deque[Future[list[Encoded]]] = deque()
    try:
        for batch in _batches(units(pieces, tokenizer.borders)):
            under_way.append(pool.submit(_encode, batch))
            if len(under_way) >= _AHEAD * workers:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    except BrokenProcessPool:
        hint = "it may have run out of memory: try fewer with --workers"
        raise WorkError("a process that encoded text was killed", hint=hint) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(units: Iterable[Unit]) -> Iterator[list[Unit]]:
    batch: list[Unit] = []
    size = 0
    for unit in units:
        batch.append(unit)
        size += len(unit[0])
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _begin(tokenizer: str) -> None:
    """In a worker: one thread each, signals left to the parent, and no life after its death."""
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _tokenizer = Tokenizer.from_text(tokenizer)


def _encode(batch: list[Unit]) -> list[Encoded]:
    assert _tokenizer is not None
    return [(_tokenizer.encoder.encode(text), starts) for text, starts in batch]
