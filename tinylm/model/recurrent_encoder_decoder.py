"""Recurrent networks for translation (Sutskever et al. 2014), with additive attention (Bahdanau et al. 2015).

An encoder reads the source. A decoder predicts the target from the encoder's last state and, with attention, from a weighted mean
of the encoder's outputs, which it computes at each position.

Legend: `B` batch, `S` source time, `T` target time, `C` width, `M` width of the encoder's outputs, `L` layers, `Z` vectors in a
layer's state (2 for an LSTM: output and cell), `R` rows, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.errors import InputError
from tinylm.model.functions import Dropout
from tinylm.model.hooks import HookedModule, HookPoint
from tinylm.model.recurrent import GATES, RecurrentLayer, draw_uniform
from tinylm.model.sequence_to_sequence import START, SequenceToSequence
from tinylm.recipe.recurrent import RecurrentEncoderDecoderSection
from tinylm.recipe.schema import ModelVariant


@dataclass(frozen=True)
class Encoded:
    """The output of the encoder."""

    state: Tensor
    """(B, L, Z, C), the decoder's first state."""
    outputs: Tensor | None
    """(B, S, M), or None without attention."""
    keys: Tensor | None
    """(B, S, C): the projection of the outputs that attention compares with its query. None without attention."""
    mask: Tensor | None
    """(B, S), False at padding. None means that there is no padding."""

    def rows(self, rows: Tensor) -> Encoded:
        """Return copies of the rows at these indices."""
        outputs, keys, mask = (None if part is None else part[rows] for part in (self.outputs, self.keys, self.mask))
        return Encoded(self.state[rows], outputs, keys, mask)


class RecurrentEncoder(HookedModule):
    """Reads a source sentence in one direction, or with separate layers in both directions."""

    def __init__(self, model: RecurrentEncoderDecoderSection, vocab_size: int) -> None:
        super().__init__()
        self.model = model
        self.embedding = nn.Embedding(vocab_size, model.n_embd)
        self.hook_embed = HookPoint()
        inputs = [model.n_embd] + [model.memory_width] * (model.n_layer - 1)
        self.layers = nn.ModuleList(RecurrentLayer(model.cell, width, model.n_embd) for width in inputs)
        both = model.encoder_direction == "both"
        self.backward_layers = nn.ModuleList(RecurrentLayer(model.cell, width, model.n_embd) for width in inputs if both)
        # A projection of the last states of both directions is the decoder's first state. Bahdanau et al. project only the backward
        # direction's state, but without attention, the last forward layer would then have no effect.
        state = model.n_embd * (2 if model.cell == "lstm" else 1)
        self.bridges = nn.ModuleList(nn.Linear(2 * state, state) for _ in self.backward_layers)
        self.dropout = Dropout(model.dropout)

    def forward(self, source: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids (B, S) -> outputs (B, S, M) and the decoder's first state (B, L, Z, C).

        `lengths` (B,), on the CPU, is the number of tokens in each row. None means S.
        """
        reverse = _reversal(lengths, source)
        is_backward = self.model.encoder_direction == "backward"
        x = self.hook_embed(self.embedding(source.gather(1, reverse) if is_backward else source))
        x = dropped(x, self.dropout)
        states = []
        for index, layer in enumerate(_layers(self.layers)):
            outputs, state = layer(x, layer.empty_state(len(x)), lengths=lengths)
            if self.backward_layers:
                backward = _layers(self.backward_layers)[index]
                reversed_outputs, last = backward(_reordered(x, reverse), backward.empty_state(len(x)), lengths=lengths)
                outputs = torch.cat((outputs, _reordered(reversed_outputs, reverse)), dim=-1)
                state = self.bridges[index](torch.cat((state, last), dim=1).flatten(1)).tanh().view(state.shape)
            states.append(state)
            x = dropped(outputs, self.dropout)
        return _reordered(x, reverse) if is_backward else x, torch.stack(states, dim=1)


class AdditiveAttention(nn.Module):
    """Attention in which a network with one hidden layer scores each pair of a query and a key: v . tanh(W q + U k)."""

    def __init__(self, width: int, memory_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(memory_width, width)
        self.score = nn.Parameter(torch.empty(width))

    def forward(self, query: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Query (B, C) -> the weighted mean of the encoder's outputs (B, M), and the weights (B, S)."""
        assert encoded.keys is not None
        assert encoded.outputs is not None
        hidden = (self.query(query)[:, None] + encoded.keys).tanh()  # (B, S, C)
        scores = (hidden * self.score).sum(dim=-1)
        if encoded.mask is not None:
            scores = scores.masked_fill(~encoded.mask, float("-inf"))
        weights = scores.softmax(dim=-1)
        return torch.bmm(weights[:, None].to(encoded.outputs.dtype), encoded.outputs)[:, 0], weights


class RecurrentDecoder(HookedModule):
    """Predicts the target. With attention, the query is the previous output of the first layer.

    The mean that attention returns is an input of the first layer and of the last hidden layer (maxout), as in Bahdanau et al.
    """

    def __init__(self, model: RecurrentEncoderDecoderSection, vocab_size: int) -> None:
        super().__init__()
        width = model.n_embd
        self.embedding = nn.Embedding(vocab_size, width)
        self.hook_embed = HookPoint()
        has_attention = model.attention == "additive"
        self.attention = AdditiveAttention(width, model.memory_width) if has_attention else None
        inputs = [width + (model.memory_width if has_attention else 0)] + [width] * (model.n_layer - 1)
        self.layers = nn.ModuleList(RecurrentLayer(model.cell, each, width) for each in inputs)
        self.readout = nn.Linear(2 * width + model.memory_width, 2 * width) if has_attention else None
        self.dropout = Dropout(model.dropout)

    def forward(self, tokens: Tensor, encoded: Encoded, state: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids (B, T) that continue from `state` (B, L, Z, C) -> hidden states (B, T, C), the new state, and attention weights.

        The weights have the shape (B, T, S). They are None without attention.
        """
        is_start = (tokens == START)[..., None]
        embedded = self.hook_embed(self.embedding(tokens.clamp_min(0)).masked_fill(is_start, 0.0))  # (B, T, C)
        first, *others = _layers(self.layers)
        x, context, weights = dropped(embedded, self.dropout), None, None
        if self.attention is None:
            outputs, new = first(x, state[:, 0])
        else:
            outputs, new, context, weights = self._attend(x, encoded, state[:, 0])
        hidden, states = dropped(outputs, self.dropout), [new]
        for index, layer in enumerate(others, 1):
            outputs, new = layer(hidden, state[:, index])
            hidden = dropped(outputs, self.dropout)
            states.append(new)
        if self.readout is not None:
            assert context is not None
            pieces = self.readout(torch.cat((hidden, x, context), dim=-1)).unflatten(-1, (-1, 2))  # (B, T, C, 2)
            hidden = dropped(pieces.amax(dim=-1), self.dropout)  # maxout
        return hidden, torch.stack(states, dim=1), weights

    def _attend(self, x: Tensor, encoded: Encoded, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the first layer on inputs (B, T, C). Return its outputs, its new state, the means (B, T, M) and the weights."""
        assert self.attention is not None
        layer = _layers(self.layers)[0]
        outputs, contexts, weights = [], [], []
        for embedded in x.unbind(1):
            context, weight = self.attention(state[:, 0], encoded)
            state = layer.step(torch.cat((embedded, context), dim=-1), state)
            outputs.append(state[:, 0])
            contexts.append(context)
            weights.append(weight)
        return layer.hook_output(torch.stack(outputs, 1)), state, torch.stack(contexts, 1), torch.stack(weights, 1)


class RecurrentEncoderDecoder(SequenceToSequence):
    """Predicts a target sequence from a source sequence. `source_vocab_size` defaults to `vocab_size`."""

    model: RecurrentEncoderDecoderSection

    def __init__(
        self,
        model: RecurrentEncoderDecoderSection,
        vocab_size: int,
        *,
        seed: int | None = 0,
        source_vocab_size: int | None = None,
    ) -> None:
        super().__init__(model, vocab_size)
        self.encoder = RecurrentEncoder(model, source_vocab_size or vocab_size)
        self.decoder = RecurrentDecoder(model, vocab_size)
        self.head = nn.Linear(model.n_embd, vocab_size, bias=False)
        if seed is not None:
            self._initialize(torch.Generator().manual_seed(seed))
        if model.tie_embeddings == "all":
            if source_vocab_size not in (None, vocab_size):
                raise InputError("needs a shared vocabulary", where="model.tie_embeddings: all", hint="use output or none")
            self.decoder.embedding.weight = self.encoder.embedding.weight
        if model.tie_embeddings != "none":
            self.head.weight = self.decoder.embedding.weight

    def _initialize(self, generator: torch.Generator) -> None:
        """Draw uniform weights. See `Recurrent` for the bounds."""
        tied = self.model.tie_embeddings != "none"
        for module in self.modules():
            if isinstance(module, RecurrentLayer):
                module.initialize(generator)
            elif isinstance(module, nn.Embedding):
                draw_uniform(module.weight, 0.1 if tied else math.sqrt(3), generator)
            elif isinstance(module, nn.Linear):
                draw_uniform(module.weight, 0.001 if module is self.head else 1 / math.sqrt(module.in_features), generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.decoder.attention is not None:
            draw_uniform(self.decoder.attention.score, 1 / math.sqrt(self.model.n_embd), generator)

    # Computation.

    def encode(self, source: Tensor, source_segments: Tensor | None = None) -> Encoded:
        """Source ids (B, S) -> the encoder's output. `source_segments` (B, S) is negative at the padding after the sentence."""
        mask = None if source_segments is None else source_segments >= 0
        lengths = None if mask is None else mask.sum(dim=1).cpu()
        if lengths is not None and int(lengths.min()) == source.shape[1]:
            mask = lengths = None  # no padding: the layers are faster without lengths
        outputs, state = self.encoder(source, lengths)
        if self.decoder.attention is None:
            return Encoded(state, None, None, None)
        return Encoded(state, outputs, self.decoder.attention.key(outputs), mask)

    def hidden(
        self,
        tokens: Tensor,
        *,
        n_last: int | None = None,
        segments: Tensor | None = None,
        source: Tensor | None = None,
        source_segments: Tensor | None = None,
    ) -> Tensor:
        encoded = self.encode(self._required(source), source_segments)
        hidden, _, _ = self.decoder(tokens, encoded, encoded.state)
        return cast(Tensor, hidden if n_last is None else hidden[:, -n_last:])

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        return logits

    def target_state(self, sources: Sequence[Tensor], length: int) -> _TargetState:
        return _TargetState(self, sources, length)

    def attention_weights(self, source: Tensor, tokens: Tensor) -> Tensor:
        encoded = self.encode(source[None])
        _, _, weights = self.decoder(tokens[None], encoded, encoded.state)
        if weights is None:
            raise InputError("this model has no attention, so it has no alignment", hint="train with model.attention: additive")
        return cast(Tensor, weights)

    # Training.

    def muon_weights(self) -> list[str]:
        return [*super().muon_weights(), *self._layer_weights()]

    def stacked_matrices(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self._layer_weights(), (self.model.n_embd,) * GATES[self.model.cell])

    def _layer_weights(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if name.endswith((".weight_ih", ".weight_hh"))]

    # Saving and loading.

    def tied_weights(self) -> dict[str, str]:
        head = ["head.weight"] if hasattr(self, "head") else []
        if self.model.tie_embeddings == "all":
            return dict.fromkeys(["decoder.embedding.weight", *head], "encoder.embedding.weight")
        return dict.fromkeys(head, "decoder.embedding.weight") if self.model.tie_embeddings == "output" else {}

    @classmethod
    def check_size(cls, model: ModelVariant, names: Iterable[str]) -> str | None:
        assert isinstance(model, RecurrentEncoderDecoderSection)
        listed = [name for name in names if name.endswith(".weight_hh")]
        for part in ("encoder", "decoder"):
            layers = sum(name.startswith(f"{part}.layers.") for name in listed)
            if layers != model.n_layer:
                return f"{layers} {part} layers instead of {model.n_layer}"
        return None

    def vocabulary_weights(self) -> frozenset[str]:
        return frozenset({"encoder.embedding.weight", "decoder.embedding.weight", *self.head_weights()})

    def head_weights(self) -> frozenset[str]:
        return frozenset({"head.weight"} if hasattr(self, "head") else ())

    # Inspection.

    @property
    def device(self) -> torch.device:
        return self.encoder.embedding.weight.device

    def input_embedding(self) -> nn.Embedding:
        return self.encoder.embedding

    def output_embedding(self) -> nn.Linear:
        return self.head


class _TargetState:
    """A `TargetState`: the decoder's state, and the encoder's outputs."""

    def __init__(self, network: RecurrentEncoderDecoder, sources: Sequence[Tensor], length: int) -> None:
        """Encode the sentences one by one, and pad the encoder's outputs to `length`."""
        self._network, self._rows_per_source = network, 1
        encoded = [network.encode(source[None]) for source in sources]
        outputs = keys = mask = None
        if network.decoder.attention is not None:
            outputs = torch.cat([_padded(each.outputs, length) for each in encoded])
            keys = torch.cat([_padded(each.keys, length) for each in encoded])
            lengths = torch.tensor([len(source) for source in sources], device=network.device)
            mask = torch.arange(length, device=network.device) < lengths[:, None]
        self._sentences = Encoded(torch.cat([each.state for each in encoded]), outputs, keys, mask)
        self._encoded: Encoded | None = None
        """The encoded sentence of each row. None if the rows' sentences have changed since the last step."""
        self._state: Tensor | None = None
        """(R, L, Z, C), or None before the first step."""

    def keep_sources(self, sources: Sequence[int]) -> None:
        self._sentences = self._sentences.rows(torch.tensor(sources, device=self._network.device))
        self._encoded = None

    def select_rows(self, rows: Tensor, rows_per_source: int) -> None:
        if rows_per_source != self._rows_per_source:
            self._rows_per_source, self._encoded = rows_per_source, None
        assert self._state is not None
        self._state = self._state.index_select(0, rows)

    def step(self, tokens: Tensor) -> Tensor:
        if self._encoded is None:
            sources = torch.arange(len(tokens), device=tokens.device) // self._rows_per_source
            self._encoded = self._sentences.rows(sources.clamp_max(len(self._sentences.state) - 1))
        state = self._encoded.state if self._state is None else self._state
        hidden, self._state, _ = self._network.decoder(tokens[:, None], self._encoded, state)
        return self._network.logits(hidden[:, -1])


def dropped(x: Tensor, dropout: Dropout) -> Tensor:
    """Apply dropout to x (B, T, C), with the same mask at all positions of a row."""
    return x * dropout(x.new_ones(len(x), 1, x.shape[2])) if dropout.training and dropout.p else x


def _reversal(lengths: Tensor | None, tokens: Tensor) -> Tensor:
    """Return indices (B, S) that reverse the tokens of each row and leave its padding in place. The reversal is its own inverse."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    if lengths is None:
        return positions.flip(1).expand(len(tokens), -1)
    ends = lengths.to(tokens.device)[:, None]
    return torch.where(positions < ends, ends - 1 - positions, positions)


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """Reorder the positions of x (B, S, C)."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))


def _padded(x: Tensor | None, length: int) -> Tensor:
    assert x is not None
    return F.pad(x, (0, 0, 0, length - x.shape[1]))


def _layers(modules: nn.ModuleList) -> list[RecurrentLayer]:
    return [cast(RecurrentLayer, module) for module in modules]
