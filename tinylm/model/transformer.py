"""The transformer: a decoder-only model that a recipe's `model:` section can configure as GPT-2, Llama or the `modern` preset.

It maps token ids to logits or, with targets, to the summed loss.

Dimensions: `B` batch, `T` time, `C` width, `V` vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from tinylm.cost.memory import loss_chunk_rows
from tinylm.model import block_mask
from tinylm.model.base import Model
from tinylm.model.block_mask import flex, segment_block_mask
from tinylm.model.cache import CacheRows
from tinylm.model.functions import Dropout, Teacher, summed_cross_entropy
from tinylm.model.hooks import HookPoint, has_functions
from tinylm.model.initialization import initialize
from tinylm.model.layers import Attention, Block, Blocks, FeedForward, ForwardContext, Memory, Rotation, make_norm
from tinylm.model.ngrams import NgramEmbedding
from tinylm.model.positions import positions_in_segments, rope_table, segment_mask, segment_starts, sinusoidal_table
from tinylm.recipe.schema import DecoderSection, ModelVariant, TransformerSection

NGRAM_LR_MULTIPLIER = 6.0
"""Learning rate of n-gram tables relative to other embeddings. Most n-grams occur too rarely for their rows to be learned with the
same learning rate."""
_PER_TOKEN = re.compile(r"embedding\.weight|head\.weight|head\.bias|ngrams\.table\.weight|blocks\.\d+\.value_embedding\.weight")
"""Matches the names of the weights whose rows belong to tokens or n-grams."""
INITIAL_TABLE_LENGTH = 1 << 16
"""Maximum length of the position tables in a new network. The tables grow when more positions are needed."""


class Transformer(Model):
    """A causal language model.

    `model` configures its architecture. `seed` determines its initial weights. Pass None to skip initialization when weights are
    loaded later. Set the attribute `recompute` for activation checkpointing, which saves only each block's input and recomputes
    the block in the backward pass.
    """

    model: TransformerSection
    causal: ClassVar[bool] = True
    """Whether a position attends only to itself and earlier positions."""
    cross_attention: ClassVar[bool] = False
    """Whether the blocks attend to an encoder's output."""
    interleaved_sinusoids: ClassVar[bool] = True
    """The layout of sinusoidal position embeddings (see `sinusoidal_table`)."""

    def __init__(self, model: TransformerSection, vocab_size: int, *, seed: int | None = 0) -> None:
        super().__init__(model, vocab_size)
        self.embedding = nn.Embedding(vocab_size, model.n_embd)
        self.ngrams = NgramEmbedding(model, vocab_size) if model.ngram_embeddings else None
        self.positions = nn.Embedding(model.context_length, model.n_embd) if model.position == "learned" else None
        self.hook_embed = HookPoint()
        self.hook_ngram_embed = HookPoint() if self.ngrams is not None else None
        self.hook_pos_embed = HookPoint() if model.position in ("learned", "sinusoidal") else None
        self.embedding_norm = make_norm(model, model.n_embd) if model.embedding_norm else None
        self.dropout = Dropout(model.dropout)
        blocks = (Block(model, layer, vocab_size, cross_attention=self.cross_attention) for layer in range(model.n_layer))
        self.blocks = Blocks(blocks, value_residual=model.value_residual, uses_dropout=model.uses_dropout)
        self.final_norm = make_norm(model, model.n_embd) if model.norm_position != "post" else None
        self.hook_final_norm = HookPoint() if self.final_norm is not None else None
        self._add_modules(model)
        self.head = nn.Linear(model.n_embd, vocab_size, bias=self._has_head_bias)
        self._register_position_tables(min(model.context_length, INITIAL_TABLE_LENGTH))
        if seed is not None:
            initialize(self, model, torch.Generator().manual_seed(seed))
        if model.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.embedding.weight.requires_grad_(not model.freeze_embeddings)

    def _add_modules(self, model: TransformerSection) -> None:
        """Add a subclass's own modules. They are initialized together with the other modules."""

    @property
    def _has_head_bias(self) -> bool:
        return isinstance(self.model, DecoderSection) and self.model.head_bias

    def _register_position_tables(self, length: int) -> None:
        """Compute the tables of rotary or sinusoidal position embeddings for `length` positions. Do nothing on the meta device."""
        if self.embedding.weight.is_meta:
            return
        model, width, fraction = self.model, self.model.head_width, self.model.rope_fraction
        dtype = self.embedding.weight.dtype  # not float32 in a network that was converted for decoding
        self.table_length = length
        if model.position == "sinusoidal":
            sinusoids = sinusoidal_table(length, model.n_embd, interleaved=self.interleaved_sinusoids)
            self.register_buffer("sinusoids", sinusoids.to(dtype), persistent=False)
        if model.position != "rope":
            return
        tables = {"rope": rope_table(length, width, model.rope_theta or 10000.0, model.rope_scaling, fraction)}
        if model.rope_theta_local is not None:
            tables["local_rope"] = rope_table(length, width, model.rope_theta_local, None, fraction)
        for name, (cosines, sines) in tables.items():
            self.register_buffer(f"{name}_cosines", cosines.to(dtype), persistent=False)
            self.register_buffer(f"{name}_sines", sines.to(dtype), persistent=False)

    def reserve_positions(self, length: int) -> bool:
        """Extend the position tables if they have fewer than `length` positions. Returns whether they were extended.

        The initial tables do not always cover `context_length`, because an untrusted recipe can set it to any number.
        """
        if length <= self.table_length:
            return False
        with torch.device(self.embedding.weight.device):
            self._register_position_tables(min(self.model.context_length, max(length, 2 * self.table_length)))
        return True

    def forward(
        self,
        tokens: Tensor,
        cache: CacheRows | None = None,
        *,
        targets: Tensor | None = None,
        segments: Tensor | None = None,
        teacher: Teacher | None = None,
    ) -> Tensor:
        """Ids (B, T) -> logits (B, T, V), or, with `targets` (B, T), the summed loss in nats (a scalar).

        Negative targets are ignored. The loss is computed without keeping all logits in memory. With a `cache`, the ids follow the
        cached tokens and are appended to the cache. Raises `ValueError` for more than `context_length` positions, including
        cached positions.

        `segments` (B, T): compute each segment of a row as if it were a separate row. Cannot be combined with a cache.
        `teacher`: see `summed_cross_entropy`.
        """
        hidden = self.hidden(tokens, cache, segments=segments)  # (B, T, C)
        if targets is None:
            return self.logits(hidden)
        chunk = loss_chunk_rows(self.vocab_size, on_gpu=hidden.device.type != "cpu")
        cap = self.model.logit_softcap
        hidden, weight = hidden.flatten(0, 1), self.head.weight
        if self.head.bias is not None:  # the weight of an additional input that is always 1
            hidden = torch.cat((hidden, hidden.new_ones(len(hidden), 1)), dim=1)
            weight = torch.cat((weight, self.head.bias[:, None]), dim=1)
        return summed_cross_entropy(
            hidden,
            weight,
            targets.flatten(),
            cap,
            chunk,
            compiled=self.compile_loss,
            teacher=teacher,
        )

    def hidden(
        self,
        tokens: Tensor,
        cache: CacheRows | None = None,
        *,
        segments: Tensor | None = None,
        n_last: int | None = None,
        added: Tensor | None = None,
        memory: Memory | None = None,
        mask: Tensor | BlockMask | None = None,
    ) -> Tensor:
        """Ids (B, T) -> final hidden states (B, T, C), the input of the head. `n_last`: return only the last `n_last` positions.

        `added`: vectors to add to the token embeddings, broadcast to (B, T, C). `memory`: the encoder output, to which
        cross-attention attends. `mask`: see `ForwardContext`. Cannot be combined with `segments`, which have their own mask.
        """
        start = cache.length if cache is not None else 0
        end = start + tokens.shape[1]
        if end > self.model.context_length:
            raise ValueError(f"{end} positions do not fit in the context length of {self.model.context_length}")
        self.reserve_positions(end)
        x = self._embed(tokens, start, end, cache, segments, added)  # (B, T, C)
        if segments is not None and self._uses_block_mask(cache, n_last):
            mask = segment_block_mask(segments, causal=self.causal)
        elif segments is not None:
            mask = segment_mask(segments, causal=self.causal)
        context = ForwardContext(
            tokens,
            x,
            self._rotation("rope", start, end),
            self._rotation("local_rope", start, end),
            cache,
            mask,
            self.causal,
            memory,
            segment_starts(segments) if segments is not None and self.model.shifted_key_heads else None,
        )
        x = self.blocks(x, context, n_last=n_last, recompute=self.recompute)
        if cache is not None:
            cache.advance(tokens.shape[1])
        if self.final_norm is not None and self.hook_final_norm is not None:
            x = self.hook_final_norm(self.final_norm(x))
        return x

    def _uses_block_mask(self, cache: CacheRows | None, n_last: int | None) -> bool:
        """Whether to use compiled FlexAttention for the segment mask. It is supported only in training steps."""
        training_step = torch.is_grad_enabled() and cache is None and n_last is None and self.compile_loss
        supported = flex.enabled and block_mask.is_supported(self.model, self.device)
        return training_step and supported and not has_functions(self)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V), soft-capped if `logit_softcap` is set (Gemma 2, section 2)."""
        logits: Tensor = self.head(hidden)
        cap = self.model.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def finish(self, residual: Tensor) -> Tensor:
        return residual if self.final_norm is None else self.final_norm(residual)

    def _embed(
        self, tokens: Tensor, start: int, end: int, cache: CacheRows | None, segments: Tensor | None, added: Tensor | None
    ) -> Tensor:
        """Ids (B, T) -> the first block's input (B, T, C).

        Positions are [start, end). With `segments`, they restart at 0 in each segment.
        """
        x = self._embed_tokens(tokens)
        if added is not None:
            x = x + added
        if self.model.embedding_scale != 1:
            x = x * self.model.embedding_scale
        x = self.hook_embed(x)
        if self.ngrams is not None and self.hook_ngram_embed is not None:
            vectors = self.ngrams(tokens if cache is None else cache.update_tokens(tokens), segments)[:, -tokens.shape[1] :]
            x = x + self.hook_ngram_embed(vectors)
        position = slice(start, end) if segments is None else positions_in_segments(segments)
        if self.hook_pos_embed is not None:
            table = self.positions.weight if self.positions is not None else self.get_buffer("sinusoids")
            x = x + self.hook_pos_embed(table[position].expand_as(x))
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == torch.bfloat16:
            x = x.bfloat16()  # halves the memory traffic of the residual stream, whose range is too large for float16
        dropped: Tensor = self.dropout(x)
        return dropped

    def _embed_tokens(self, tokens: Tensor) -> Tensor:
        """Ids (B, T) -> token embeddings (B, T, C)."""
        embedded: Tensor = self.embedding(tokens)
        return embedded

    def _rotation(self, table: str, start: int, end: int) -> Rotation | None:
        """Return a table's cosines and sines for positions [start, end), or None if the model does not have this table.

        Positions do not restart in each segment, because only differences between positions matter.
        """
        if self.model.position != "rope" or (table == "local_rope" and self.model.rope_theta_local is None):
            return None
        return self.get_buffer(f"{table}_cosines")[start:end, None], self.get_buffer(f"{table}_sines")[start:end, None]

    def stacked_matrices(self) -> dict[str, tuple[int, ...]]:
        rows: dict[str, tuple[int, ...]] = {}
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                keys = module.kv_heads * module.head_width
                rows[f"{name}.qkv.weight"] = (module.query_rows, keys, keys)
            elif isinstance(module, FeedForward) and self.model.is_gated:
                rows[f"{name}.input.weight"] = (self.model.feed_forward_width,) * 2
        return rows

    def compile_units(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def compile_stacks(self) -> Sequence[nn.Module]:
        return [self.blocks]

    def lr_multipliers(self) -> dict[str, float]:
        return {} if self.ngrams is None else {"ngrams.table.weight": NGRAM_LR_MULTIPLIER}

    def tied_weights(self) -> dict[str, str]:
        return {"head.weight": "embedding.weight"} if self.model.tie_embeddings and hasattr(self, "head") else {}

    @classmethod
    def check_size(cls, model: ModelVariant, names: Iterable[str]) -> str | None:
        assert isinstance(model, TransformerSection)
        layers = sum(name.endswith(".attention.qkv.weight") for name in names)
        return None if layers == model.n_layer else f"{layers} layers instead of {model.n_layer}"

    def vocabulary_weights(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.named_parameters() if _PER_TOKEN.fullmatch(name))

    def head_weights(self) -> frozenset[str]:
        return frozenset(f"head.{name}" for name, _ in self.head.named_parameters()) if hasattr(self, "head") else frozenset()

    def fit_pretrained(self, name: str, weight: Tensor) -> Tensor:
        return weight[: self.model.context_length] if name == "positions.weight" else weight

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def input_embedding(self) -> nn.Embedding:
        return self.embedding

    def output_embedding(self) -> nn.Linear:
        return self.head

    @property
    def depth(self) -> int:
        return len(self.blocks)
