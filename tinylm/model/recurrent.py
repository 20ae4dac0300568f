"""Recurrent language models: an embedding, a stack of simple RNN, LSTM or GRU layers, and a head.

The layers are equivalent to torch.nn.RNN, LSTM and GRU, and call the same torch functions.

Legend: `B` batch, `T` time, `C` width, `S` vectors in a layer's state (2 for an LSTM: output and cell), `L` layers,
`V` vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tinylm.cost.memory import loss_chunk_rows
from tinylm.model.functions import Dropout, Teacher, summed_cross_entropy
from tinylm.model.hooks import HookedModule, HookPoint
from tinylm.model.stateful import StatefulModel
from tinylm.recipe.recurrent import Cell, RecurrentSection
from tinylm.recipe.schema import ModelVariant

GATES: Mapping[Cell, int] = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
"""Number of matrices that each layer weight stacks."""


class RecurrentLayer(HookedModule):
    """One recurrent layer. Its weights have the same names and gate order as in torch.nn.RNNCell, LSTMCell and GRUCell."""

    def __init__(self, cell: Cell, inputs: int, width: int, weight_drop: float = 0.0) -> None:
        """`inputs` is the width of the inputs. `weight_drop` is the dropout probability of `dropped_weight`."""
        super().__init__()
        rows = GATES[cell] * width
        self.weight_ih = nn.Parameter(torch.empty(rows, inputs))
        self.weight_hh = nn.Parameter(torch.empty(rows, width))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))
        self.weight_drop = weight_drop
        self.hook_output = HookPoint()
        self.cell: Cell = cell
        self._function: Callable[..., Any] = getattr(torch, cell)
        self._cell_function: Callable[..., Any] = getattr(torch, f"{cell}_cell")

    def forward(
        self, x: Tensor, state: Tensor, weight_hh: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Inputs (B, T, C) and state (B, S, C) -> outputs (B, T, C) and the state after the last input.

        `weight_hh` contains the recurrent weights after weight dropout. `lengths` (B,), on the CPU, is the number of inputs in each
        row. None means T.
        """
        vectors = [vector[None] for vector in state.unbind(1)]  # each (1, B, C)
        weights = [self.weight_ih, self.weight_hh if weight_hh is None else weight_hh, self.bias_ih, self.bias_hh]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
            if lengths is None:
                outputs, *final = self._function(x, self._initial(vectors), weights, True, 1, 0.0, self.training, False, True)
            else:
                packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
                order, restored = packed.sorted_indices, packed.unsorted_indices
                assert order is not None
                assert restored is not None
                initial = self._initial([vector.index_select(1, order) for vector in vectors])
                data, *final = self._function(packed.data, packed.batch_sizes, initial, weights, True, 1, 0.0, self.training, False)
                outputs, _ = pad_packed_sequence(packed._replace(data=data), batch_first=True, total_length=x.shape[1])
                final = [vector.index_select(1, restored) for vector in final]
        return self.hook_output(outputs), torch.stack([vector[0] for vector in final], dim=1)

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """Inputs (B, C) at one position and state (B, S, C) -> the new state, whose first vector is the output."""
        final = self._cell_function(
            x, self._initial(list(state.unbind(1))), self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        )
        return torch.stack(final if self.cell == "lstm" else (final,), dim=1)

    def _initial(self, vectors: list[Tensor]) -> Any:
        """Return the vectors of a state as the initial state that torch expects."""
        vectors = [vector.contiguous() for vector in vectors]
        return vectors if self.cell == "lstm" else vectors[0]

    def empty_state(self, rows: int) -> Tensor:
        """Return the state (B, S, C) before the first input."""
        return self.weight_hh.new_zeros(rows, 2 if self.cell == "lstm" else 1, self.weight_hh.shape[1])

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw uniform weights, as torch.nn does. An LSTM's forget bias starts at about 1 (Jozefowicz et al. 2015)."""
        width = self.weight_hh.shape[1]
        for parameter in self.parameters():
            draw_uniform(parameter, 1 / math.sqrt(width), generator)
        if self.cell == "lstm":
            self.bias_ih[width : 2 * width] += 1

    def dropped_weight(self) -> Tensor:
        """Return the recurrent weights for one micro-batch, with weight dropout in training mode."""
        return F.dropout(self.weight_hh, self.weight_drop, self.training) if self.weight_drop else self.weight_hh


@torch.no_grad()
def draw_uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fill a parameter with uniform random numbers between -bound and bound."""
    parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)


class Recurrent(StatefulModel):
    """A stack of recurrent layers. Its state (B, L, S, C) contains each layer's output and, for an LSTM, its cell."""

    model: RecurrentSection

    def __init__(self, model: RecurrentSection, vocab_size: int, *, seed: int | None = 0) -> None:
        super().__init__(model, vocab_size)
        self.embedding = nn.Embedding(vocab_size, model.n_embd)
        self.hook_embed = HookPoint()
        self.layers = nn.ModuleList(
            RecurrentLayer(model.cell, model.n_embd, model.n_embd, model.weight_drop) for _ in range(model.n_layer)
        )
        self.head = nn.Linear(model.n_embd, vocab_size, bias=False)
        self.dropout = Dropout(model.dropout)
        if seed is not None:
            self._initialize(torch.Generator().manual_seed(seed))
        if model.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _initialize(self, generator: torch.Generator) -> None:
        """Draw uniform weights.

        An untied embedding has standard deviation 1, because smaller values slow down learning in the first steps.
        """
        draw_uniform(self.embedding.weight, 0.1 if self.model.tie_embeddings else math.sqrt(3), generator)
        for layer in self._layers:
            layer.initialize(generator)
        draw_uniform(self.head.weight, 0.001, generator)

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        segments: Tensor | None = None,
        teacher: Teacher | None = None,
    ) -> Tensor:
        hidden = self.hidden(tokens, segments=segments)  # (B, T, C)
        if targets is None:
            return self.logits(hidden)
        chunk = loss_chunk_rows(self.vocab_size, on_gpu=hidden.device.type != "cpu")
        return summed_cross_entropy(
            hidden.flatten(0, 1), self.head.weight, targets.flatten(), None, chunk, compiled=self.compile_loss, teacher=teacher
        )

    def hidden(self, tokens: Tensor, *, n_last: int | None = None, segments: Tensor | None = None) -> Tensor:
        """Ids (B, T) -> outputs of the last layer (B, T, C). In training mode, outputs at burn-in positions are zero.

        Raises `ValueError` if `segments` is not None, because the layers cannot reset their state within a row.
        """
        if segments is not None:
            raise ValueError("recurrent networks do not support segments")
        masks, weights = self._dropout_masks(tokens), [layer.dropped_weight() for layer in self._layers]
        state, burn_in = self.empty_state(len(tokens)), self.model.burn_in if self.training else 0
        if 0 < burn_in < tokens.shape[1]:
            with torch.no_grad():
                _, state = self._run(tokens[:, :burn_in], state, masks, weights)
            outputs, _ = self._run(tokens[:, burn_in:], state, masks, weights)
            outputs = F.pad(outputs, (0, 0, burn_in, 0))
        else:
            outputs, _ = self._run(tokens, state, masks, weights)
        return outputs if n_last is None else outputs[:, -n_last:]

    def continue_from(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(tokens, state, self._dropout_masks(tokens), [layer.dropped_weight() for layer in self._layers])

    def _run(self, tokens: Tensor, state: Tensor, masks: list[Tensor] | None, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Ids (B, T) and a state (B, L, S, C) -> outputs (B, T, C) and the new state."""
        x = self.hook_embed(self.embedding(tokens))
        states = []
        for index, layer in enumerate(self._layers):
            x, new = layer(x if masks is None else x * masks[index], state[:, index], weights[index])
            states.append(new)
        return x if masks is None else x * masks[-1], torch.stack(states, dim=1)

    def _dropout_masks(self, tokens: Tensor) -> list[Tensor] | None:
        """Return a mask (B, 1, C) for each layer's input and one for the last layer's output, or None without dropout."""
        if not self.training or not self.model.dropout:
            return None
        ones = torch.ones(len(tokens), 1, self.model.n_embd, device=tokens.device)
        return [self.dropout(ones) for _ in range(self.model.n_layer + 1)]

    def empty_state(self, rows: int) -> Tensor:
        return torch.stack([layer.empty_state(rows) for layer in self._layers], dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        return logits

    @property
    def _layers(self) -> list[RecurrentLayer]:
        return [layer for layer in self.layers if isinstance(layer, RecurrentLayer)]

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def muon_weights(self) -> list[str]:
        return [f"layers.{index}.{name}" for index in range(self.model.n_layer) for name in ("weight_ih", "weight_hh")]

    def stacked_matrices(self) -> dict[str, tuple[int, ...]]:
        gates = GATES[self.model.cell]
        return dict.fromkeys(self.muon_weights(), (self.model.n_embd,) * gates) if gates > 1 else {}

    def tied_weights(self) -> dict[str, str]:
        return {"head.weight": "embedding.weight"} if self.model.tie_embeddings and hasattr(self, "head") else {}

    @classmethod
    def check_size(cls, model: ModelVariant, names: Iterable[str]) -> str | None:
        assert isinstance(model, RecurrentSection)
        layers = sum(name.endswith(".weight_hh") for name in names)
        return None if layers == model.n_layer else f"{layers} layers instead of {model.n_layer}"

    def vocabulary_weights(self) -> frozenset[str]:
        return frozenset({"embedding.weight", *self.head_weights()})

    def head_weights(self) -> frozenset[str]:
        return frozenset({"head.weight"} if hasattr(self, "head") else ())

    def input_embedding(self) -> nn.Embedding:
        return self.embedding

    def output_embedding(self) -> nn.Linear:
        return self.head
