"""Run decoding steps as CUDA graphs: one call launches all kernels of a step, so that the host is not the bottleneck.

A CUDA graph repeats the same kernels on the same memory with the same shapes. `GraphedSteps` therefore copies the inputs of a step
into fixed buffers, rounds the number of rows and cached positions up, and captures one graph for each combination.

Legend: `B` active rows, `R` rows in a graph, `S` cached positions, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tinylm.host_copy import on_device
from tinylm.model.cache import KVCache, LayerCache
from tinylm.model.state import DeviceSampler

SPAN_MULTIPLE = 128
"""Graphs attend to a multiple of this many cached positions. The positions that a row has not filled are masked."""
_WARM_UP_RUNS = 3
MAX_SAMPLING_GRAPHS = 64
"""Maximum number of sampling graphs per cache. A server can receive any number of different sampling options."""

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
    """Samples and decodes one token at a time in the rows of one cache. Graphs are captured when they are first needed.

    A graph also decodes inactive rows of the cache. They write to position 0, which the next prompt in the row overwrites. Sampling
    has its own graphs, because they depend on the sampling options and not on the number of cached positions.
    """

    def __init__(self, step: StepFunction, cache: KVCache, vocab_size: int, backend: GraphBackend) -> None:
        self._step, self._backend = step, backend
        # Keeping the cache's tensors, but not the cache itself, lets a caller store this object with the cache as a weak key.
        self._keys, self._values, self._cached_tokens = cache.keys, cache.values, cache.tokens
        rows, device = len(cache.tokens), cache.tokens.device
        self._tokens, self._positions, self._active = torch.zeros((3, rows), dtype=torch.long, device=device)
        self._logits = torch.zeros((rows, vocab_size), device=device)
        self._uniforms = torch.zeros(rows, dtype=torch.float64, device=device)
        self._chosen = torch.zeros(rows, dtype=torch.long, device=device)
        self._lengths: list[int] = []  # the positions of the active rows in `_positions`
        self._graphs: dict[tuple[int, int], Work] = {}
        self._sampling_graphs: dict[tuple[int, Hashable], Work] = {}

    @property
    def shapes(self) -> set[tuple[int, int]]:
        """The number of rows and cached positions (R, S) of each captured graph."""
        return set(self._graphs)

    def __call__(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Append `tokens` (B,) to rows of these lengths. Return the next-token logits (B, V) in float32.

        Does not wait for the device.
        """
        active, (rows, capacity) = len(lengths), self._cached_tokens.shape
        shape = rows_in_graph(active, rows), span_in_graph(max(lengths) + 1, capacity)
        if self._lengths != list(lengths):
            self._lengths = []  # if the capture fails, the buffers do not belong to a completed step
            inactive = [0] * (rows - active)
            positions_and_active = torch.tensor([[*lengths, *inactive], [1] * active + inactive])
            for buffer, values in zip((self._positions, self._active), on_device(positions_and_active, tokens.device), strict=True):
                buffer.copy_(values)
        self._tokens[:active].copy_(tokens)
        if shape not in self._graphs:
            self._graphs[shape] = self._backend.capture(self._work(*shape))
        self._graphs[shape]()
        self._positions.add_(self._active)
        self._lengths = [length + 1 for length in lengths]
        return self._logits[:active].clone()

    def sample(self, logits: Tensor, sampler: DeviceSampler, uniforms: Tensor) -> Tensor:
        """Return what `sampler` returns for logits (B, V) and for random numbers (B,) on the host. Does not wait for the device."""
        active = len(logits)
        rows = rows_in_graph(active, len(self._cached_tokens))
        uniforms = on_device(uniforms, logits.device)
        if (rows, sampler.key) not in self._sampling_graphs:
            if len(self._sampling_graphs) == MAX_SAMPLING_GRAPHS:
                return sampler(logits, uniforms)
            self._sampling_graphs[rows, sampler.key] = self._backend.capture(self._sampling(rows, sampler))
        self._logits[:active].copy_(logits)
        self._uniforms[:active].copy_(uniforms)
        self._sampling_graphs[rows, sampler.key]()
        return self._chosen[:active].clone()

    def _sampling(self, rows: int, sampler: DeviceSampler) -> Work:
        def work() -> None:
            self._chosen[:rows].copy_(sampler(self._logits[:rows], self._uniforms[:rows]))

        return work

    def _work(self, rows: int, span: int) -> Work:
        """Return a step on the fixed buffers. It can be repeated, because it overwrites only what the same step has written."""
        layers = [LayerCache.from_tensors(k[:rows], v[:rows]) for k, v in zip(self._keys, self._values, strict=True)]
        cached_tokens, tokens, positions = self._cached_tokens[:rows], self._tokens[:rows], self._positions[:rows]

        def work() -> None:
            self._logits[:rows].copy_(self._step(layers, cached_tokens, tokens, positions, span, False))

        return work
