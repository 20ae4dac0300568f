"""Run decoding steps as CUDA graphs: one call launches all kernels of a step, so that the host is not the bottleneck.

A CUDA graph repeats the same kernels on the same memory with the same shapes. `GraphedSteps` therefore copies the inputs of a step
into fixed buffers, rounds the number of rows and cached positions up, and captures one graph for each combination.

Legend: `B` active rows, `R` rows in a graph, `S` cached positions, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tinylm.model.cache import KVCache, LayerCache

SPAN_MULTIPLE = 128
"""Graphs attend to a multiple of this many cached positions. The positions that a row has not filled are masked."""
_WARM_UP_RUNS = 3

Work = Callable[[], None]
StepFunction = Callable[[list[LayerCache], Tensor, Tensor, Tensor, int, bool], Tensor]
"""`Decoder.decode_one_token`."""


class GraphBackend(Protocol):
    """Captures work on a device so that it can be repeated."""

    def capture(self, work: Work) -> Work:
        """Return a function that repeats the kernels of `work` on the same memory, without running its Python code.

        Runs `work` one or more times. Until `work` is repeated, its results are undefined.
        """
        ...


class CUDAGraphs:
    """Captures `torch.cuda.CUDAGraph`s. All graphs share one memory pool, so they must not run at the same time.

    Another graph may overwrite every tensor that a graph allocates. Results must be copied to tensors allocated before the capture.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # cuBLAS allocates a workspace for every stream, so all captures use the same stream.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, work: Work) -> Work:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):  # loads libraries and chooses kernels, which is not possible during a capture
                for _ in range(_WARM_UP_RUNS):
                    work()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # With "thread_local", other threads may use CUDA during the capture, as in a server.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    work()
            except RuntimeError:  # torch does not restore the stream if the capture fails
                torch.cuda.set_stream(current)
                raise
        replay: Work = graph.replay
        return replay


def rows_in_graph(active: int, rows: int) -> int:
    """Return the number of rows to decode for `active` rows: the next power of two, or all `rows` of the cache if it has fewer."""
    return min(1 << (active - 1).bit_length(), rows)


def span_in_graph(length: int, capacity: int) -> int:
    """Return the number of cached positions to attend to for rows of up to `length` positions."""
    return min(-(-length // SPAN_MULTIPLE) * SPAN_MULTIPLE, capacity)


class GraphedSteps:
    """Decodes one token at a time in the rows of one cache. Graphs are captured when they are first needed.

    A graph also decodes inactive rows of the cache. They write to position 0, which the next prompt in the row overwrites.
    """

    def __init__(self, step: StepFunction, cache: KVCache, vocab_size: int, backend: GraphBackend) -> None:
        self._step, self._backend = step, backend
        # Keeping the cache's tensors, but not the cache itself, lets a caller store this object with the cache as a weak key.
        self._keys, self._values, self._cached_tokens = cache.keys, cache.values, cache.tokens
        rows, device = len(cache.tokens), cache.tokens.device
        self._tokens, self._positions, self._active = torch.zeros((3, rows), dtype=torch.long, device=device)
        self._logits = torch.zeros((rows, vocab_size), device=device)
        self._lengths: list[int] = []  # the positions of the active rows in `_positions`
        self._graphs: dict[tuple[int, int], Work] = {}

    @property
    def shapes(self) -> set[tuple[int, int]]:
        """The number of rows and cached positions (R, S) of each captured graph."""
        return set(self._graphs)

    def __call__(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Append `tokens` (B,) to rows of these lengths. Return the next-token logits (B, V) in float32.

        Does not wait for the device unless rows were added, removed, moved or prefilled since the last step.
        """
        active, (rows, capacity) = len(lengths), self._cached_tokens.shape
        shape = rows_in_graph(active, rows), span_in_graph(max(lengths) + 1, capacity)
        if self._lengths != list(lengths):
            self._lengths = []  # if the capture fails, the buffers do not belong to a completed step
            inactive = [0] * (rows - active)
            self._positions.copy_(torch.tensor([*lengths, *inactive]))
            self._active.copy_(torch.tensor([1] * active + inactive))
        self._tokens[:active].copy_(tokens)
        if shape not in self._graphs:
            self._graphs[shape] = self._backend.capture(self._work(*shape))
        self._graphs[shape]()
        self._positions.add_(self._active)
        self._lengths = [length + 1 for length in lengths]
        return self._logits[:active].clone()

    def _work(self, rows: int, span: int) -> Work:
        """Return a step on the fixed buffers. It can be repeated, because it overwrites only what the same step has written."""
        layers = [LayerCache.from_tensors(k[:rows], v[:rows]) for k, v in zip(self._keys, self._values, strict=True)]
        cached_tokens, tokens, positions = self._cached_tokens[:rows], self._tokens[:rows], self._positions[:rows]

        def work() -> None:
            self._logits[:rows].copy_(self._step(layers, cached_tokens, tokens, positions, span, False))

        return work
