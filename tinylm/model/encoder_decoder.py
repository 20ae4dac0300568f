"""The encoder-decoder (Vaswani et al. 2017): an encoder reads the source, and a decoder predicts the target from its output.

With `preset: transformer`, it matches MarianMTModel. Both stacks use the same blocks as the other transformers.

Legend: `B` batch, `S` source time, `T` target time, `C` width, `R` rows, `N` sentences, `G` rows of a sentence,
`K` key/value heads, `D` head width, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from tinylm.errors import InputError
from tinylm.model.encoder import Encoder
from tinylm.model.layers import Block, KeysValues, Memory
from tinylm.model.sequence_to_sequence import ROW_MULTIPLE, START, SequenceToSequence
from tinylm.model.transformer import Transformer
from tinylm.recipe.encoder_decoder import EncoderDecoderSection
from tinylm.recipe.schema import ModelVariant, TransformerSection

_ENCODED_TOKENS = 512
"""Number of source tokens, including padding, that are encoded together."""
_INITIAL_POSITIONS = 64
"""Number of positions per sentence for which the cache has room at first."""


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

    def encode_sources(self, sources: Sequence[Tensor], length: int) -> tuple[Tensor, list[list[Tensor]]]:
        """Pad sentences, each of ids (S,), to `length`, and encode them.

        Return their mask (N, 1, 1, S), and the cross-attention keys and values (N, S, K, D) of each decoder block.
        """
        length = min(length, self.model.context_length)
        unit = ROW_MULTIPLE // math.gcd(length, ROW_MULTIPLE)  # sentences are encoded in multiples of this number
        ids = torch.zeros(-(-len(sources) // unit) * unit, length, dtype=torch.long, device=self.device)
        segments = torch.full_like(ids, -1)
        for row, source in enumerate(sources):
            ids[row, : len(source)], segments[row, : len(source)] = source, 0
        size = max(1, _ENCODED_TOKENS // (length * unit)) * unit
        chunks = zip(torch.split(ids, size), torch.split(segments, size), strict=True)
        encoded = [self.memory_keys_values(self.encode(*chunk)) for chunk in chunks]
        layers = [[torch.cat(parts)[: len(sources)] for parts in zip(*layer, strict=True)] for layer in zip(*encoded, strict=True)]
        return (segments[: len(sources)] >= 0)[:, None, None], layers

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

    def target_state(self, sources: Sequence[Tensor], length: int) -> _TargetState:
        return _TargetState(self, sources, length)

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

    def compile_stacks(self) -> Sequence[nn.Module]:
        return [self.encoder.blocks, self.decoder.blocks]

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
    """A `TargetState`: the keys and values of cross-attention, and the key/value cache of self-attention.

    All rows of a sentence attend to the same stored keys and values.
    """

    def __init__(self, network: EncoderDecoder, sources: Sequence[Tensor], length: int) -> None:
        self._network = network
        self._mask, self._keys_values = network.encode_sources(sources, length)
        self._cache = _BeamCache(network.model.decoder_layers, len(sources), network.device)

    def keep_sources(self, sources: Sequence[int]) -> None:
        self._mask = _kept(self._mask, sources)
        self._keys_values = [[_kept(stored, sources) for stored in layer] for layer in self._keys_values]
        self._cache.keep(sources)

    def select_rows(self, rows: Tensor, rows_per_source: int) -> None:
        self._cache.select(rows, rows_per_source)

    def step(self, tokens: Tensor) -> Tensor:
        cache, decoder = self._cache, self._network.decoder
        mask = self._mask.expand(-1, -1, cache.rows_per_source, -1)
        memory = Memory(None, mask, tuple((keys, values) for keys, values in self._keys_values))
        hidden = decoder.hidden(tokens[:, None], cache, memory=memory, mask=cache.begin_step())  # type: ignore[arg-type]
        return self._network.logits(hidden[:, -1])


class _BeamCache:
    """The key/value cache that `Transformer.hidden` uses, for sentences with `G` rows each.

    Rows are never copied. Each step appends the keys and values of a sentence's rows as G positions. A mask selects the positions
    that belong to a row or to the rows that it continues. A sentence has one row at first.
    """

    def __init__(self, layers: int, sentences: int, device: torch.device) -> None:
        self.length = 0
        self.rows_per_source = 1
        self._stored: list[list[Tensor] | None] = [None] * layers
        """Keys and values of each layer, (N, capacity, K, D)."""
        self._mask = torch.zeros(sentences, 1, 1, 0, dtype=torch.bool, device=device)

    def begin_step(self) -> Tensor:
        """Return the attention mask (N, 1, G, S) of the next step, in which each row also attends to itself."""
        own = torch.eye(self.rows_per_source, dtype=torch.bool, device=self._mask.device).expand(len(self._mask), 1, -1, -1)
        self._mask = torch.cat((self._mask, own), dim=3)
        return self._mask

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (R, K, 1, D) to a layer. Return those of all positions so far, (N, K, S, D)."""
        sentences, end = len(self._mask), self._mask.shape[3]
        stored = self._stored[layer]
        if stored is None or stored[0].shape[1] < end:
            stored = self._stored[layer] = self._grown(stored, keys)
        for store, new in zip(stored, (keys, values), strict=True):
            rows = new[: sentences * self.rows_per_source]  # without rows of padding
            store[:, end - self.rows_per_source : end] = rows.reshape(sentences, self.rows_per_source, *store.shape[2:])
        return stored[0][:, :end].transpose(1, 2), stored[1][:, :end].transpose(1, 2)

    def _grown(self, stored: list[Tensor] | None, keys: Tensor) -> list[Tensor]:
        """Return keys and values with more capacity."""
        sentences, _, _, end = self._mask.shape
        shape = (sentences, max(_INITIAL_POSITIONS, 2 * end), keys.shape[1], keys.shape[3])
        grown = [keys.new_empty(shape), keys.new_empty(shape)]
        for old, new in zip(stored or (), grown, strict=False):
            new[:, : old.shape[1]] = old
        return grown

    def advance(self, positions: int) -> None:
        self.length += positions

    def keep(self, sources: Sequence[int]) -> None:
        """Keep only the sentences at these indices."""
        self._mask = _kept(self._mask, sources)
        self._stored = [None if stored is None else [_kept(each, sources) for each in stored] for stored in self._stored]

    def select(self, rows: Tensor, rows_per_source: int) -> None:
        """Replace each sentence's rows with copies of its rows at these indices."""
        sentences, _, before, positions = self._mask.shape
        parents = rows[: sentences * rows_per_source].view(sentences, 1, rows_per_source, 1) % before
        self._mask = self._mask.gather(2, parents.expand(-1, -1, -1, positions))
        self.rows_per_source = rows_per_source


def _kept(stored: Tensor, sources: Sequence[int]) -> Tensor:
    """Move the rows at indices `sources` to the front of the tensor, and return a view of them.

    Rows that are already in place are not copied.
    """
    moved = [place for place, source in enumerate(sources) if place != source]
    if moved:
        stored[moved] = stored[[sources[place] for place in moved]]
    return stored[: len(sources)]
