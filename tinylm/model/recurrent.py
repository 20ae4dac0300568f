"""Recurrent language models: an embedding, a stack of simple RNN, LSTM or GRU layers, and a head.

The layers are equivalent to torch.nn.RNN, LSTM and GRU, and call the same torch functions.

Legend: `B` batch, `T` time, `C` width, `G` gates, `S` vectors in a layer's state (2 for an LSTM: output and cell), `L` layers,
`V` vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.cost.memory import loss_chunk_rows
from tinylm.model.functions import Dropout, summed_cross_entropy
from tinylm.model.hooks import HookedModule, HookPoint
from tinylm.model.stateful import StatefulModel
from tinylm.recipe.recurrent import LstmSection, RecurrentSection, RnnSection
from tinylm.recipe.schema import ModelVariant


class RecurrentLayer(HookedModule):
    """One recurrent layer. Its weights have the same names and gate order as in torch.nn.RNNCell, LSTMCell and GRUCell."""

    def __init__(self, model: RecurrentSection) -> None:
        super().__init__()
        rows = model.gates * model.n_embd
        self.weight_ih = nn.Parameter(torch.empty(rows, model.n_embd))
        self.weight_hh = nn.Parameter(torch.empty(rows, model.n_embd))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))
        self.weight_drop = model.weight_drop
        self.hook_output = HookPoint()
        self._has_cell = isinstance(model, LstmSection)
        self._function: Callable[..., Any] = torch.lstm if self._has_cell else torch.gru
        if isinstance(model, RnnSection):
            self._function = torch.rnn_tanh if model.activation == "tanh" else torch.rnn_relu

    def forward(self, x: Tensor, state: Tensor, weight_hh: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (B, T, C) and state (B, S, C) -> outputs (B, T, C) and the state after the last input.

        `weight_hh` contains the recurrent weights after weight dropout.
        """
        vectors = [vector[None].contiguous() for vector in state.unbind(1)]  # each (1, B, C)
        weights = [self.weight_ih, weight_hh, self.bias_ih, self.bias_hh]
        initial = vectors if self._has_cell else vectors[0]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
            outputs, *final = self._function(x, initial, weights, True, 1, 0.0, self.training, False, True)
        return self.hook_output(outputs), torch.stack([vector[0] for vector in final], dim=1)

    def dropped_weight(self) -> Tensor:
        """Return the recurrent weights for one micro-batch, with weight dropout in training mode."""
        return F.dropout(self.weight_hh, self.weight_drop, self.training) if self.weight_drop else self.weight_hh


class Recurrent(StatefulModel):
    """A stack of recurrent layers. Its state (B, L, S, C) contains each layer's output and, for an LSTM, its cell."""

    model: RecurrentSection

    def __init__(self, model: RecurrentSection, vocab_size: int, *, seed: int | None = 0) -> None:
        super().__init__(model, vocab_size)
        self.embedding = nn.Embedding(vocab_size, model.n_embd)
        self.hook_embed = HookPoint()
        self.layers = nn.ModuleList(RecurrentLayer(model) for _ in range(model.n_layer))
        self.head = nn.Linear(model.n_embd, vocab_size, bias=False)
        self.dropout = Dropout(model.dropout)
        if seed is not None:
            self._initialize(torch.Generator().manual_seed(seed))
        if model.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _initialize(self, generator: torch.Generator) -> None:
        """Draw uniform weights in the layers, as torch.nn does. An LSTM's forget bias starts at about 1 (Jozefowicz et al. 2015).

        An untied embedding has standard deviation 1, because smaller values slow down learning in the first steps.
        """
        width = self.model.n_embd
        bounds = {"embedding.weight": 0.1 if self.model.tie_embeddings else math.sqrt(3), "head.weight": 0.001}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                bound = bounds.get(name, 1 / math.sqrt(width))
                parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)
                if isinstance(self.model, LstmSection) and name.endswith("bias_ih"):
                    parameter[width : 2 * width] += 1

    def forward(self, tokens: Tensor, *, targets: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        hidden = self.hidden(tokens, segments=segments)  # (B, T, C)
        if targets is None:
            return self.logits(hidden)
        chunk = loss_chunk_rows(self.vocab_size, on_gpu=hidden.device.type != "cpu")
        return summed_cross_entropy(
            hidden.flatten(0, 1), self.head.weight, targets.flatten(), None, chunk, compiled=self.compile_loss
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
        vectors = 2 if isinstance(self.model, LstmSection) else 1
        return self.embedding.weight.new_zeros(rows, self.model.n_layer, vectors, self.model.n_embd)

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
        return dict.fromkeys(self.muon_weights(), (self.model.n_embd,) * self.model.gates) if self.model.gates > 1 else {}

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
