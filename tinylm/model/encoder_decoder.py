"""The encoder-decoder (Vaswani et al. 2017): an encoder reads the source, and a decoder predicts the target from its output.

With `preset: transformer`, it matches MarianMTModel. Both stacks use the same blocks as the other transformers.

Legend: `B` batch, `S` source time, `T` target time, `C` width, `R` rows, `K` key/value heads, `D` head width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from tinylm.errors import InputError
from tinylm.model.encoder import Encoder
from tinylm.model.layers import Block, KeysValues, Memory
from tinylm.model.sequence_to_sequence import START, SequenceToSequence
from tinylm.model.transformer import Transformer
from tinylm.recipe.encoder_decoder import EncoderDecoderSection
from tinylm.recipe.schema import ModelVariant, TransformerSection


class EncoderStack(Encoder):
    """The encoder, without a head."""

    interleaved_sinusoids = False

    def __init__(self, model: TransformerSection, vocab_size: int, *, seed: int | None = 0) -> None:
        super().__init__(model, vocab_size, seed=seed)
        self.remove_head()


class DecoderStack(Transformer):
    """The decoder, whose blocks also attend to the output of the encoder."""

    cross_attention = True
    interleaved_sinusoids = False

    def __init__(self, section: EncoderDecoderSection, vocab_size: int, *, seed: int | None = 0) -> None:
        self.section = section
        super().__init__(section.decoder, vocab_size, seed=seed)

    def _add_modules(self, model: TransformerSection) -> None:
        # Do not start at zero, where the gradient of an RMS norm is very large.
        self.start = nn.Parameter(torch.linspace(-1, 1, model.n_embd)) if self.section.learned_start else None

    @property
    def _has_head_bias(self) -> bool:
        return self.section.head_bias

    def _embed_tokens(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(tokens.clamp_min(0))
        is_start = (tokens == START)[..., None]
        return embedded.masked_fill(is_start, 0.0) if self.start is None else torch.where(is_start, self.start, embedded)


class EncoderDecoder(SequenceToSequence):
    """Predicts a target sequence from a source sequence. `source_vocab_size` defaults to `vocab_size`."""

    model: EncoderDecoderSection

    def __init__(
        self, model: EncoderDecoderSection, vocab_size: int, *, seed: int | None = 0, source_vocab_size: int | None = None
    ) -> None:
        super().__init__(model, vocab_size)
        self.encoder = EncoderStack(model.encoder, source_vocab_size or vocab_size, seed=seed)
        self.decoder = DecoderStack(model, vocab_size, seed=None if seed is None else seed + 1)
        if model.tie_embeddings == "all":
            if source_vocab_size not in (None, vocab_size):
                raise InputError("needs a shared vocabulary", where="model.tie_embeddings: all", hint="use output or none")
            self.decoder.embedding.weight = self.decoder.head.weight = self.encoder.embedding.weight

    # Computation.

    def encode(self, source: Tensor, source_segments: Tensor | None = None) -> Memory:
        """Source ids (B, S) -> the decoder's memory. `source_segments` (B, S) is negative at padding."""
        self._set_recompute()
        hidden = self.encoder.hidden(source, segments=source_segments)  # (B, S, C)
        return Memory(hidden, None if source_segments is None else (source_segments >= 0)[:, None, None])

    def memory_keys_values(self, memory: Memory) -> tuple[KeysValues, ...]:
        """Return the cross-attention keys and values of every decoder block. They do not change during decoding."""
        assert memory.hidden is not None
        layers = (block.cross_attention for block in self._decoder_blocks())
        return tuple(layer.project_keys_values(memory.hidden) for layer in layers if layer is not None)

    def hidden(
        self,
        tokens: Tensor,
        *,
        n_last: int | None = None,
        segments: Tensor | None = None,
        source: Tensor | None = None,
        source_segments: Tensor | None = None,
    ) -> Tensor:
        memory = self.encode(self._required(source), source_segments)
        return self.decoder.hidden(tokens, segments=segments, n_last=n_last, memory=memory)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits(hidden)

    def target_state(self, sources: Sequence[Tensor], length: int, capacity: int) -> _TargetState:
        return _TargetState(self, sources, length, capacity)

    def attention_weights(self, source: Tensor, tokens: Tensor) -> Tensor:
        """Return the weights of the last decoder block's cross-attention."""
        name = f"decoder.blocks.{self.model.decoder_layers - 1}.cross_attention.pattern"
        with self.caching([name]) as cache:
            self(tokens[None], source=source[None])
        return cache[name][0]

    def _set_recompute(self) -> None:
        self.encoder.recompute = self.decoder.recompute = self.recompute

    def _decoder_blocks(self) -> list[Block]:
        return [cast(Block, block) for block in self.decoder.blocks]

    # Training.

    def compile_units(self) -> Sequence[nn.Module]:
        return [*self.encoder.blocks, *self.decoder.blocks]

    def muon_weights(self) -> list[str]:
        return [name for name in super().muon_weights() if name != "decoder.head.weight"]

    def stacked_matrices(self) -> dict[str, tuple[int, ...]]:
        return {f"{part}.{name}": rows for part, stack in self._stacks() for name, rows in stack.stacked_matrices().items()}

    def _stacks(self) -> tuple[tuple[str, Transformer], ...]:
        return ("encoder", self.encoder), ("decoder", self.decoder)

    # Saving and loading.

    def tied_weights(self) -> dict[str, str]:
        shared = "encoder.embedding.weight"
        if self.model.tie_embeddings == "all":
            return {"decoder.embedding.weight": shared, **({"decoder.head.weight": shared} if self._has_head else {})}
        if self.model.tie_embeddings == "output" and self._has_head:
            return {"decoder.head.weight": "decoder.embedding.weight"}
        return {}

    @property
    def _has_head(self) -> bool:
        return hasattr(self.decoder, "head")

    @classmethod
    def check_size(cls, model: ModelVariant, names: Iterable[str]) -> str | None:
        assert isinstance(model, EncoderDecoderSection)
        listed = [name for name in names if name.endswith(".attention.qkv.weight")]
        for part, expected in (("encoder", model.n_layer), ("decoder", model.decoder_layers)):
            layers = sum(name.startswith(f"{part}.blocks.") for name in listed)
            if layers != expected:
                return f"{layers} {part} layers instead of {expected}"
        return None

    def vocabulary_weights(self) -> frozenset[str]:
        per_stack = (f"{part}.{name}" for part, stack in self._stacks() for name in stack.vocabulary_weights())
        return frozenset(chain(per_stack, ["decoder.head.bias"] if self._has_head and self.decoder.head.bias is not None else []))

    def head_weights(self) -> frozenset[str]:
        return frozenset(name for name in self.state_dict() if name.startswith("decoder.head."))

    def remove_head(self) -> None:
        self.decoder.remove_head()

    def fit_pretrained(self, name: str, weight: Tensor) -> Tensor:
        return weight[: self.model.context_length] if name.endswith(".positions.weight") else weight

    # Inspection.

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def input_embedding(self) -> nn.Embedding:
        return self.encoder.embedding

    def output_embedding(self) -> nn.Linear:
        return self.decoder.head


class _TargetState:
    """A `TargetState`: the key/value caches of cross-attention and self-attention."""

    def __init__(self, network: EncoderDecoder, sources: Sequence[Tensor], length: int, capacity: int) -> None:
        self._network = network
        self._memory = self._encode(sources, length)
        self._cache = _Cache(network.model.decoder_layers, capacity)

    def _encode(self, sources: Sequence[Tensor], length: int) -> Memory:
        """Encode the sentences one by one, and pad their keys and values to `length`: (sentences, S, K, D)."""
        mask = torch.zeros(len(sources), 1, 1, length, dtype=torch.bool, device=self._network.device)
        stacked: list[KeysValues] = []
        for row, source in enumerate(sources):
            memory = self._network.encode(source[None])
            mask[row, ..., : len(source)] = True
            for layer, (keys, values) in enumerate(self._network.memory_keys_values(memory)):
                if not row:
                    shape = (len(sources), length, *keys.shape[2:])
                    stacked.append((keys.new_zeros(shape), values.new_zeros(shape)))
                stacked[layer][0][row, : len(source)], stacked[layer][1][row, : len(source)] = keys[0], values[0]
        return Memory(None, mask, tuple(stacked))

    def select_sources(self, rows: Tensor) -> None:
        assert self._memory.keys_values is not None
        assert self._memory.mask is not None
        selected = tuple((keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in self._memory.keys_values)
        self._memory = Memory(None, self._memory.mask.index_select(0, rows), selected)

    def select_targets(self, rows: Tensor) -> None:
        self._cache.select(rows)

    def step(self, tokens: Tensor) -> Tensor:
        hidden = self._network.decoder.hidden(tokens[:, None], self._cache, memory=self._memory)  # type: ignore[arg-type]
        return self._network.logits(hidden[:, -1])


class _Cache:
    """The key/value cache that `Transformer.hidden` uses."""

    def __init__(self, layers: int, capacity: int) -> None:
        self.length = 0
        self._capacity = capacity
        self._stored: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (R, K, 1, D) to a layer. Return the keys and values of all positions so far."""
        stored = self._stored[layer]
        if stored is None:
            shape = (*keys.shape[:2], self._capacity, keys.shape[3])
            stored = self._stored[layer] = (keys.new_zeros(shape), values.new_zeros(shape))
        end = self.length + keys.shape[2]
        stored[0][:, :, self.length : end], stored[1][:, :, self.length : end] = keys, values
        return stored[0][:, :, :end], stored[1][:, :, :end]

    def advance(self, positions: int) -> None:
        self.length += positions

    def select(self, rows: Tensor) -> None:
        """Replace the rows with copies of the rows at these indices."""
        for layer, stored in enumerate(self._stored):
            if stored is None:
                continue
            if len(rows) == len(stored[0]):
                for tensor in stored:
                    tensor[:, :, : self.length] = tensor[:, :, : self.length].index_select(0, rows)
            else:
                self._stored[layer] = (stored[0].index_select(0, rows), stored[1].index_select(0, rows))
