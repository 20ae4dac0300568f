"""N-gram language models with the `Model` interface. Their tensors contain the probabilities from `tinylm.data.kneser_ney`.

They always run on the CPU and have no trainable parameters.

Legend: `B` batch, `T` time, `N` order, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tinylm.data.kneser_ney import NgramTables
from tinylm.model.stateful import StatefulModel
from tinylm.recipe.fixed_context import NgramSection

_TENSORS = {"keys": torch.int64, "probabilities": torch.float32, "backoffs": torch.float32, "sizes": torch.int64}
"""The tensors in a checkpoint. `sizes` (N,) counts the n-grams per order. The other tensors concatenate arrays of all orders."""


class Ngram(StatefulModel):
    """An n-gram model. Its state and the "hidden state" at each position are the last N - 1 ids. -1 marks a missing token."""

    model: NgramSection

    def __init__(self, model: NgramSection, vocab_size: int, *, seed: int | None = 0) -> None:
        """`seed` has no effect. Before any text is counted, all tokens have the same probability."""
        super().__init__(model, vocab_size)
        for name, dtype in _TENSORS.items():
            self.register_buffer(name, torch.empty(0, dtype=dtype))
        self._tables: NgramTables | None = None
        if not self.get_buffer("sizes").is_meta:
            empty = tuple(np.zeros(0, dtype=np.int64) for _ in range(model.order - 1))
            probabilities = (np.full(vocab_size, 1 / vocab_size, dtype=np.float32), *(keys.astype(np.float32) for keys in empty))
            backoffs = (np.ones(vocab_size, dtype=np.float32), *(keys.astype(np.float32) for keys in empty))
            self.set_tables(NgramTables(vocab_size, empty, probabilities, backoffs[: model.order - 1]))

    @property
    def tables(self) -> NgramTables:
        """The n-gram probabilities and backoff weights."""
        assert self._tables is not None
        return self._tables

    def set_tables(self, tables: NgramTables) -> None:
        """Replace the n-gram probabilities and backoff weights."""
        self._tables = tables
        arrays = {"keys": tables.keys, "probabilities": tables.probabilities, "backoffs": tables.backoffs}
        for name, dtype in _TENSORS.items():
            values = [len(array) for array in tables.probabilities] if name == "sizes" else _joined(arrays[name])
            setattr(self, name, torch.as_tensor(values, dtype=dtype))

    def hidden(self, tokens: Tensor, *, n_last: int | None = None, segments: Tensor | None = None) -> Tensor:
        """Ids (B, T) -> the last N - 1 ids at each position, (B, T, N - 1). No n-gram crosses a document boundary."""
        contexts = self.continue_from(tokens, self.empty_state(len(tokens)))[0]
        return contexts if n_last is None else contexts[:, -n_last:]

    def continue_from(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        context = self.model.order - 1
        ids = torch.cat((state, tokens), dim=1)
        if not context:
            return tokens.new_empty(*tokens.shape, 0), state
        return ids[:, 1:].unfold(1, context, 1), ids[:, ids.shape[1] - context :]

    def empty_state(self, rows: int) -> Tensor:
        return torch.full((rows, self.model.order - 1), -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Contexts (..., N - 1) -> log-probabilities (..., V), float32."""
        contexts = hidden.reshape(-1, hidden.shape[-1]).numpy() if hidden.shape[-1] else np.zeros((hidden.shape[:-1].numel(), 0))
        logs = np.log(self.tables.distributions(contexts)).astype(np.float32)
        return torch.from_numpy(logs).view(*hidden.shape[:-1], self.vocab_size)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _apply(self, fn: object, recurse: bool = True) -> nn.Module:
        """Ignore device and dtype conversions."""
        return self

    def parameter_count(self) -> int:
        """Return the number of probabilities and backoff weights, or 0 on the meta device."""
        if self._tables is None:
            return 0
        return sum(len(array) for array in (*self.tables.probabilities, *self.tables.backoffs))

    def stored_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Accept any length, because the n-gram count depends on the training text. `load_stored_weights` checks the content."""
        expected = {name: shape if len(shape := shapes.get(name, ())) == 1 else (0,) for name in _TENSORS}
        return {**expected, "sizes": (self.model.order,)}

    def load_stored_weights(self, weights: Mapping[str, Tensor]) -> None:
        if set(weights) != set(_TENSORS) or any(weights[name].dtype != dtype for name, dtype in _TENSORS.items()):
            raise RuntimeError("it does not have the tensors of an n-gram model")
        sizes = weights["sizes"].tolist()
        arrays = {name: tensor.numpy() for name, tensor in weights.items()}
        if len(sizes) != self.model.order or sizes[0] != self.vocab_size or min(sizes) < 0:
            raise RuntimeError("the n-gram counts do not match the order and the vocabulary")
        tables = NgramTables(
            self.vocab_size,
            _split(arrays["keys"], sizes[1:]),
            _split(arrays["probabilities"], sizes),
            _split(arrays["backoffs"], sizes[:-1]),
        )
        problem = tables.problem()
        if problem is not None:
            raise RuntimeError(problem)
        self.set_tables(tables)


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0)


def _split(values: np.ndarray, sizes: list[int]) -> tuple[np.ndarray, ...]:
    """Split an array into parts of the given sizes. Raises `RuntimeError` if the sizes do not add up to its length."""
    if sum(sizes) != len(values):
        raise RuntimeError(f"{len(values):,} values instead of {sum(sizes):,}")
    ends = np.cumsum(sizes)
    return tuple(values[end - size : end] for size, end in zip(sizes, ends, strict=True))
