"""Numba-compiled decoding for recurrent networks on a CPU. The kernels are in `tinylm.model.recurrent_kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.model.recurrent import Recurrent
from tinylm.model.state import TokenChooser
from tinylm.model.stateful import RowState
from tinylm.recipe.recurrent import GruSection, LstmSection, RnnSection

_LOAD_SECONDS = 2.0
"""Upper bound on the seconds needed to load numba and the compiled code."""
_SAVED_SECONDS_PER_STEP = 1e-4
"""Lower bound on the seconds that a compiled step saves."""

_MAX_TABLE = 1 << 24
"""Maximum number of values in the precomputed table that maps each token to the first layer's input projection."""


def is_worthwhile(network: Recurrent, steps: int | None) -> bool:
    """Whether compiled steps are supported and save more time than loading takes. `steps=None` means unlimited steps."""
    weight = network.embedding.weight
    supported = weight.device.type == "cpu" and weight.dtype == torch.float32
    return supported and (steps is None or steps * _SAVED_SECONDS_PER_STEP > _LOAD_SECONDS)


class CompiledRecurrent:
    """A `DecodingModel` whose steps run in compiled code on one thread. Prompts are prefilled with PyTorch.

    Raises `InputError` if the network is not on a CPU in float32.
    """

    uses_numba = True
    capacity = None

    def __init__(self, network: Recurrent) -> None:
        from tinylm.model import recurrent_kernels  # imports numba, which is slow

        if network.device.type != "cpu" or network.embedding.weight.dtype != torch.float32:
            raise InputError("compiled decoding needs a CPU and float32", where="--compile", hint="remove the option")
        self.network, self.vocab_size = network, network.vocab_size
        self._kernel: Any = recurrent_kernels.step
        self._run: Any = recurrent_kernels.run
        self._embedding = network.embedding.weight.detach()
        layers = [dict(layer.named_parameters()) for layer in network.layers]
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        stacked = [torch.stack([layer[name].detach() for layer in layers]) for name in names]
        self._arrays = [tensor.contiguous().numpy() for tensor in (*stacked, network.head.weight.detach())]
        self._first_weight = stacked[0][0].t()
        small = self.vocab_size * self._first_weight.shape[1] <= _MAX_TABLE
        self._table = self._embedding @ self._first_weight if small else None
        model = network.model
        kinds = {LstmSection: recurrent_kernels.LSTM, GruSection: recurrent_kernels.GRU}
        self._kind = kinds.get(type(model), recurrent_kernels.TANH)
        if isinstance(model, RnnSection) and model.activation == "relu":
            self._kind = recurrent_kernels.RELU

    @property
    def device(self) -> torch.device:
        return self.network.device

    def __call__(self, tokens: Tensor) -> Tensor:
        """Ids (B, T) -> logits (B, T, V)."""
        logits: Tensor = self.network(tokens)
        return logits

    def new_state(self, rows: int, max_tokens: int | None = None) -> RowState:
        """Create a state with `rows` empty rows. Its size does not depend on `max_tokens`."""
        return self.network.new_state(rows)

    def prefill(self, state: RowState, row: int, ids: Sequence[int] | Tensor) -> Tensor:
        """Overwrite a row with ids (T,). Return the next-token logits (V,)."""
        return self.network.prefill(state, row, ids)

    def step(self, state: RowState, tokens: Tensor) -> Tensor:
        """Append `tokens` (B,), one id per row. Return the next-token logits (B, V)."""
        inputs = self._embedding[tokens] @ self._first_weight if self._table is None else self._table[tokens]
        logits = torch.empty(len(tokens), self.vocab_size)
        state.values = state.values.detach().contiguous()
        self._kernel(self._kind, *self._arrays, inputs.numpy(), state.values.numpy(), logits.numpy())
        state.lengths = [length + 1 for length in state.lengths]
        return logits

    def run(self, state: RowState, chooser: TokenChooser) -> int:
        """Choose and append several tokens per row. See `tinylm.model.state.RunsAhead`."""
        if self._table is None:
            return 0
        state.values = state.values.detach().contiguous()
        arrays = (self._table.numpy(), state.values.numpy(), chooser.logits.numpy())
        steps = int(
            self._run(self._kind, *self._arrays, *arrays, chooser.address, chooser.records, chooser.record_size, chooser.chosen)
        )
        state.lengths = [length + steps for length in state.lengths]
        return steps
