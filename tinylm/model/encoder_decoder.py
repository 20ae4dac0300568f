"""The encoder-decoder (Vaswani et al. 2017): an encoder reads the source, and a decoder predicts the target from its output.

With `preset: transformer`, it matches MarianMTModel. Both stacks use the same blocks as the other transformers.

Legend: `B` batch, `S` source time, `T` target time, `C` width, `N` targets, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinylm.cost.memory import loss_chunk_rows
from tinylm.errors import InputError
from tinylm.model.base import Model
from tinylm.model.encoder import Encoder
from tinylm.model.layers import Block, KeysValues, Memory
from tinylm.model.transformer import Transformer
from tinylm.recipe.encoder_decoder import EncoderDecoderSection
from tinylm.recipe.schema import ModelVariant, TransformerSection

START = -1
"""The id at the position before the first target token. It has no row in the embedding."""


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


class EncoderDecoder(Model):
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
        """Target ids (B, T) that begin with `START` -> final hidden states (B, T, C), the input of `logits`.

        `source` (B, S) is required. Raises `InputError` if it is None.
        """
        if source is None:
            raise InputError("a model with the encoder_decoder architecture needs a source text", hint="use `tinylm translate`")
        memory = self.encode(source, source_segments)
        return self.decoder.hidden(tokens, segments=segments, n_last=n_last, memory=memory)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits(hidden)

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        segments: Tensor | None = None,
        source: Tensor | None = None,
        source_segments: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Target ids (B, T) -> logits (B, T, V), or, with `targets` (B, T), the summed loss in nats (a scalar).

        With targets, the head runs only at positions whose target is not negative. `label_smoothing`: the fraction of the
        target probability that is spread uniformly over the vocabulary.
        """
        hidden = self.hidden(tokens, segments=segments, source=source, source_segments=source_segments)
        if targets is None:
            return self.logits(hidden)
        chosen = (targets.flatten() >= 0).nonzero().squeeze(1)  # (N,)
        hidden, ids = hidden.flatten(0, 1)[chosen], targets.flatten()[chosen].long()  # (N, C), (N,)
        rows = loss_chunk_rows(self.vocab_size, on_gpu=hidden.device.type != "cpu")
        if len(ids) <= rows:
            return self._loss(hidden, ids, label_smoothing)
        chunks = zip(torch.split(hidden, rows), torch.split(ids, rows), strict=True)
        losses = [checkpoint(self._loss, part, part_ids, label_smoothing, use_reentrant=False) for part, part_ids in chunks]
        return torch.stack(losses).sum()

    def _loss(self, hidden: Tensor, ids: Tensor, label_smoothing: float) -> Tensor:
        return F.cross_entropy(self.logits(hidden).float(), ids, reduction="sum", label_smoothing=label_smoothing)

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
